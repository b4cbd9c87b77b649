"""From prompts to targets through an endpoint that scores no prompts: its own text, with its own log-probabilities."""

import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from storage.reader import Dataset
from storage.tokenizer import Tokenizer
from storage.verify import verify_dataset
from tests.cluster.conftest import TOP_K, World
from tests.workers.api.endpoint import endpoint


def lectern(world: World, command: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, [command, world.config_path, "--run-dir", str(world.run_dir), *arguments])


def configure(world: World, url: str) -> None:
    lines = [json.dumps({"prompt": f"what is {n} plus {n}"}) + "\n" for n in range(30)]
    (world.folder / "prompts.jsonl").write_text("".join(lines))
    made = str(world.folder / "made")
    world.values["data"]["sources"] = [{"name": "made", "path": f"{made}/kept-*.parquet", "tokens_field": "tokens"}]
    world.values["data"]["window_tokens"] = 128
    world.values["student"]["config"]["max_position_embeddings"] = 128
    world.values["teacher"] = {
        "kind": "api", "name": str(world.teacher), "dtype": "bfloat16",
        "api": {
            "base_url": url, "model": "teacher", "key_env": "TEACHER_KEY", "attempt_timeout_s": 20, "max_wait_s": 0.1,
            "prices": {"input": 1.0, "output": 2.0}, "extra_body": {"return_tokens_as_token_ids": True},
        },
    }  # fmt: skip
    world.values["budget"] = {"cap": 1.0}
    world.values["generate"] = {
        "prompts": str(world.folder / "prompts.jsonl"), "url": made, "max_tokens": 10, "logprobs": 5,
        "filters": {"finished": False, "duplicate": False},
    }  # fmt: skip


def test_targets_are_the_endpoints_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-right")
    vocab_size = Tokenizer.load(world.teacher).vocab_size
    vocab = [Tokenizer.load(world.teacher).decode([i]) for i in range(vocab_size)]
    with endpoint(vocab=vocab, prompt_logprobs=0, echo=False, top_logprobs=5) as server:
        configure(world, server.url)
        ended = lectern(world, "generate", "--json")
        assert ended.exit_code == 0, ended.output
        assert json.loads(ended.stdout.splitlines()[-1])["kept"] == 30
        asked = sum(server.stats()["asked"].values())
        ended = lectern(world, "capture", "--json")
        assert ended.exit_code == 0, ended.output
        assert "targets come from the log-probabilities of 30 completions" in ended.output
        assert sum(server.stats()["asked"].values()) - asked < 10, "more than the probe was asked"
    dataset = Dataset.open(world.config.cache.url)
    assert verify_dataset(world.config.cache.url).ok
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    assert json.loads(ended.stdout.splitlines()[-1])["capture"]["scored_samples"] == len(samples) > 5
    flat = np.flatnonzero(samples.supervised)
    follows = samples.supervised[flat - 1]  # the server's first token comes of the words of the prompt
    before = samples.tokens[flat - 1].astype(np.int64)
    wanted = (before[:, None] * 7 + np.arange(TOP_K) * 13 + 1) % vocab_size
    assert follows.mean() > 0.7
    np.testing.assert_array_equal(targets.id.reshape(-1, TOP_K)[follows], wanted[follows])
    chances = np.exp(targets.logprob.astype(float)).reshape(-1, TOP_K)
    assert np.allclose(chances, [0.5, 0.25, 0.125, 0.0625], atol=2e-3)
    assert np.allclose(targets.tail_mass.astype(float), 0.0625, atol=2e-3)


def test_what_is_lacking_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-right")
    with endpoint(prompt_logprobs=0, echo=False, top_logprobs=5) as server:
        configure(world, server.url)
        world.values["data"]["sources"] = [{"name": "general", "path": str(world.folder / "general.jsonl")}]
        ended = lectern(world, "capture")
        assert ended.exit_code == 2 and "holds no completion with its tokens" in ended.stderr.replace("\n", " ")
        ended = lectern(world, "capture", "--set", "generate.logprobs=null")
        assert ended.exit_code == 2 and "with generate.logprobs set" in ended.stderr.replace("\n", " ")
        ended = lectern(world, "generate", "--set", "teacher.name=embedded")
        assert ended.exit_code == 2 and "needs the teacher's tokenizer" in ended.stderr.replace("\n", " ")
        ended = lectern(world, "generate", "--set", "teacher.kind=local")
        assert ended.exit_code == 2 and "`lectern capture` scores here" in ended.stderr.replace("\n", " ")
