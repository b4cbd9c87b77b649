"""Compaction: one index instead of many manifests; nothing that a reader sees changes, whatever happens."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_faults import CountingStore, Killed, SteppedStore

from storage import compaction
from storage.catalog import Catalog
from storage.compaction import COMPACT_UNITS, compact, compact_if_due, drop_units, is_due
from storage.errors import InputError, IntegrityError
from storage.identity import DatasetIdentity
from storage.index import EMPTY, Index, decode_index, encode_index
from storage.info import INFO_KEY, read_info
from storage.manifest import ManifestRecord
from storage.object_store import Store
from storage.reader import Dataset
from storage.verify import verify_dataset
from storage.writer import DatasetWriter

GOLDEN = Path(__file__).parent / "golden" / "version1"
NUM_UNITS = 5


@pytest.fixture
def identity(make_identity: Callable[..., DatasetIdentity]) -> DatasetIdentity:
    """Return an identity with few tokens, so that units are small."""
    return make_identity(vocab_size=60)


@pytest.fixture
def sound(tmp_path: Path, identity: DatasetIdentity, make_unit: Any) -> Path:
    """Return a dataset of some units."""
    writer = DatasetWriter.create(str(tmp_path / "dataset"), identity)
    for n in range(NUM_UNITS):
        writer.commit(f"u{n}", *make_unit(identity, 2, n), attempt=1)
    return tmp_path / "dataset"


def _compact(url: str | Path) -> compaction.CompactReport:
    return compact(Store(url), read_info(Store(url)))


def _where(url: str | Path) -> dict[bytes, tuple[str, int]]:
    """Return unit and row of each sample."""
    catalog = Catalog.open(Store(url), read_info(Store(url)))
    units, rows = catalog.find(catalog.sample_ids)
    found = zip(catalog.sample_ids, units.tolist(), rows.tolist(), strict=True)
    return {i.tobytes(): (catalog.records[unit].unit, row) for i, unit, row in found}


def test_readers_see_the_same_rows_from_fewer_objects(s3_url: str, identity: DatasetIdentity, make_unit: Any) -> None:
    writer = DatasetWriter.create(s3_url, identity)
    units = [make_unit(identity, 2, n) for n in range(NUM_UNITS)]
    for n, unit in enumerate(units[:-1]):
        writer.commit(f"u{n}", *unit, attempt=1)
    before = Dataset.open(s3_url)
    report = _compact(s3_url)
    assert (report.generation, report.units, report.samples, report.added) == (1, NUM_UNITS - 1, 8, NUM_UNITS - 1)
    store = CountingStore(s3_url)
    catalog = Catalog.open(store, before.info)
    assert store.requests == {"list": 2, "read": 2}
    assert (catalog.records, catalog.num_uncovered) == (before.manifests, 0)
    writer.commit("u9", *units[-1], attempt=1)
    after = Dataset.open(s3_url)
    assert (after.catalog.num_uncovered, after.manifests[:-1]) == (1, before.manifests)
    asked = [i for samples, _ in units for i in samples.ids()]
    assert after.read(asked)[0].ids() == asked
    assert after.totals().supervised == sum(targets.num_positions for _, targets in units)
    assert verify_dataset(s3_url).ok


def test_nothing_to_do_writes_nothing(sound: Path) -> None:
    _compact(sound)
    before = sorted(sound.rglob("*"))
    assert _compact(sound).added == 0
    assert sorted(sound.rglob("*")) == before


def test_what_an_index_holds_is_never_taken_over(sound: Path, identity: DatasetIdentity, make_unit: Any) -> None:
    _compact(sound)
    before = _where(sound)
    writer = DatasetWriter.open(str(sound), identity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("storage.manifest.datetime", _SlowClock)
        assert writer.commit("a-late-unit", *make_unit(identity, 2, 0), attempt=1).committed
    assert _where(sound) == before
    assert _compact(sound).added == 1
    assert _where(sound) == before
    assert Dataset.open(str(sound)).catalog.num_duplicates == 2


class _SlowClock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "datetime":
        return datetime(2001, 1, 1, tzinfo=UTC)


def test_a_late_record_of_a_covered_unit_changes_nothing(
    sound: Path, identity: DatasetIdentity, make_unit: Any
) -> None:
    _compact(sound)
    manifest = sound / "manifest" / "u0.json"
    before = Dataset.open(str(sound)).manifests
    manifest.unlink()
    assert DatasetWriter.open(str(sound), identity).commit("u0", *make_unit(identity, 2, 0), attempt=2).committed
    assert Dataset.open(str(sound)).manifests == before
    report = verify_dataset(str(sound))
    assert (report.ok, len(report.orphans)) == (True, 1)


def test_many_compactors_at_once_leave_one_whole_index(sound: Path) -> None:
    before = _where(sound)
    with ThreadPoolExecutor(8) as pool:
        reports = list(pool.map(lambda _: _compact(sound), range(8)))
    assert sum(report.added for report in reports) == NUM_UNITS
    assert sorted(path.name[:8] for path in (sound / "index").iterdir()) == ["00000001", "00000001"]
    assert _where(sound) == before
    assert verify_dataset(str(sound)).ok


@pytest.mark.parametrize("after", [False, True])
def test_the_end_of_the_process_at_any_step_loses_nothing(sound: Path, tmp_path: Path, after: bool) -> None:
    before = _where(sound)
    counted = SteppedStore(shutil.copytree(sound, tmp_path / "counted"))
    compact(counted, read_info(counted))
    assert counted.steps >= 2
    for step in range(1, counted.steps + 1):
        url = Path(shutil.copytree(sound, tmp_path / f"killed{step}"))
        with pytest.raises(Killed):
            compact(SteppedStore(url, step, after), read_info(Store(url)))
        assert _where(url) == before
        assert _compact(url).units == NUM_UNITS
        assert _where(url) == before
        assert verify_dataset(str(url)).ok


def test_damaged_index_is_refused_and_its_remedy_works(sound: Path) -> None:
    before = _where(sound)
    _compact(sound)
    record, data = sound / "index" / "00000001.json", next((sound / "index").glob("*.parquet"))
    for path in (record, data):
        raw = path.read_bytes()
        for broken in (raw[:-1], raw[:20] + bytes([raw[20] ^ 1]) + raw[21:], b""):
            path.write_bytes(broken)
            with pytest.raises(IntegrityError, match=r"00000001\.json is damaged .* delete it"):
                Dataset.open(str(sound))
            assert not verify_dataset(str(sound)).ok
        path.write_bytes(raw)
    record.rename(sound / "index" / "00000002.json")
    with pytest.raises(IntegrityError, match="record of generation 1, which is not its name"):
        Dataset.open(str(sound))
    (sound / "index" / "00000002.json").unlink()
    assert _where(sound) == before
    assert _compact(sound).units == NUM_UNITS


def test_index_of_another_dataset_is_refused(sound: Path, make_identity: Any, make_unit: Any) -> None:
    other = make_identity(vocab_size=60, weights="00" * 32)
    url = sound.with_name("other")
    DatasetWriter.create(str(url), other).commit("u", *make_unit(other, 2), attempt=1)
    _compact(url)
    shutil.copytree(url / "index", sound / "index")
    with pytest.raises(IntegrityError, match="its fingerprint is not that of the dataset"):
        Dataset.open(str(sound))


def test_lost_index_is_told_once_manifests_were_swept_for_it(sound: Path) -> None:
    store, info = Store(sound), read_info(Store(sound))
    (sound / INFO_KEY).write_bytes(info.changed(least_generation=2).to_json())
    _compact_at = compact(store, info)
    assert _compact_at.generation == 1
    with pytest.raises(IntegrityError, match=r"00000002\.json and all later ones are missing"):
        Dataset.open(str(sound))


def test_dropped_units_are_missing_and_can_be_captured_again(
    sound: Path, identity: DatasetIdentity, make_unit: Any
) -> None:
    _compact(sound)
    drop_units(Store(sound), read_info(Store(sound)), ["u1", "u3"])
    dataset = Dataset.open(str(sound))
    assert [record.unit for record in dataset.manifests] == ["u0", "u2", "u4"]
    assert len(verify_dataset(str(sound)).orphans) == 2
    assert DatasetWriter.open(str(sound), identity).commit("u1", *make_unit(identity, 2, 1), attempt=2).committed
    assert len(Dataset.open(str(sound)).manifests) == 4


def test_compaction_moves_version_1_to_2(tmp_path: Path) -> None:
    url = Path(shutil.copytree(GOLDEN, tmp_path / "dataset"))
    before = _where(url)
    _compact(url)
    info = read_info(Store(url))
    assert (info.schema_version, info.fingerprint) == (2, read_info(Store(GOLDEN)).fingerprint)
    assert (info.created_by, info.upgraded_from) == ("lectern 0.2.0", 1)
    assert verify_dataset(str(url)).ok
    assert _where(url) == before


def test_newer_release_is_named_to_older_ones(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _compact(sound)
    monkeypatch.setattr("storage.info.SCHEMA_VERSION", 1)
    with pytest.raises(InputError, match=r"reads versions up to 1: install lectern 0\.2\.0 or newer"):
        Dataset.open(str(sound))


def test_capture_compacts_only_when_enough_is_uncovered(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, info = Store(sound), read_info(Store(sound))
    assert compact_if_due(store, info) is None
    monkeypatch.setattr(compaction, "COMPACT_UNITS", NUM_UNITS)
    report = compact_if_due(store, info)
    assert report is not None and report.added == NUM_UNITS
    assert compact_if_due(store, info) is None


def test_all_compactions_together_write_a_few_times_the_last_one() -> None:
    covered = written = 0
    for num_units in range(1, 100_001):
        if is_due(num_units - covered, covered):
            covered, written = num_units, written + num_units
    assert 100_000 - covered < 100_000 / 8 + COMPACT_UNITS
    assert written < 10 * 100_000


names = st.text(alphabet="abcdef0123456789", min_size=1, max_size=8)


@settings(max_examples=50)
@given(
    units=st.dictionaries(names, st.tuples(st.integers(1, 4), st.integers(1, 2**40), st.integers(0, 9)), max_size=6),
    dropped=st.sets(names, max_size=2),
)
def test_index_files_give_back_what_went_in(units: dict[str, tuple[int, int, int]], dropped: set[str]) -> None:
    rng = np.random.default_rng(len(units))
    records = [
        ManifestRecord.seal(
            unit=unit, attempt="1", size_bytes=size, sha256=rng.bytes(32).hex(), rows=rows, tokens=size,
            digest=rng.bytes(16).hex(), fingerprint="f",
        )
        for unit, (rows, size, _) in units.items()
    ]  # fmt: skip
    ids = [rng.integers(0, 256, (record.rows, 16), dtype=np.uint8) for record in records]
    index = EMPTY.extended(records, ids, [positions for _, _, positions in units.values()])
    _check_equal(decode_index(encode_index(index, "f"), 0, "f"), index)
    kept = [n for n, record in enumerate(records) if record.unit not in dropped]
    less = EMPTY.extended([records[n] for n in kept], [ids[n] for n in kept], [int(index.positions[n]) for n in kept])
    _check_equal(index.without(frozenset(dropped)), less)


def _check_equal(left: Index, right: Index) -> None:
    assert left.records == right.records
    np.testing.assert_array_equal(left.positions, right.positions)
    np.testing.assert_array_equal(left.sample_ids, right.sample_ids)
