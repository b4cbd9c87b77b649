"""A student with a tokenizer of its own, from the command line."""

import json

import numpy as np
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cluster.cli import app
from storage.tokenizer import Tokenizer
from tests.cluster.conftest import WORDS, World
from tests.storage.tiny_tokenizers import write_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["alm", "uld"])
def test_a_student_with_its_own_tokenizer_is_trained_and_told_per_byte(world: World, divergence: str) -> None:
    own = write_tokenizer(world.folder / "own", [" ".join(WORDS)] * 9, merges=40)
    world.values["student"] = {"tokenizer": str(own), "config": {"model_type": "qwen2", "hidden_size": 16}}
    world.values["student"]["config"] |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    world.values["student"]["config"] |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
    world.values["train"] |= {"steps": 30, "workers": 1, "learning_rate": 1e-2, "loss": {"divergence": divergence}}
    world.values["evaluate"] |= {"baseline": False}
    world.values["cluster"] = {"num_cpus": 1}
    world.capture()
    ended = CliRunner().invoke(app, ["run", world.config_path, "--run-dir", str(world.run_dir), "--json"])
    assert ended.exit_code == 0, ended.output
    figures = json.loads(ended.stdout.splitlines()[-1])
    assert figures["capture"]["scored_samples"] == 0
    lines = [json.loads(line) for line in (world.run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in ("ce", "kl"):
        assert np.mean([line[name] for line in lines[-5:]]) < 0.8 * lines[0][name], name
    scores = figures["eval"]
    assert scores["student"]["unit"] == scores["teacher"]["unit"] == "byte"
    assert all(0 < scores["student"]["loss"][source] < np.log(300) for source in ("general", "domain"))
    exported = AutoModelForCausalLM.from_pretrained(world.run_dir / "student")
    assert Tokenizer.load(world.run_dir / "student").digest == Tokenizer.load(own).digest
    assert exported.config.vocab_size == Tokenizer.load(own).vocab_size
    assert "nats/byte" in (world.run_dir / "report.html").read_text()
