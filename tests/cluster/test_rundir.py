"""The run directory: events, done markers, the resolved config, the lock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.config import RunConfig
from cluster.loader import check_config
from cluster.rundir import EVENTS_KEY, RESOLVED_KEY, RunDir, stage_key
from storage.errors import InputError, IntegrityError


def make_config(**cache: object) -> RunConfig:
    return check_config(
        {
            "data": {"sources": [{"name": "general", "path": "embedded:general"}]},
            "cache": {"url": "here", **cache},
            "student": {"config": {"model_type": "qwen2"}},
        },
        "test",
    )


def test_events_are_one_json_object_a_line_with_their_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.event("stage_started", stage="prepare")
    run.event("unit_done", samples=3, name="x")
    lines = [json.loads(line) for line in (tmp_path / EVENTS_KEY).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["stage_started", "unit_done"]
    assert lines[1]["samples"] == 3
    assert all(line["time"].endswith("+00:00") for line in lines)


def test_events_of_an_object_store_are_kept_over_two_runs() -> None:
    url = "memory://run-events"
    for n in range(2):
        run = RunDir(url)
        run.event("tick", n=n)
        run.flush()
    assert [line["n"] for line in RunDir(url).lines(EVENTS_KEY)] == [0, 1]


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.event("a")
    with (tmp_path / EVENTS_KEY).open("a") as file:
        file.write('{"event": "b", "ti')
    assert [line["event"] for line in run.lines(EVENTS_KEY)] == ["a"]


def test_the_resolved_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = make_config(url=str(tmp_path / "cache"))
    run = RunDir(tmp_path / "run")
    run.write_config(config)
    values = yaml.safe_load((tmp_path / "run" / RESOLVED_KEY).read_text())
    assert check_config(values, "resolved") == config


def test_the_resolved_config_holds_no_secret(tmp_path: Path) -> None:
    config = make_config(url="https://user:hunter2@host/data?X-Amz-Signature=abcdef")
    run = RunDir(tmp_path)
    run.write_config(config)
    text = (tmp_path / RESOLVED_KEY).read_text()
    assert "hunter2" not in text and "abcdef" not in text
    assert "https://host/data" in text


def test_a_stage_is_done_for_its_inputs_only(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.result("evaluate", "k1") is None
    run.finish("evaluate", "k1", {"loss": 1.5})
    assert run.result("evaluate", "k1") == {"loss": 1.5}
    assert run.result("evaluate", "k2") is None
    assert run.result("evaluate") == {"loss": 1.5}


def test_a_damaged_done_marker_is_reported(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.store.write("stages/evaluate.json", b"{")
    with pytest.raises(IntegrityError, match=r"stages/evaluate\.json is damaged"):
        run.result("evaluate")


def test_stage_keys_depend_on_values_not_on_their_order() -> None:
    assert stage_key({"a": 1, "b": [2]}) == stage_key({"b": [2], "a": 1})
    assert stage_key({"a": 1}) != stage_key({"a": 2})
    assert stage_key([1], [2]) != stage_key([1, 2])


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    code = (
        "import sys; from cluster.rundir import RunDir\n"
        "with RunDir(sys.argv[1]).locked():\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"pid {holder.pid}"), RunDir(tmp_path).locked():
            pass
    finally:
        holder.kill()
        holder.wait()
    with RunDir(tmp_path).locked():
        pass


def test_a_run_directory_that_cannot_be_made_is_an_input_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(InputError), RunDir(blocked / "run").locked():
        pass
