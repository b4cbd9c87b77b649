"""A classifier's dataset, from the command line: captured, verified, and refused by the trainer of language models."""

import json
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


@pytest.mark.slow
def test_a_text_has_one_row_of_classes(world: World) -> None:
    configure(world)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=Tokenizer.load(world.teacher).vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(world.teacher)
    ended = lectern(world, "capture", "--json")
    assert ended.exit_code == 0, ended.output
    dataset = Dataset.open(world.config.cache.url)
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    assert len(samples) == json.loads(ended.stdout.splitlines()[-1])["capture"]["scored_samples"] > 20
    assert (samples.num_supervised() == 1).all() and samples.supervised[samples.offsets[1:] - 1].all()
    assert (targets.count == 3).all() and not targets.tail_mass.any()
    assert len(np.unique(np.round(targets.logprob.astype(np.float64), 2))) > 10, "all texts are scored alike"
    assert lectern(world, "verify").exit_code == 0
    assert "task sequence_classification" in lectern(world, "inspect").stdout
    again = lectern(world, "capture", "--json")
    assert json.loads(again.stdout.splitlines()[-1])["capture"]["scored_samples"] == 0
    ended = lectern(world, "train")
    assert ended.exit_code == 2
    assert "holds the classes of a teacher" in ended.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("data.pack=true", "set data.pack: false and data.supervise: last"),
        ("data.supervise=all", "set data.pack: false and data.supervise: last"),
        ("teacher.task=token_classification", "data.supervise: all"),
        ("cache.hidden=[final]", "leave cache.hidden and cache.attention empty"),
        ("teacher.kind=api", "needs the model itself"),
    ],
)
def test_settings_that_do_not_go_with_classes_are_refused(world: World, change: str, text: str) -> None:
    configure(world)
    ended = lectern(world, "plan", "--set", change)
    assert ended.exit_code == 2, ended.output
    assert text in ended.stderr.replace("\n", " ")
