"""Capture through an endpoint that scores prompts: real HTTP, real Ray, the real command line."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from storage.reader import Dataset
from storage.tokenizer import Tokenizer
from tests.cluster.conftest import TOP_K, World
from tests.workers.api.endpoint import endpoint

pytestmark = pytest.mark.slow

KEY = "sk-canary-0123456789abcdef"


def vocabulary(world: World) -> list[str]:
    """Token strings as the server would give them: no two tokens share one."""
    tokenizer = Tokenizer.load(world.teacher)
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]


def configure(world: World, url: str, **values: Any) -> None:
    world.values["teacher"] = {
        "kind": "api", "name": str(world.teacher), "dtype": "bfloat16", "max_attempts": 2,
        "api": {
            "base_url": url, "model": "teacher", "key_env": "CANARY_KEY", "attempt_timeout_s": 10, "max_wait_s": 0.2,
            "prices": {"input": 1.0, "output": 2.0},
        },
    }  # fmt: skip
    world.values["cache"] |= {"unit_tokens": 700}
    world.values["budget"] = {"cap": 1.0}
    world.values["cluster"] = {"num_cpus": 1}
    for path, value in values.items():
        section, _, key = path.partition("__")
        world.values[section][key] = value


def lectern(world: World, command: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, [command, world.config_path, "--run-dir", str(world.run_dir), *arguments])


def last(ended: Any) -> Any:
    return json.loads(ended.stdout.splitlines()[-1])


def expected(before: int, token: int, vocab_size: int) -> tuple[list[int], float]:
    """The server's distribution: chances 1/2, 1/4, …; see `faulty_server.Server._top`."""
    top = [(before * 7 + j * 13 + 1) % vocab_size for j in range(20)]
    own = math.log(0.5 ** (top.index(token) + 1)) if token in top else math.log(1e-9)
    return top[:TOP_K], own


def check_targets(world: World) -> None:
    dataset = Dataset.open(world.config.cache.url)
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    vocab_size = Tokenizer.load(world.teacher).vocab_size
    position = 0
    ids = targets.id.reshape(-1, TOP_K)
    for n in range(len(samples)):
        sample = samples.sample(n)
        own = []
        for place in np.flatnonzero(sample.supervised):
            top, logprob = expected(int(sample.tokens[place - 1]), int(sample.tokens[place]), vocab_size)
            assert ids[position].tolist() == top
            own.append(logprob)
            position += 1
        assert targets.teacher_nll[n] == pytest.approx(-np.mean(own), rel=1e-4)
    assert np.allclose(np.exp(targets.logprob.astype(float)).reshape(-1, TOP_K), [0.5, 0.25, 0.125, 0.0625], atol=2e-3)
    assert np.allclose(targets.tail_mass.astype(float), 0.0625, atol=2e-3)


@pytest.mark.parametrize("method", ["prompt_logprobs", "echo"])
def test_scores_prompts_with_faults_a_cap_and_resumes(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("CANARY_KEY", KEY)
    shares = dict.fromkeys(("429", "500", "cut", "truncated", "null", "counts", "no-usage"), 0.05)
    settings: dict[str, Any] = {"key": KEY, "vocab": vocabulary(world), "prompt_logprobs": 20, "faults": {}}
    if method == "echo":
        settings["prompt_logprobs"] = 0
    with endpoint(**settings) as server:
        configure(world, server.url)
        world.values["budget"] = {"cap_requests": 12}
        server.control(faults=shares)
        ended = lectern(world, "capture")
        assert ended.exit_code == 3, ended.output
        assert "cap of 12 requests is reached" in ended.stderr
        assert "gives: prompt scoring" in ended.stdout
        part = len(Dataset.open(world.config.cache.url).catalog)
        assert 0 < part <= 12
        world.values["budget"] = {"cap": 1.0}
        ended = lectern(world, "capture", "--json")
        assert ended.exit_code == 0, ended.output
        assert last(ended)["capture"]["reused_samples"] == part
        check_targets(world)
        stats = server.stats()
        account = last(lectern(world, "ledger", "--json"))["total"]
        assert stats["billed"]["money"] <= account["used"] <= 1.0
        assert max(stats["good"].values()) == 1
        again = lectern(world, "capture", "--json")
        assert last(again)["capture"]["scored_samples"] == 0
        assert server.stats()["billed"] == stats["billed"]
    events = Path(world.run_dir / "events.jsonl").read_text()
    assert '"event": "probed"' in events
    for file in world.folder.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_a_refused_sample_is_left_out_by_every_command(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", KEY)
    samples = world.samples()
    row = int(samples.rows("train", "general")[0])
    first_ids = json.dumps(samples.read([row]).sample(0).tokens[:8].tolist()).rstrip("]")
    with endpoint(key=KEY, vocab=vocabulary(world), prompt_logprobs=20, refuse=first_ids) as server:
        configure(world, server.url)
        ended = lectern(world, "capture", "--json")
        assert ended.exit_code == 0, ended.output
        assert "1 samples are left out: the teacher refuses them" in ended.output
        found = last(ended)["capture"]
        assert list(found["last"]["refused"].values()) == [1]
        asked = server.stats()["asked"]
        again = last(lectern(world, "capture", "--json"))["capture"]
        assert (again["scored_samples"], again["reused_samples"]) == (0, found["scored_samples"])
        assert server.stats()["asked"] == asked
    plan = last(lectern(world, "plan", "--json"))
    assert (plan["missing_samples"], plan["refused_samples"]) == (0, 1)
    (reason,) = last(lectern(world, "inspect", "--json"))["refused"]
    assert reason in lectern(world, "inspect").stdout.replace("\n", " ")
    world.values["student"]["config"] |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    ended = lectern(world, "train", "--json")
    assert ended.exit_code == 0, ended.output
    assert "1 training samples are left out" in ended.output
    assert lectern(world, "evaluate", "--json").exit_code == 0
    assert last(lectern(world, "report", "--json"))["cache"]["refused"] == {reason: 1}


def test_what_an_endpoint_cannot_do_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", KEY)
    with endpoint(key=KEY, vocab=vocabulary(world), prompt_logprobs=0, echo=False, top_logprobs=5) as server:
        configure(world, server.url)
        ended = lectern(world, "capture")
        assert ended.exit_code == 2, ended.output
        assert "gives: generation logprobs" in ended.stdout
        assert "no scoring of prompts by echo" in ended.stdout
        assert "scores no prompts" in ended.stderr
        billed = server.stats()["billed"]
        world.values["teacher"]["require"] = "prompt_scoring"
        ended = lectern(world, "capture")
        assert "teacher.require is prompt_scoring" in ended.stderr
        assert server.stats()["billed"] == billed, "the probe is kept"
        world.values["cache"]["kind"] = "hybrid"
        ended = lectern(world, "capture")
        assert "set cache.kind to topk (or text)" in ended.stderr
        world.values["cache"] |= {"kind": "text", "url": str(world.folder / "text")}
        world.values["cache"].pop("top_k")
        world.values["train"]["loss"] = {"kl": 0.0, "ce": 1.0}
        ended = lectern(world, "capture", "--json")
        assert ended.exit_code == 0, ended.output
        assert last(ended)["capture"]["scored_samples"] > 20
        assert server.stats()["billed"] == billed


def test_another_tokenizer_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_KEY", KEY)
    with endpoint(key=KEY, vocab=vocabulary(world), id_shift=3, prompt_logprobs=0) as server:
        configure(world, server.url)
        ended = lectern(world, "capture")
        assert ended.exit_code == 2, ended.output
        assert "other tokens came back than were sent" in ended.output
