"""Local replicas and an endpoint on one queue, from the command line: real Ray, real HTTP, one dataset."""

import json
from collections import Counter
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from storage.reader import Dataset
from storage.tokenizer import Tokenizer
from storage.verify import verify_dataset
from tests.cluster.conftest import TOP_K, World
from tests.workers.api.endpoint import endpoint
from tests.workers.tiny import tiny_model
from workers.config import TeacherConfig
from workers.dispatch import Dispatcher
from workers.mixed import mixed_kinds
from workers.policy import FleetPolicy
from workers.resources import Machines


def lectern(world: World, command: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, [command, world.config_path, "--run-dir", str(world.run_dir), *arguments])


def configure(world: World, url: str) -> list[str]:
    """Make the world's teacher a real one that an endpoint seems to serve too; returns the server's vocabulary."""
    tokenizer = Tokenizer.load(world.teacher)
    tiny_model("qwen2", width=32, vocab_size=tokenizer.vocab_size + 8).save_pretrained(world.teacher)
    world.values["teacher"] = {
        "kind": "mixed", "name": str(world.teacher), "dtype": "float32", "sharding": "none", "max_attempts": 2,
        "api": {
            "base_url": url, "model": "teacher", "key_env": "TEACHER_KEY", "attempt_timeout_s": 20, "max_attempts": 2,
            "max_wait_s": 0.1, "prices": {"input": 1.0, "output": 2.0}, "concurrency": 2,
        },
    }  # fmt: skip
    world.values["cache"] |= {"unit_tokens": 200}
    world.values["budget"] = {"cap": 1.0}
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]


@pytest.mark.slow
def test_both_work_and_what_a_cap_leaves_is_done_here(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-right")
    with endpoint(prompt_logprobs=20, delay_s=0.8) as server:  # slower than the local replica takes to start
        vocab = configure(world, server.url)
        server.control(vocab=vocab)
        ended = lectern(world, "capture", "--json")
        assert ended.exit_code == 0, ended.output
        events = [json.loads(line) for line in (world.run_dir / "events.jsonl").read_text().splitlines()]
        by = Counter(event["by"] for event in events if event["event"] == "unit_done")
        assert min(by["local"], by["api"]) > 0, by
        check(world)
        account = json.loads(lectern(world, "ledger", "--json").stdout.splitlines()[-1])["total"]
        assert account["used"] == pytest.approx(server.stats()["billed"]["money"], abs=1e-9) and account["used"] > 0
        world.values["cache"]["url"] = str(world.folder / "capped")
        world.values["budget"] = {"cap_requests": 8}
        ended = lectern(world, "capture", "--json")
        assert ended.exit_code == 0, ended.output
        check(world)


def check(world: World) -> None:
    """Every row is there once, and each is the endpoint's (chances 1/2, 1/4, …) or the local teacher's."""
    assert verify_dataset(world.config.cache.url).ok
    dataset = Dataset.open(world.config.cache.url)
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    assert dataset.catalog.num_duplicates == 0 and len(samples) > 40
    assert dataset.identity.teacher.parameters > 0
    firsts = targets.logprob.reshape(-1, TOP_K)[:, 0].astype(float)
    from_api = abs(firsts - -0.693) < 2e-3
    assert 0 < from_api.mean() < 1


def test_the_cheaper_kind_is_filled_first() -> None:
    teacher = TeacherConfig.model_validate(
        {"kind": "mixed", "api": {"prices": {"input": 1.0, "output": 2.0}}, "replicas": 2}
    )
    for price, rate, first in ((0.0, 100.0, "local"), (3.6, 10_000.0, "local"), (36.0, 1_000.0, "api")):
        kinds = mixed_kinds(teacher, Machines(price_per_hour=price), rate)
        assert Dispatcher([], 0, kinds, FleetPolicy()).kinds[0].name == first, (price, rate)
    assert [kind.max for kind in mixed_kinds(teacher, Machines(), None)] == [2, 1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("cache.kind=hybrid", "set cache.kind to topk"),
        ("cache.attention=[model.layers.0]", "teacher.kind mixed scores text here and through an endpoint"),
        ("teacher.api.base_url=null", "teacher.api.base_url is not set"),
        ("teacher.name=embedded", "teacher.kind mixed; name the folder"),
    ],
)
def test_what_does_not_go_together_is_told(world: World, change: str, text: str) -> None:
    configure(world, "http://127.0.0.1:9/v1")
    ended = lectern(world, "capture", "--set", change)
    assert ended.exit_code == 2, ended.output
    assert text in ended.stderr.replace("\n", " ")


def test_generation_asks_one_teacher(world: World) -> None:
    configure(world, "http://127.0.0.1:9/v1")
    ended = lectern(world, "generate")
    assert ended.exit_code == 2 and "set teacher.kind to local or api" in ended.stderr.replace("\n", " ")
