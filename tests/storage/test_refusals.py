"""What a teacher refuses to score is kept with the dataset, found again, and damage to it is found."""

import json
from pathlib import Path
from typing import Any

import pytest

from storage.errors import IntegrityError
from storage.export import export_dataset
from storage.identity import DatasetIdentity
from storage.reader import Dataset
from storage.refusals import REFUSED_PREFIX, Refusals, record_refusals
from storage.union import DatasetUnion
from storage.verify import verify_dataset
from storage.writer import DatasetWriter

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))


@pytest.fixture
def identity(make_identity: Any) -> DatasetIdentity:
    found: DatasetIdentity = make_identity()
    return found


@pytest.fixture
def writer(tmp_path: Path, identity: DatasetIdentity, make_unit: Any) -> DatasetWriter:
    """A dataset of two samples."""
    made = DatasetWriter.create(str(tmp_path / "dataset"), identity)
    made.commit("u1", *make_unit(identity, 2, 0), attempt="a")
    return made


def keep(writer: DatasetWriter, setting: str, refused: dict[bytes, str]) -> None:
    record_refusals(writer.store, writer.info.fingerprint, setting, refused)


def test_refusals_are_found_again_by_setting_and_reason(writer: DatasetWriter) -> None:
    keep(writer, "local", {A: "not finite", B: "not finite"})
    keep(writer, "api", {C: "too long", A: "content filter"})
    keep(writer, "api", {})
    found = Refusals.read(writer.store, writer.info.fingerprint)
    assert found.mask([C, bytes(16), A]).tolist() == [True, False, True]
    assert found.under("local").mask([A, B, C]).tolist() == [True, True, False]
    assert found.under("local").reasons([A, B, C]) == {"not finite": 2}
    assert found.under("other").mask([A]).tolist() == [False]
    assert sorted(bytes(row) for row in found.sample_ids()) == [A, B, C]
    assert len(writer.store.list(REFUSED_PREFIX)) == 2


def test_the_same_refusals_make_one_file(writer: DatasetWriter) -> None:
    keep(writer, "local", {A: "r", B: "r"})
    keep(writer, "local", {B: "r", A: "r"})
    assert len(writer.store.list(REFUSED_PREFIX)) == 1


def test_a_sample_that_some_dataset_holds_is_not_refused(writer: DatasetWriter, tmp_path: Path) -> None:
    dataset = Dataset.open(writer.store.url)
    held = bytes(dataset.catalog.sample_ids[0])
    keep(writer, "local", {held: "r", A: "r"})
    union = DatasetUnion.open([writer.store.url])
    assert union.refused([B, held, A]).tolist() == [2]
    other = DatasetWriter.create(str(tmp_path / "other"), writer.info.identity)
    keep(other, "api", {B: "r"})
    both = DatasetUnion.open([writer.store.url, other.store.url])
    assert both.refused([B, held, A]).tolist() == [2], "another teacher's refusals are not this one's"
    reverse = DatasetUnion.open([other.store.url, writer.store.url])
    assert reverse.refused([B, held, A]).tolist() == [0]


def test_an_export_carries_them(writer: DatasetWriter, tmp_path: Path) -> None:
    keep(writer, "local", {A: "r"})
    export_dataset(Dataset.open(writer.store.url), str(tmp_path / "copy"))
    assert DatasetUnion.open([str(tmp_path / "copy")]).refused([A]).tolist() == [0]


@pytest.mark.parametrize("change", ["truncate", "edit", "foreign", "rename", "short id"])
def test_damage_is_found(writer: DatasetWriter, change: str) -> None:
    keep(writer, "local", {A: "r"})
    assert verify_dataset(writer.store.url).ok
    (key,) = writer.store.list(REFUSED_PREFIX)
    raw = writer.store.read(key)
    values = json.loads(raw)
    if change == "truncate":
        writer.store.write(key, raw[:-5])
    elif change == "edit":
        writer.store.write(key, raw.replace(b'"r"', b'"s"'))
    elif change == "rename":
        writer.store.delete(key)
        writer.store.write(f"{REFUSED_PREFIX}{'0' * 32}.json", raw)
    elif change == "foreign":
        writer.store.delete(key)
        record_refusals(writer.store, "f" * 64, "local", {A: "r"})
    else:
        values["reasons"]["r"] = ["ab"]
        writer.store.write(key, json.dumps(values).encode())
    report = verify_dataset(writer.store.url)
    assert len(report.problems) == 1 and "delete it" in report.problems[0]
    with pytest.raises(IntegrityError, match="damaged or was edited"):
        Refusals.read(writer.store, writer.info.fingerprint)
