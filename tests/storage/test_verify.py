"""Verify: a sound dataset passes, and any random damage is found by verify and by the reader."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import build_sound, damage_trial, found_by_reader, found_by_verify, rows_of

from storage.errors import IntegrityError
from storage.identity import DatasetIdentity
from storage.reader import Dataset
from storage.verify import verify_dataset
from storage.writer import DatasetWriter

TRIALS = 100


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, make_identity: Any, make_unit: Any) -> Path:
    """Return a dataset of three units, and one of another identity beside it."""
    top = tmp_path_factory.mktemp("verify")
    for name, identity in (("dataset", make_identity()), ("foreign", make_identity(weights="00" * 32))):
        writer = DatasetWriter.create(str(top / name), identity)
        for n in range(3):
            writer.commit(f"u{n}", *make_unit(identity, 2, n), attempt="a")
    return top / "dataset"


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    """Return a copy to damage."""
    return Path(shutil.copytree(sound, tmp_path / "dataset"))


def test_sound_dataset_passes_with_its_counts(sound: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = verify_dataset(str(sound), lambda done, total: steps.append((done, total)))
    assert (report.ok, report.problems, report.orphans) == (True, [], [])
    totals = Dataset.open(str(sound)).totals()
    assert (report.units, report.samples, report.rows) == (3, 6, 6)
    assert (report.tokens, report.supervised, report.bytes) == (totals.tokens, totals.supervised, totals.bytes)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert not found_by_reader(sound)


def test_orphans_are_named_but_are_no_problem(dataset: Path) -> None:
    (dataset / "data" / "u9-lost.parquet").write_bytes(b"half")
    report = verify_dataset(str(dataset))
    assert (report.ok, report.orphans) == (True, ["data/u9-lost.parquet"])


def test_all_problems_are_collected(dataset: Path) -> None:
    for n in (0, 2):
        key = json.loads((dataset / "manifest" / f"u{n}.json").read_text())["data_key"]
        (dataset / key).unlink()
    report = verify_dataset(str(dataset))
    assert report.units == 1
    assert len(report.problems) == 2
    assert all("run the capture again" in problem for problem in report.problems)


def test_rows_out_of_contract_are_found_though_every_hash_is_right(
    tmp_path: Path, make_identity: Callable[..., DatasetIdentity], make_unit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = make_identity()
    samples, targets = make_unit(identity)
    samples.tokens[3] = (samples.tokens[3] + 1) % 500
    with monkeypatch.context() as patch:
        patch.setattr("storage.codecs.plain.check_contract", lambda *_: None)
        DatasetWriter.create(str(tmp_path), identity).commit("u", samples, targets, attempt=1)
    report = verify_dataset(str(tmp_path))
    assert "sample ids that are not those of their tokens" in report.problems[0]


def test_missing_info_is_raised(dataset: Path) -> None:
    (dataset / "dataset.json").write_bytes(b"{}")
    with pytest.raises(IntegrityError, match=r"dataset\.json is damaged"):
        verify_dataset(str(dataset))


def test_any_random_damage_is_found(tmp_path: Path) -> None:
    sound = build_sound(tmp_path)
    truth = rows_of(sound)
    assert (len(truth), found_by_reader(sound), found_by_verify(sound)) == (8, False, False)
    outcomes: Counter[str] = Counter()
    for trial in range(TRIALS):
        what, outcome, verified = damage_trial(sound, tmp_path / "copy", truth, trial)
        assert verified, f"trial {trial}: verify missed {what}"
        spare = "manifest/u2" in what or "index/00000001" in what
        assert outcome == "found" or (outcome == "unaffected" and spare), f"trial {trial}: {outcome} after {what}"
        outcomes[outcome] += 1
    assert outcomes["found"] > TRIALS / 2


def test_a_lost_record_makes_its_unit_missing_not_wrong(dataset: Path) -> None:
    (dataset / "manifest" / "u1.json").unlink()
    report = verify_dataset(str(dataset))
    assert (report.ok, report.units, len(report.orphans)) == (True, 2, 1)
