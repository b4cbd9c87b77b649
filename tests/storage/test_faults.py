"""Faults: a process that ends between any two steps, and requests that fail; afterwards every row is there, once."""

import random
from pathlib import Path

import pytest
from trials import end_at_step, faulty_store, identity, live, make_units, num_steps, race, wrong_rows

from storage.object_store import Store
from storage.writer import DatasetWriter

NUM_RACES = 6


def test_a_process_may_end_between_any_two_steps(tmp_path: Path) -> None:
    units = make_units(identity(), 3)
    steps = num_steps(tmp_path / "counted", units)
    assert steps >= 10
    for step in range(1, steps + 1):
        url = tmp_path / f"ended{step}"
        end_at_step(url, units, step, after=step % 2 == 0, sigkill=step % 5 == 0)
        live(Store(url), units, attempt=2)
        assert wrong_rows(str(url), units) == [], f"step {step}"


def test_every_fifth_request_fails_while_writers_and_compactors_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.object_store.wait_random_exponential", lambda **_: lambda _state: 0.0)
    units = make_units(identity(), 3)
    for trial in range(NUM_RACES):
        url, rng = tmp_path / f"race{trial}", random.Random(trial)
        DatasetWriter.create(str(url), identity())
        race(lambda url=url, rng=rng: faulty_store(url, 0.2, rng), units, rng)  # type: ignore[misc]
        assert wrong_rows(str(url), units) == [], f"trial {trial}"
