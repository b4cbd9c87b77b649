"""`lectern generate` with a teacher that is run here: real Ray, real DeepSpeed, the real command line."""

import json
import os
import signal
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.stages import generate_local as stage
from storage.tokenizer import Tokenizer
from tests.cluster.conftest import World
from tests.processes import own_processes
from tests.workers.tiny import tiny_model

PROMPTS = [f"the red lamp {word} {n}" for n, word in enumerate(["walks", "sings"] * 6)]


@pytest.fixture
def ready(world: World) -> World:
    """A world with a real random teacher and 12 prompts, two completions each."""
    vocab_size = Tokenizer.load(world.teacher).vocab_size
    tiny_model("qwen2", width=32, vocab_size=vocab_size + 8).save_pretrained(world.teacher)
    (world.folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    world.values["teacher"] = {"name": str(world.teacher), "dtype": "float32", "sharding": "none", "max_attempts": 2}
    world.values["generate"] = {
        "prompts": str(world.folder / "prompts.jsonl"), "url": str(world.folder / "made"), "samples": 2,
        "max_tokens": 8, "batch_tokens": 80, "filters": {"finished": False, "duplicate": False},
    }  # fmt: skip
    return world


def lectern(world: World, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["generate", world.config_path, "--run-dir", str(world.run_dir), *arguments])


def kept(world: World) -> list[dict[str, Any]]:
    files = sorted((world.folder / "made").glob("kept-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.slow
def test_writes_the_same_on_one_rank_and_on_two_and_goes_on_after_a_kill(
    ready: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = lectern(ready, "--json")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout.splitlines()[-1])
    assert (found["kept"], found["answered"], found["reused"], found["missing"]) == (24, 24, 0, 0)
    rows = kept(ready)
    assert [row["prompt"] for row in rows[::2]] == PROMPTS
    assert rows[0]["endpoint"] == "local" and rows[0]["model"] == str(ready.teacher)
    assert all(row["completion_tokens"] <= 8 for row in rows) and len({row["completion"] for row in rows}) > 12
    again = json.loads(lectern(ready, "--json").stdout.splitlines()[-1])
    assert (again["answered"], again["reused"]) == (0, 24)
    real = stage.write_missing

    def write_missing(plan: Any, *arguments: Any, **named: Any) -> Any:
        """Kill a rank once, after the second unit."""
        given = list(arguments)
        tell, done = given[5], []

        def on_event(event: dict[str, Any]) -> None:
            tell(event)
            if event["event"] == "unit_done":
                done.append(event)
                if len(done) == 2:
                    os.kill(own_processes("ray::WritingRank")[-1], signal.SIGKILL)

        given[5] = on_event
        return real(plan, *given, **named)

    monkeypatch.setattr(stage, "write_missing", write_missing)
    for sharding in ("zero3", "tensor_parallel"):
        ready.values["teacher"] |= {"sharding": sharding, "ranks": 2}
        ready.values["cache"]["url"] = str(ready.folder / sharding)
        ended = lectern(ready, "--json")
        assert ended.exit_code == 0, ended.output
        assert "replica lost" in ended.output
        assert json.loads(ended.stdout.splitlines()[-1])["answered"] == 24
        assert [row["completion"] for row in kept(ready)] == [row["completion"] for row in rows]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("generate.url=null", "generate.url is not set"),
        ("generate.prompts=null", "generate.prompts is not set"),
        ("teacher.name=./nowhere", "is no folder"),
        ("teacher.sharding=tensor_parallel teacher.ranks=3", "does not divide the 4 attention heads"),
        ("generate.stop=[a,b,c,d,e]", "generate.stop"),
    ],
)
def test_what_is_wrong_is_told_before_anything_starts(ready: World, change: str, text: str) -> None:
    ended = lectern(ready, *(part for setting in change.split(" t") for part in ("--set", _named(setting))))
    assert ended.exit_code == 2, ended.output
    assert text in ended.stderr.replace("\n", " ")


def test_a_plan_tells_what_would_be_written(ready: World) -> None:
    ready.values["data"]["sources"] = [{"name": "general", "path": str(ready.folder / "made" / "kept-*.parquet")}]
    ended = CliRunner().invoke(app, ["plan", ready.config_path, "--run-dir", str(ready.run_dir), "--json"])
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout.splitlines()[-1])["generate"] == {
        "prompts": 12, "completions": 24, "most_tokens": 192,
    }  # fmt: skip
    shown = CliRunner().invoke(app, ["plan", ready.config_path, "--run-dir", str(ready.run_dir)]).stdout
    assert "24 completions for 12 prompts" in shown and "they wait for the completions" in shown


def test_a_prompt_of_several_messages_needs_a_chat_template(ready: World) -> None:
    path = ready.teacher / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": None}))
    (ready.teacher / "chat_template.jinja").unlink(missing_ok=True)
    ended = lectern(ready, "--set", "generate.system=Be brief.")
    assert ended.exit_code == 2, ended.output
    assert "has no chat template" in ended.stderr.replace("\n", " ")


def _named(setting: str) -> str:
    return setting if setting.startswith(("generate", "teacher")) else f"t{setting}"
