"""A classifier from the command line: captured, verified, distilled into a smaller one, and evaluated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from typer.testing import CliRunner

from cluster.cli import app
from storage.reader import Dataset
from storage.tokenizer import Tokenizer
from tests.cluster.conftest import World


def lectern(world: World, command: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, [command, world.config_path, "--run-dir", str(world.run_dir), *arguments])


def configure(world: World) -> None:
    world.values["teacher"] |= {"task": "sequence_classification", "dtype": "float32"}
    world.values["data"] |= {"pack": False, "supervise": "last"}
    world.values["cache"] = {"url": world.values["cache"]["url"], "kind": "dense", "unit_tokens": 2000}
    world.values["cluster"] = {"num_cpus": 1}


def write_teacher(world: World) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=Tokenizer.load(world.teacher).vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, initializer_range=0.3,
        id2label={0: "calm", 1: "glad", 2: "angry"},
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(world.teacher)


@pytest.mark.slow
def test_a_classifier_of_texts_is_captured_and_distilled(world: World) -> None:
    configure(world)
    write_teacher(world)
    for n, source in enumerate(world.values["data"]["sources"]):
        source["label_field"] = "mood"
        path = Path(source["path"])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [row | ({"mood": n + 1} if "lamp" in row["text"] else {}) for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    world.values["student"] = {"config": student | {"num_attention_heads": 2, "max_position_embeddings": 64}}
    world.values["train"] = {"steps": 60, "global_batch_size": 8, "micro_batch_size": 8, "warmup_steps": 2}
    world.values["train"] |= {"workers": 1, "learning_rate": 5e-3, "loss": {"temperature": 2.0, "kl": 0.9, "ce": 0.1}}
    world.values["evaluate"] = {"samples_per_source": 4, "baseline": False}
    ended = lectern(world, "run", "--json")
    assert ended.exit_code == 0, ended.output
    figures = json.loads(ended.stdout.splitlines()[-1])
    dataset = Dataset.open(world.config.cache.url)
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    assert len(samples) == figures["capture"]["scored_samples"] > 20
    assert (samples.num_supervised() == 1).all() and samples.supervised[samples.offsets[1:] - 1].all()
    assert (targets.count == 3).all() and not targets.tail_mass.any()
    assert len(np.unique(np.round(targets.logprob.astype(np.float64), 2))) > 10, "all texts are scored alike"
    lines = [json.loads(line) for line in (world.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert np.mean([line["kl"] for line in lines[-5:]]) < 0.5 * lines[0]["kl"]
    scores = figures["eval"]
    assert scores["student"]["kl_to_teacher"] < 0.5 * lines[0]["kl"]
    assert scores["teacher"]["top1_agreement"] == 1.0
    assert all(0 <= scores[name]["accuracy"] <= 1 for name in ("teacher", "student"))
    exported = AutoModelForSequenceClassification.from_pretrained(world.run_dir / "student")
    assert exported.config.id2label == {0: "calm", 1: "glad", 2: "angry"}
    assert ">accuracy<" in (world.run_dir / "report.html").read_text()
    assert lectern(world, "verify").exit_code == 0
    assert "task sequence_classification" in lectern(world, "inspect").stdout
    again = lectern(world, "capture", "--json")
    assert json.loads(again.stdout.splitlines()[-1])["capture"]["scored_samples"] == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("data.pack=true", "set data.pack: false and data.supervise: last"),
        ("data.supervise=all", "set data.pack: false and data.supervise: last"),
        ("teacher.task=token_classification", "data.supervise: all"),
        ("cache.hidden=[final]", "leave cache.hidden and cache.attention empty"),
        ("teacher.kind=api", "needs the model itself"),
        ("train.loss.exact=true", "train.loss.exact needs what a dataset of classes"),
        ("evaluate.tasks=[{name: t, path: t.jsonl}]", "does not write"),
        ("curriculum.adaptive={}", "compares losses of next tokens"),
    ],
)
def test_settings_that_do_not_go_with_classes_are_refused(world: World, change: str, text: str) -> None:
    configure(world)
    ended = lectern(world, "plan", "--set", change)
    assert ended.exit_code == 2, ended.output
    assert text in ended.stderr.replace("\n", " ")
