"""The commands that keep a dataset small and tidy, run in this process as the command line runs them."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from cluster import maintenance
from cluster.commands import verify
from cluster.terminal import Terminal
from storage.reader import Dataset
from tests.cluster.conftest import World

Command = Callable[[Terminal], dict[str, Any]]
Call = Callable[[Command], dict[str, Any]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command; return its JSON with the exit code and all text as `code` and `text`."""

    def run(command: Command) -> dict[str, Any]:
        code = Terminal(True, False).run(command)
        text = capsys.readouterr()
        last = json.loads(text.out.splitlines()[-1]) if text.out else {}
        return {**last, "code": code, "text": text.out + text.err}

    return run


def test_compact_folds_all_units_once(world: World, call: Call) -> None:
    world.capture()
    found = call(lambda out: maintenance.compact(out, world.config_path, [], None))
    assert (found["code"], found["generation"], found["units"], found["added"]) == (0, 1, 2, 2)
    again = call(lambda out: maintenance.compact(out, world.values["cache"]["url"], [], None))
    assert (again["code"], again["added"]) == (0, 0)
    assert "index generation 1: 2 units" in again["text"] and "nothing to add" in again["text"]


def test_gc_says_what_goes_and_how_much(world: World, call: Call) -> None:
    world.capture()
    orphan = world.folder / "cache" / "data" / "u9-1-aa.parquet"
    orphan.write_bytes(b"12345")
    os.utime(orphan, (1e9, 1e9))
    tried = call(lambda out: maintenance.gc(out, world.config_path, [], None, "24h", True))
    assert (tried["code"], tried["objects"], tried["bytes"]) == (0, 1, 5)
    assert "would remove data/u9-1-aa.parquet (data without record, 5 B)" in tried["text"]
    assert orphan.exists()
    done = call(lambda out: maintenance.gc(out, world.config_path, [], None, "24h", False))
    assert "1 objects, 5 B, older than 24h removed; 0 younger ones left alone" in done["text"]
    assert not orphan.exists()


def test_an_age_is_a_number_and_a_unit(world: World, call: Call) -> None:
    assert [maintenance.seconds(age) for age in ("30s", "1.5m", "24h", "7d")] == [30, 90, 86_400, 604_800]
    found = call(lambda out: maintenance.gc(out, world.config_path, [], None, "soon", False))
    assert found["code"] == 2 and "'soon' is no age" in found["text"]


def test_repair_drops_what_is_damaged_and_nothing_else(world: World, call: Call) -> None:
    world.capture()
    url = world.values["cache"]["url"]
    call(lambda out: maintenance.compact(out, url, [], None))
    lost, kept = Dataset.open(url).manifests
    (world.folder / "cache" / lost.data_key).write_bytes(b"PAR1")
    found = call(lambda out: verify(out, url, [], None, repair=True))
    assert (found["code"], found["damaged_units"]) == (2, [lost.unit])
    assert "1 damaged units dropped; run the capture" in found["text"]
    assert call(lambda out: verify(out, url, [], None))["code"] == 0
    assert [record.unit for record in Dataset.open(url).manifests] == [kept.unit]
