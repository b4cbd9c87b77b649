"""`lectern generate` at the command line, against a server over real HTTP."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from tests.cluster.conftest import World
from tests.workers.api.endpoint import Endpoint, endpoint

KEY = "sk-canary-5d41402abc4b2a76"


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    with endpoint(key=KEY, reasoning=True) as running:
        yield running


@pytest.fixture
def ready(world: World, server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world whose teacher is behind the server; 20 prompts."""
    server.control(faults={}, balance=None, model="teacher", refuse="", key=KEY)
    monkeypatch.setenv("CANARY_KEY", KEY)
    prompts = [{"prompt": f"what is {n} plus {n}", "reference": str(2 * n)} for n in range(20)]
    (world.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    world.values["teacher"] = {
        "kind": "api",
        "api": {
            "base_url": server.url, "model": "teacher", "key_env": "CANARY_KEY", "attempt_timeout_s": 20,
            "prices": {"input": 1.0, "output": 2.0}, "max_wait_s": 0.1, "max_attempts": 3,
        },
    }  # fmt: skip
    world.values["budget"] = {"cap": 1.0}
    world.values["generate"] = {
        "prompts": str(world.folder / "prompts.jsonl"), "url": str(world.folder / "made"), "samples": 2,
        "max_tokens": 12, "filters": {"finished": False, "duplicate": False},
    }  # fmt: skip
    return world


def lectern(world: World, *arguments: str, command: str = "generate") -> Any:
    return CliRunner().invoke(app, [command, world.config_path, "--run-dir", str(world.run_dir), *arguments])


def rows(world: World, name: str) -> list[dict[str, Any]]:
    files = sorted((world.folder / "made").glob(f"{name}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_writes_completions_once_and_pays_once(ready: World, server: Endpoint) -> None:
    before = server.stats()["billed"]
    ended = lectern(ready, "--json")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout.splitlines()[-1])
    assert (found["kept"], found["answered"], found["reused"]) == (40, 40, 0)
    billed = server.stats()["billed"]
    assert found["cost"]["spent"] == pytest.approx(billed["money"] - before["money"], abs=1e-9)
    kept = rows(ready, "kept")
    assert [row["prompt"] for row in kept[:3]] == ["what is 0 plus 0"] * 2 + ["what is 1 plus 1"]
    thinking = next(row for row in kept if row["reasoning"])
    assert thinking["completion"] == f"<think>\n{thinking['reasoning']}\n</think>\n\n{thinking['answer']}"
    assert thinking["messages"][-1] == {"role": "assistant", "content": thinking["completion"]}
    files = {file.name: file.read_bytes() for file in (ready.folder / "made").iterdir()}
    # In another order and with other filters nothing is asked again.
    lines = (ready.folder / "prompts.jsonl").read_text().splitlines()
    (ready.folder / "prompts.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    ready.values["generate"]["filters"] = {"finished": False, "duplicate": False, "answer_chars": [1, 12]}
    ready.values["teacher"]["api"]["concurrency"] = 3
    again = json.loads(lectern(ready, "--json").stdout.splitlines()[-1])
    assert (again["answered"], again["reused"]) == (0, 40)
    assert again["kept"] + again["filtered"]["answer_chars"] == 40
    assert {row["filtered_by"] for row in rows(ready, "filtered")} == {"answer_chars"}
    assert server.stats()["billed"] == billed
    (ready.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    ready.values["generate"]["filters"] = {"finished": False, "duplicate": False}
    lectern(ready)
    assert {file.name: file.read_bytes() for file in (ready.folder / "made").iterdir()} == files


def test_a_cap_stops_with_exit_code_3_and_raising_it_goes_on(ready: World, server: Endpoint) -> None:
    ready.values["budget"] = {"cap_requests": 15}
    ended = lectern(ready)
    assert ended.exit_code == 3, ended.output
    assert "cap of 15 requests is reached" in ended.stderr
    assert len(rows(ready, "kept")) == 15
    ready.values["budget"] = {"cap_requests": 40}
    ended = lectern(ready, "--json")
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.stdout.splitlines()[-1])["answered"] == 25
    account = json.loads(lectern(ready, "--json", command="ledger").stdout.splitlines()[-1])
    assert account["total"]["attempts"] == 40


def test_refused_content_is_set_aside_with_its_reason(ready: World, server: Endpoint) -> None:
    server.control(refuse="7 plus")
    found = json.loads(lectern(ready, "--json").stdout.splitlines()[-1])
    ((reason, number),) = found["set_aside"].items()
    assert "content filter" in reason
    assert (number, found["kept"]) == (4, 36)


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ("teacher.api.key_env=NOT_SET", 2, "environment variable NOT_SET is not set"),
        ("teacher.api.model=other", 2, "it offers another-model, teacher"),
        ("teacher.api.prices=null", 2, "teacher.api.prices is not set: without prices nobody can tell"),
        ("budget.cap=0", 2, "budget.cap = 0: must be greater than 0"),
        ("budget.cap=null", 2, "costs money, and nothing is capped"),
        ("teacher.api.base_url=null", 2, "teacher.api.base_url is not set"),
        ("teacher.api.base_url=http://127.0.0.1:9/v1", 1, "40 requests got no answer"),
        ("generate.prompts=null", 2, "generate.prompts is not set"),
        ("generate.url=null", 2, "generate.url is not set"),
        ("generate.filters.checker=nowhere.to:be", 2, "cannot be imported"),
        ("generate.filters.format='['", 2, "is no regular expression"),
        ("teacher.api.context_tokens=9", 0, "exceed the context of 9 tokens"),
    ],
)
def test_bad_input_is_told_before_it_costs(ready: World, server: Endpoint, change: str, code: int, text: str) -> None:
    before = server.stats()["billed"]
    ended = lectern(ready, "--set", change)
    assert ended.exit_code == code, ended.output
    assert text in " ".join(ended.output.split())
    assert server.stats()["billed"] == before


@pytest.mark.parametrize(
    ("control", "code", "text"),
    [
        ({"key": "sk-another-one"}, 2, "the key in CANARY_KEY is not accepted"),
        ({"balance": 0.0}, 3, "wants to be paid first"),
    ],
)
def test_wrong_key_and_no_balance_stop_at_once(
    ready: World, server: Endpoint, control: Any, code: int, text: str
) -> None:
    server.control(**control)
    ended = lectern(ready)
    assert ended.exit_code == code, ended.output
    assert text in ended.stderr


@pytest.mark.slow
def test_the_key_is_nowhere(ready: World, server: Endpoint) -> None:
    """Neither on the terminal nor in any file, whatever went wrong."""
    shown = ""
    for settings in ({}, {"faults": {"500": 1.0}}, {"key": "sk-x"}, {"model": "gone"}, {"faults": {"cut": 1.0}}):
        server.control(**{"faults": {}, "key": KEY, "model": "teacher", **settings})
        ready.values["generate"]["temperature"] = 0.1 + len(shown) / 1e6
        arguments = [ready.config_path, "--run-dir", str(ready.run_dir), "--debug"]
        ended = CliRunner().invoke(app, ["generate", *arguments])
        shown += ended.output
    server.control(faults={}, key=KEY, model="teacher")
    command = [sys.executable, "-X", "dev", "-m", "cluster.cli", "generate", ready.config_path, "--debug"]
    done = subprocess.run(
        [*command, "--run-dir", str(ready.run_dir), "--set", "teacher.api.model=nothing"],
        capture_output=True, text=True, timeout=120, check=False, env=None,
    )  # fmt: skip
    shown += done.stdout + done.stderr
    assert "Traceback" in shown
    files = [file for file in ready.folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert KEY not in shown
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    assert not [file for file in files if KEY.encode()[4:] in file.read_bytes()]


def test_plan_tells_the_cost_and_asks_nothing(ready: World, server: Endpoint) -> None:
    before = server.stats()["billed"]
    ready.values["teacher"]["name"] = str(ready.teacher)
    ready.values["teacher"]["dtype"] = "bfloat16"
    ended = lectern(ready, "--json", command="plan")
    assert ended.exit_code == 0, ended.output
    api = json.loads(ended.stdout.splitlines()[-1])["api"]
    part = api["parts"]["generate"]
    assert (part["requests"], part["reused"]) == (40, 0)
    assert part["worst"] > part["expected"] > 0
    assert api["parts"]["capture"]["requests"] > 20
    assert api["worst"] == pytest.approx(part["worst"] + api["parts"]["capture"]["worst"], abs=1e-6)
    # Where the sources are what will be written, its cost is all that can be told.
    sources = ready.values["data"]["sources"]
    ready.values["data"]["sources"] = [{"name": "made", "path": str(ready.folder / "made" / "kept-*.parquet")}]
    ended = lectern(ready, command="plan")
    assert ended.exit_code == 0, ended.output
    assert "wait for the completions" in ended.stdout
    assert server.stats()["billed"] == before
    ready.values["data"]["sources"] = sources
    lectern(ready)
    part = json.loads(lectern(ready, "--json", command="plan").stdout.splitlines()[-1])["api"]["parts"]["generate"]
    assert (part["requests"], part["reused"]) == (0, 40)
