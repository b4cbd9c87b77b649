"""Commit records and the catalog: nothing foreign or altered gets in, and everyone finds the same row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.catalog import Catalog
from storage.committed import read_records
from storage.errors import InputError, IntegrityError
from storage.identity import DatasetIdentity
from storage.index import Index
from storage.info import RELEASE, read_info
from storage.manifest import ManifestRecord
from storage.object_store import Store
from storage.reader import Dataset
from storage.shard import read_shard
from storage.verify import verify_dataset
from storage.writer import DatasetWriter

MakeIdentity = Callable[..., DatasetIdentity]


@pytest.fixture
def dataset(tmp_path: Path, make_identity: MakeIdentity, make_unit: Callable[..., Any]) -> Path:
    """Return a dataset of two units."""
    identity = make_identity()
    writer = DatasetWriter.create(str(tmp_path), identity, 512)
    for n in range(2):
        writer.commit(f"u{n}", *make_unit(identity, seed=n), attempt="a")
    return tmp_path


def _record(dataset: Path, unit: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((dataset / "manifest" / f"{unit}.json").read_text())
    return fields


def _rewrite(dataset: Path, changes: dict[str, Any]) -> None:
    fields = _record(dataset, "u0") | changes
    (dataset / "manifest" / "u0.json").write_text(json.dumps(fields))


def test_layout_and_fields_are_those_of_the_design(dataset: Path) -> None:
    record = _record(dataset, "u0")
    assert set(record) == {
        *("unit", "data_key", "bytes", "sha256", "rows", "tokens"),
        *("sample_ids_digest", "fingerprint", "attempt", "created_at"),
    }
    assert record["data_key"] == f"data/u0-{record['attempt']}.parquet"
    assert (dataset / record["data_key"]).stat().st_size == record["bytes"]
    assert sorted(path.name for path in dataset.iterdir()) == ["data", "dataset.json", "manifest"]
    info = json.loads((dataset / "dataset.json").read_text())
    assert info["codec"] == "plain"
    assert info["schema_version"] == 2
    assert info["created_by"] == f"lectern {RELEASE}"
    assert info["tokenizer"] == {"vocab_size": 500, "padded_vocab_size": 512}


def test_release_is_that_of_the_distribution() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{RELEASE}"\n' in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_key": "../../etc/passwd"}, r"data_key '../../etc/passwd' is not the key of its unit"),
        ({"data_key": "/etc/passwd"}, "is not the key of its unit and attempt inside the dataset"),
        ({"data_key": "s3://other/x"}, "is not the key of its unit and attempt inside the dataset"),
        ({"data_key": "data/u1-a.parquet"}, "is not the key of its unit and attempt inside the dataset"),
        ({"unit": "u9"}, "it is the record of unit 'u9', which is not its name"),
        ({"rows": 7}, "do not match the checksum"),
        ({"created_at": "2020-01-01T00:00:00.000000+00:00"}, "do not match the checksum"),
        ({"fingerprint": "00" * 16}, "do not match the checksum"),
        ({"sha256": "xyz"}, "sha256: String should match pattern"),
        ({"bytes": -1}, "bytes: Input should be greater"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({}, "not in the form it was written in"),
    ],
)
def test_altered_record_is_refused_with_its_key_and_the_remedy(
    dataset: Path, changes: dict[str, Any], message: str
) -> None:
    _rewrite(dataset, changes)
    with pytest.raises(IntegrityError, match=message) as caught:
        Dataset.open(str(dataset))
    assert str(dataset / "manifest" / "u0.json") in str(caught.value)
    assert "delete it and run the capture again" in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_record_that_is_no_json_object_is_refused(dataset: Path, raw: bytes) -> None:
    (dataset / "manifest" / "u0.json").write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"u0\.json is damaged or was edited"):
        Dataset.open(str(dataset))


def test_record_under_another_name_is_refused(dataset: Path) -> None:
    (dataset / "manifest" / "u0.json").rename(dataset / "manifest" / "u5.json")
    with pytest.raises(IntegrityError, match=r"u5\.json is damaged .* record of unit 'u0', which is not its name"):
        Dataset.open(str(dataset))


def test_record_of_another_dataset_is_refused(dataset: Path, make_identity: MakeIdentity, make_unit: Any) -> None:
    other = make_identity(weights="00" * 32)
    writer = DatasetWriter.create(str(dataset / "other"), other)
    writer.commit("u7", *make_unit(other, seed=7), attempt="a")
    record = json.loads((dataset / "other" / "manifest" / "u7.json").read_text())
    for name in ("manifest/u7.json", record["data_key"]):
        (dataset / "other" / name).rename(dataset / name)
    with pytest.raises(IntegrityError, match=f"fingerprint {other.fingerprint} is not that of the dataset"):
        Dataset.open(str(dataset))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digest": "0" * 32}, "its 6 sample ids are not the 6 of its manifest"),
        ({"rows": 7}, "its 6 sample ids are not the 7 of its manifest"),
        ({"tokens": 3}, r"it holds \d+ tokens, its manifest says 3"),
        ({"sha256": "0" * 64}, "its SHA-256 is not the one in its manifest"),
        ({"size_bytes": 9}, "its manifest says 9"),
    ],
)
def test_record_out_of_step_with_its_file_is_refused(dataset: Path, changes: dict[str, Any], message: str) -> None:
    found = read_records(Store(dataset), read_info(Store(dataset)))[0]
    fields = {"unit": "u0", "attempt": "b", "size_bytes": found.bytes, "sha256": found.sha256, "rows": found.rows}
    fields |= {"tokens": found.tokens, "digest": found.sample_ids_digest, "fingerprint": found.fingerprint}
    forged = ManifestRecord.seal(**fields | changes)
    (dataset / found.data_key).rename(dataset / forged.data_key)
    (dataset / forged.key).write_bytes(forged.to_json())
    with pytest.raises(IntegrityError, match=message):
        read_shard(Store(dataset), forged)
    assert not verify_dataset(str(dataset)).ok
    if "tokens" not in changes and "sha256" not in changes:
        with pytest.raises(IntegrityError, match=r"u0-b-.*run the capture again"):
            Dataset.open(str(dataset))


def test_hidden_files_of_desktops_are_passed_over(dataset: Path) -> None:
    (dataset / "manifest" / ".DS_Store").write_bytes(b"\0")
    assert len(Dataset.open(str(dataset)).manifests) == 2


def test_unit_and_attempt_must_fit_into_a_key(dataset: Path, make_identity: MakeIdentity, make_unit: Any) -> None:
    writer = DatasetWriter.open(str(dataset), make_identity())
    unit = make_unit(make_identity(), seed=3)
    with pytest.raises(IntegrityError, match="leads outside"):
        writer.commit("../u", *unit, attempt="a")
    for unit_id, attempt in ((".u", "a"), ("u/v", "a"), ("u", "a/b"), ("u", "")):
        with pytest.raises(IntegrityError, match="cannot be part of a key"):
            writer.commit(unit_id, *unit, attempt=attempt)
    assert len(list(dataset.rglob("*.parquet"))) == 2


def test_attempts_with_one_name_never_share_a_data_key() -> None:
    fields = {"unit": "u", "attempt": "a", "size_bytes": 1, "rows": 1, "tokens": 2}
    fields |= {"digest": "0" * 32, "fingerprint": "f", "sha256": "0" * 64}
    keys = {ManifestRecord.seal(**fields | {"sha256": f"{n:064x}"}).data_key for n in range(10)}
    assert len(keys) == 10


def test_newer_schema_is_refused_with_the_release_that_reads_it(dataset: Path) -> None:
    fields = json.loads((dataset / "dataset.json").read_text())
    fields |= {"schema_version": 3, "created_by": "lectern 3.1.4", "something": "new"}
    (dataset / "dataset.json").write_text(json.dumps(fields))
    with pytest.raises(
        InputError, match=r"schema version 3, .*reads versions up to 2: install lectern 3\.1\.4 or newer"
    ):
        Dataset.open(str(dataset))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"padded_vocab_size": 512', '"padded_vocab_size": 513'),
        ("bfloat16", "float32"),
        ("plain", "other"),
        ("{", " {"),
    ],
)
def test_altered_dataset_json_is_refused(dataset: Path, old: str, new: str) -> None:
    path = dataset / "dataset.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(IntegrityError, match=r"dataset\.json is damaged or was edited.*restore it from a copy"):
        read_info(Store(dataset))


def test_missing_dataset_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no dataset at .*nowhere: dataset\.json is missing; capture it first"):
        Dataset.open(str(tmp_path / "nowhere"))


def _bare_record(unit: str, rows: int) -> ManifestRecord:
    fields = {"unit": unit, "attempt": "a", "size_bytes": 1, "rows": 1, "tokens": 2}
    fields |= {"digest": "0" * 32, "fingerprint": "f", "sha256": "0" * 64}
    return ManifestRecord.seal(**fields).model_copy(update={"rows": rows})  # type: ignore[arg-type]


# Few distinct bytes make equal halves of different ids, which hashes hardly ever have.
ids_strategy = st.lists(st.lists(st.sampled_from([b"\0", b"\1", b"\xff"]), min_size=2, max_size=2), max_size=8)


@given(units=st.lists(ids_strategy, max_size=5))
def test_catalog_finds_the_first_of_equal_ids(units: list[list[list[bytes]]]) -> None:
    ids = [[high * 8 + low * 8 for high, low in unit] for unit in units]
    flat = np.frombuffer(b"".join(b"".join(unit) for unit in ids), dtype=np.uint8).reshape(-1, 16)
    records = [_bare_record(f"u{n}", len(unit)) for n, unit in enumerate(units)]
    catalog = Catalog(Index(records, np.zeros(len(units), dtype=np.int64), flat))
    expected: dict[bytes, tuple[int, int]] = {}
    for n, unit in enumerate(ids):
        for row, sample_id in enumerate(unit):
            expected.setdefault(sample_id, (n, row))
    asked = [a * 8 + b * 8 for a in (b"\0", b"\1", b"\2", b"\xff") for b in (b"\0", b"\1", b"\2", b"\xff")]
    found = list(zip(*(part.tolist() for part in catalog.find(asked)), strict=True))
    assert found == [expected.get(sample_id, (-1, -1)) for sample_id in asked]
    assert len(catalog) == len(expected)
    assert [row.tobytes() for row in catalog.sample_ids] == list(expected)
    assert catalog.num_duplicates == sum(map(len, ids)) - len(expected)


def test_records_are_sorted_oldest_first(dataset: Path, make_identity: MakeIdentity, make_unit: Any) -> None:
    identity = make_identity()
    DatasetWriter.open(str(dataset), identity).commit("a-later-unit", *make_unit(identity, seed=9), attempt="a")
    records = read_records(Store(dataset), read_info(Store(dataset)))
    assert [record.unit for record in records] == ["u0", "u1", "a-later-unit"]
