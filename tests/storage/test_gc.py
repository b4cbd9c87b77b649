"""Clean-up: what is left behind goes once it is old enough by the store's clock; what a record names stays."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage_faults import Killed, SteppedStore

from storage import gc as gc_module
from storage.backends import Stored
from storage.compaction import compact
from storage.errors import IntegrityError
from storage.gc import GcReport, Kept, Reason, collect_garbage, plan_gc
from storage.identity import DatasetIdentity
from storage.info import read_info
from storage.object_store import Store
from storage.reader import Dataset
from storage.verify import verify_dataset
from storage.writer import DatasetWriter

NUM_UNITS = 4
DAY_S = 86_400.0


@pytest.fixture
def identity(make_identity: Callable[..., DatasetIdentity]) -> DatasetIdentity:
    """Return an identity with few tokens, so that units are small."""
    return make_identity(vocab_size=60)


@pytest.fixture
def write(identity: DatasetIdentity, make_unit: Any) -> Callable[[str, int, int], None]:
    """Return a function that commits units first … last - 1 to a URL."""

    def commit(url: str, first: int, last: int) -> None:
        writer = DatasetWriter.create(url, identity)
        for n in range(first, last):
            writer.commit(f"u{n}", *make_unit(identity, 2, n), attempt=1)

    return commit


@pytest.fixture
def sound(tmp_path: Path, write: Callable[..., None]) -> Path:
    """Return a dataset of some units."""
    write(str(tmp_path / "dataset"), 0, NUM_UNITS)
    return tmp_path / "dataset"


def _gc(url: str | Path, older_than_s: float = DAY_S, dry_run: bool = False) -> GcReport:
    return collect_garbage(Store(url), read_info(Store(url)), older_than_s, dry_run)


def _compact(url: str | Path) -> None:
    compact(Store(url), read_info(Store(url)))


def _age(url: Path, seconds: float = 2 * DAY_S) -> None:
    """Make everything in a folder older."""
    then = time.time() - seconds
    for path in url.rglob("*"):
        os.utime(path, (then, then))


def _litter(url: Path) -> dict[str, Reason]:
    """Leave behind what interrupted attempts leave."""
    left = {
        "data/u9-1-aa.parquet": Reason.ORPHAN,
        "data/u1-2-aa.parquet": Reason.LOST,
        "data/.tmp-77": Reason.TEMPORARY,
        ".probe-77": Reason.TEMPORARY,
        f"index/00000007-{'a' * 32}.parquet": Reason.INDEX,
    }
    for key in left:
        (url / key).parent.mkdir(exist_ok=True)
        (url / key).write_bytes(b"1234")
    return left


def test_everything_left_behind_goes_and_is_counted(sound: Path) -> None:
    left = _litter(sound)
    for stranger in ("notes.txt", "data/README", "manifest/.DS_Store", "index/mine.txt"):
        (sound / stranger).parent.mkdir(exist_ok=True)
        (sound / stranger).write_bytes(b"not ours to remove")
    _age(sound)
    before = {path for path in sound.rglob("*") if path.is_file()}
    tried = _gc(sound, dry_run=True)
    assert {path for path in sound.rglob("*") if path.is_file()} == before
    report = _gc(sound)
    assert {item.key: item.reason for item in report.removed} == left
    assert tried.removed == report.removed
    assert (report.bytes, report.num_young) == (20, 0)
    assert report.totals()["stale temporary file"] == (2, 8)
    assert {path for path in sound.rglob("*") if path.is_file()} == before - {sound / key for key in left}
    assert verify_dataset(str(sound)).ok and _gc(sound).removed == []


def test_what_is_younger_than_the_age_stays(sound: Path) -> None:
    left = _litter(sound)
    _age(sound, DAY_S / 2)
    report = _gc(sound)
    assert (report.removed, report.num_young) == ([], len(left))
    assert len(_gc(sound, DAY_S / 4).removed) == len(left)


def test_the_clock_is_the_stores_not_ours(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _litter(sound)
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert _gc(sound).removed == []
    monkeypatch.setattr(Store, "now", lambda _: 4e9)
    assert len(_gc(sound).removed) == 5


def test_old_indexes_and_manifests_go_once_two_indexes_hold_them(
    sound: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _compact(sound)
    _age(sound)
    assert _gc(sound).removed == [], "one index alone never replaces manifests"
    for n in range(NUM_UNITS, NUM_UNITS + 2):
        write(str(sound), n, n + 1)
        _compact(sound)
    _age(sound)
    before = Dataset.open(str(sound)).manifests
    report = _gc(sound)
    # Generation 2 holds u0 to u4, generation 3 u5 too.
    gone = {item.key for item in report.removed if item.reason is Reason.MANIFEST}
    assert gone == {f"manifest/u{n}.json" for n in range(NUM_UNITS + 1)}
    assert sum(item.reason is Reason.INDEX for item in report.removed) == 2
    assert Dataset.open(str(sound)).manifests == before
    assert verify_dataset(str(sound)).ok
    assert read_info(Store(sound)).least_generation == 2
    (sound / "index" / "00000003.json").unlink()
    assert Dataset.open(str(sound)).manifests == before
    (sound / "index" / "00000002.json").unlink()
    with pytest.raises(IntegrityError, match=r"00000002\.json and all later ones are missing"):
        _gc(sound)


def test_many_old_manifests_are_worth_a_second_index(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _compact(sound)
    _age(sound)
    before = Dataset.open(str(sound)).manifests
    monkeypatch.setattr(gc_module, "COMPACT_UNITS", NUM_UNITS)
    assert sum(item.reason is Reason.MANIFEST for item in _gc(sound).removed) == NUM_UNITS
    assert list((sound / "manifest").iterdir()) == []
    assert Dataset.open(str(sound)).manifests == before
    for _ in range(2):
        assert _gc(sound, 0).removed == []


def test_nothing_goes_while_a_record_is_damaged(sound: Path) -> None:
    (sound / "manifest" / "u1.json").write_bytes(b"{}")
    _age(sound)
    with pytest.raises(IntegrityError, match=r"u1\.json is damaged"):
        _gc(sound)
    assert len(list((sound / "data").iterdir())) == NUM_UNITS


def test_what_is_committed_meanwhile_stays(
    sound: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sound / "manifest" / "u2.json"
    raw = manifest.read_bytes()
    manifest.unlink()
    _age(sound)
    real = gc_module.plan_gc

    def plan_then_commit(*args: Any) -> Any:
        planned = real(*args)
        manifest.write_bytes(raw)
        return planned

    monkeypatch.setattr(gc_module, "plan_gc", plan_then_commit)
    assert _gc(sound).removed == []
    assert verify_dataset(str(sound)).ok


@pytest.mark.parametrize("after", [False, True])
def test_the_end_of_the_process_at_any_step_loses_nothing(
    sound: Path, tmp_path: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr(gc_module, "COMPACT_UNITS", NUM_UNITS)
    _compact(sound)
    _litter(sound)
    before = Dataset.open(str(sound)).manifests
    counted = SteppedStore(shutil.copytree(sound, tmp_path / "counted"))
    collect_garbage(counted, read_info(counted), -60)
    assert counted.steps > 8
    for step in range(1, counted.steps + 1):
        url = Path(shutil.copytree(sound, tmp_path / f"killed{step}"))
        with pytest.raises(Killed):
            collect_garbage(SteppedStore(url, step, after), read_info(Store(url)), -60)
        assert Dataset.open(str(url)).manifests == before
        _gc(url, -60)
        assert Dataset.open(str(url)).manifests == before
        report = verify_dataset(str(url))
        assert (report.ok, report.orphans) == (True, [])


def test_orphans_and_unfinished_uploads_go_on_s3(s3_url: str, write: Callable[..., None]) -> None:
    write(s3_url, 0, 2)
    store = Store(s3_url)
    store.write("data/u9-1-aa.parquet", b"orphan")
    filesystem = store._backend.filesystem  # type: ignore[attr-defined]
    bucket = s3_url.split("/")[2]
    for key in ("dataset/data/u8-1-aa.parquet", "dataset/data/u8-1-aa.parquet", "elsewhere/x"):
        filesystem.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    first = _gc(s3_url)
    # The server of the tests says of every upload that it was begun in 2010.
    assert ([item.reason for item in first.removed], first.num_young) == ([Reason.UPLOAD] * 2, 1)
    assert [item.reason for item in _gc(s3_url, -60).removed] == [Reason.ORPHAN]
    left = filesystem.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["elsewhere/x"]
    assert verify_dataset(s3_url).orphans == []
    assert not any(key.startswith(".probe-") for key in store.list())


names = st.sampled_from(["u1", "u2", "u-3", "u4"])
keys = st.one_of(
    names.map(lambda unit: f"manifest/{unit}.json"),
    st.tuples(names, st.sampled_from("ab")).map(lambda pair: f"data/{pair[0]}-{pair[1]}.parquet"),
    st.integers(0, 5).map(lambda number: f"index/{number:08d}.json"),
    st.sampled_from(["dataset.json", "data/.tmp-1", "README.md", "heads/a.safetensors", "lease.json", ".probe-1"]),
)
stored = st.builds(Stored, keys, st.integers(0, 9), st.one_of(st.none(), st.floats(0, 100)))


@given(
    objects=st.lists(stored, max_size=12, unique_by=lambda found: found.key),
    units=st.sets(names),
    twice=st.sets(names),
    before=st.floats(0, 100),
)
def test_no_plan_touches_what_is_young_or_belongs(
    objects: list[Stored], units: set[str], twice: set[str], before: float
) -> None:
    data = frozenset(f"data/{unit}-a.parquet" for unit in units)
    kept = Kept(data, frozenset(units), frozenset(twice & units), 3, frozenset({"index/00000003.json"}))
    garbage, num_young = plan_gc(objects, kept, before)
    old = {found.key for found in objects if found.modified is not None and found.modified <= before}
    for item in garbage:
        assert item.key not in data | {"index/00000003.json", "dataset.json", "README.md", "lease.json"}
        assert not item.key.startswith("heads/")
        assert not item.key.startswith("manifest/") or item.key[9:-5] in twice & units
        assert item.key in old
    everything, none_young = plan_gc([Stored(found.key, 0, 0.0) for found in objects], kept, 1.0)
    assert (len(garbage) + num_young, none_young) == (len(everything), 0)
    orphans = {f"data/{unit}-{end}.parquet" for unit in ("u1", "u2", "u-3", "u4") for end in "ab"} - data
    assert orphans & {found.key for found in objects} <= {item.key for item in everything}
