"""The reader: rows of any shards in any order, memory and disk within their bounds, nothing fetched or hashed twice."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_faults import full_disk

from storage.disk_cache import SUFFIX, DiskCache
from storage.errors import IntegrityError
from storage.identity import DatasetIdentity
from storage.object_store import Store
from storage.open_shard import OpenShard, Run, join, num_bytes, runs_of
from storage.read_ahead import read_ahead
from storage.reader import Dataset
from storage.samples import SampleBatch
from storage.shard_cache import ShardCache
from storage.shard_source import Reading
from storage.targets import TargetBatch
from storage.writer import DatasetWriter

MakeIdentity = Callable[..., DatasetIdentity]
Unit = tuple[SampleBatch, TargetBatch]
MakeUnit = Callable[..., Unit]
SameUnit = Callable[[Unit, Unit], None]


class CountingFileSystem(MemoryFileSystem):
    """Memory that counts the bytes asked of each data file."""

    protocol = "counting"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    asked: dict[str, int] = {}  # noqa: RUF012

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Get, and count."""
        data = bytes(super().cat_file(path, start=start, end=end, **kwargs))
        name = path.rpartition("/")[2]
        CountingFileSystem.asked[name] = CountingFileSystem.asked.get(name, 0) + len(data)
        return data


@pytest.fixture
def remote() -> str:
    """Return the URL of an empty store that counts what is read."""
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.asked = {}
    return f"counting://{uuid4().hex}"


def write(url: str, identity: DatasetIdentity, units: list[Unit]) -> None:
    writer = DatasetWriter.create(url, identity)
    for n, unit in enumerate(units):
        writer.commit(f"u{n}", *unit, attempt=1)


def fetched(dataset: Dataset) -> list[int]:
    """Return the bytes of each data file that were asked for since the dataset was opened, and start over."""
    names = [record.data_key.rpartition("/")[2] for record in dataset.manifests]
    counts = [CountingFileSystem.asked.pop(name, 0) for name in names]
    CountingFileSystem.asked = {}
    return counts


@settings(max_examples=40)
@given(
    data=st.data(),
    kind=st.sampled_from(["hybrid", "topk", "sampled", "text"]),
    hidden=st.sampled_from([[], ["final", "model.2"]]),
)
def test_any_rows_of_any_shards_are_joined_as_taken_one_by_one(
    data: st.DataObject, kind: str, hidden: list[str], make_identity: Any, make_unit: Any, assert_same_unit: Any
) -> None:
    identity = make_identity(kind, hidden=hidden)
    units = [make_unit(identity, 5, seed) for seed in range(3)]
    everything = SampleBatch.concat([u[0] for u in units]), TargetBatch.concat([u[1] for u in units])
    asked = data.draw(st.lists(st.integers(0, 14), min_size=1, max_size=20))
    units_rows = np.asarray(asked, dtype=np.int32)
    wanted = runs_of(units_rows // 5, units_rows % 5)
    assert [n for unit, first, last in wanted for n in range(unit * 5 + first, unit * 5 + last)] == asked
    shards = [OpenShard.of(unit) for unit in units]
    runs = [Run(shards[unit], first, last) for unit, first, last in wanted]
    expected = everything[0].take(asked), everything[1].take(asked)
    assert_same_unit(join(runs), expected)
    assert_same_unit(join([run.copied() for run in runs]), expected)


@pytest.mark.parametrize("memory_bytes", [1, 20_000, 1 << 30])
def test_every_memory_bound_reads_the_same(
    remote: str, memory_bytes: int, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    identity = make_identity()
    units = [make_unit(identity, 6, seed) for seed in range(8)]
    write(remote, identity, units)
    dataset = Dataset.open(remote, identity, Reading(memory_bytes=memory_bytes))
    everything = SampleBatch.concat([u[0] for u in units]), TargetBatch.concat([u[1] for u in units])
    rng = np.random.default_rng(0)
    orders = [rng.permutation(48)[:20].tolist() for _ in range(6)]
    batches = [everything[0].sample_id[order] for order in orders]
    for order, got in zip(orders, dataset.iterate(iter(batches)), strict=True):
        assert_same_unit(got, (everything[0].take(order), everything[1].take(order)))


@pytest.mark.parametrize("memory_bytes", [1, 1 << 30], ids=["mapped", "in memory"])
def test_batches_are_the_readers_to_change(
    remote: str,
    tmp_path: Path,
    memory_bytes: int,
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
    assert_same_unit: SameUnit,
) -> None:
    identity = make_identity(hidden=["final"])
    units = [make_unit(identity, 5, seed) for seed in range(2)]
    write(remote, identity, units)
    reading = Reading(disk_bytes=1 << 24, disk_folder=str(tmp_path), memory_bytes=memory_bytes)
    dataset = Dataset.open(remote, identity, reading)
    for _ in range(3):
        for unit in units:
            samples, targets = dataset.read(unit[0].ids())  # one run of rows
            assert_same_unit((samples, targets), unit)
            for array in [*vars(samples).values(), *vars(targets).values(), *targets.hidden.values()]:
                if isinstance(array, np.ndarray):
                    assert array.base is None
                    array[...] = 0


def test_remote_shards_are_fetched_once_for_all_processes(
    remote: str, tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    identity = make_identity(hidden=["final"], hidden_dtype="bfloat16")
    units = [make_unit(identity, 5, seed) for seed in range(3)]
    write(remote, identity, units)
    reading = Reading(disk_bytes=1 << 24, disk_folder=str(tmp_path), memory_bytes=1)
    sizes = [record.bytes for record in Dataset.open(remote).manifests]
    for expected in (sizes, [0, 0, 0]):
        dataset = Dataset.open(remote, identity, reading)
        fetched(dataset)
        for _ in range(2):
            for unit in units:
                assert_same_unit(dataset.read(unit[0].ids()), unit)
        assert fetched(dataset) == expected


def test_local_shards_go_to_disk_only_when_read_again(
    tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    identity = make_identity()
    units = [make_unit(identity, 5, seed) for seed in range(3)]
    write(str(tmp_path / "dataset"), identity, units)
    cache = tmp_path / "cache"
    reading = Reading(disk_bytes=1 << 24, disk_folder=str(cache), memory_bytes=1)
    dataset = Dataset.open(str(tmp_path / "dataset"), identity, reading)
    for times in range(3):
        for unit in units:
            assert_same_unit(dataset.read(unit[0].ids()), unit)
        assert len(list(cache.glob(f"*{SUFFIX}"))) == (3 if times else 0)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_damaged_entries_are_fetched_again(
    remote: str,
    tmp_path: Path,
    damage: str,
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
    assert_same_unit: SameUnit,
) -> None:
    identity = make_identity()
    unit = make_unit(identity, 5)
    write(remote, identity, [unit])
    reading = Reading(disk_bytes=1 << 24, disk_folder=str(tmp_path))
    Dataset.open(remote, identity, reading).read(unit[0].ids())
    (entry,) = tmp_path.glob(f"*{SUFFIX}")
    raw = entry.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(raw), 6).tolist():
        flipped = raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]
        entry.write_bytes({"flipped": flipped, "truncated": raw[:at], "empty": b""}[damage])
        dataset = Dataset.open(remote, identity, reading)
        fetched(dataset)
        assert_same_unit(dataset.read(unit[0].ids()), unit)
        assert fetched(dataset) == [dataset.manifests[0].bytes]
        assert entry.read_bytes() == raw


@pytest.mark.parametrize("kind", ["hybrid", "topk", "sampled", "text", "dense"])
def test_every_kind_comes_back_from_disk(
    tmp_path: Path, kind: str, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    unit = make_unit(make_identity(kind, 40, hidden=["final"]), 4)
    cache = DiskCache(tmp_path, 1 << 24)
    assert cache.put("name", OpenShard.of(unit))
    found = DiskCache(tmp_path, 1 << 24).get("name")
    assert found is not None
    assert_same_unit((found.samples, found.targets), unit)
    assert {level: bounds.tolist() for level, bounds in found.bounds.items()} == {
        level: bounds.tolist() for level, bounds in OpenShard.of(unit).bounds.items()
    }


def test_the_least_recently_used_entries_go_first(tmp_path: Path, make_unit: MakeUnit, make_identity: Any) -> None:
    shards = [OpenShard.of(make_unit(make_identity(), 5, seed)) for seed in range(6)]
    probe = DiskCache(tmp_path / "probe", 1 << 24)
    for n, shard in enumerate(shards):
        assert probe.put(str(n), shard)
    sizes = {path.stem: path.stat().st_size for path in (tmp_path / "probe").glob(f"*{SUFFIX}")}
    cache = DiskCache(tmp_path / "small", sizes["0"] + sizes["1"] + sizes["2"] + max(sizes.values()))
    for n in (0, 1, 2):
        cache.put(str(n), shards[n])
        time.sleep(0.01)
    assert cache.get("0") is not None
    for n in (3, 4, 5):
        time.sleep(0.01)
        cache.put(str(n), shards[n])
        held = list((tmp_path / "small").glob(f"*{SUFFIX}"))
        assert sum(path.stat().st_size for path in held) <= cache.limit_bytes
        assert cache.get("0") is not None
    assert cache.get("1") is None
    assert cache.get("5") is not None
    assert not DiskCache(tmp_path / "tiny", 100).put("0", shards[0])


def test_a_full_disk_keeps_nothing_and_fails_nothing(
    tmp_path: Path, remote: str, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    identity = make_identity("dense", 2000)
    unit = make_unit(identity, 12)
    write(remote, identity, [unit])
    with full_disk(tmp_path):
        dataset = Dataset.open(remote, identity, Reading(disk_bytes=1 << 30, disk_folder=str(tmp_path / "cache")))
        assert_same_unit(dataset.read(unit[0].ids()), unit)
        assert not [path for path in (tmp_path / "cache").iterdir() if path.stat().st_size > 0]


_WRITER = """
import sys, numpy as np
from pathlib import Path
from storage.disk_cache import DiskCache
from storage.open_shard import OpenShard
sys.path.insert(0, "tests/storage")
from conftest import build_identity, build_unit, check_same_unit
cache = DiskCache(Path(sys.argv[1]), int(sys.argv[2]))
units = [build_unit(build_identity(), 5, seed) for seed in range(6)]
rng = np.random.default_rng(int(sys.argv[3]))
for n in rng.integers(0, 6, 60).tolist():
    found = cache.get(str(n))
    if found is None:
        assert cache.put(str(n), OpenShard.of(units[n]))
    else:
        check_same_unit((found.samples, found.targets), units[n])
    held = 0
    for path in cache.folder.glob("*.shard"):
        try:
            held += path.stat().st_size
        except FileNotFoundError:
            pass
    assert held <= cache.limit_bytes
"""


def test_processes_share_one_folder_within_its_limit(tmp_path: Path, make_unit: MakeUnit, make_identity: Any) -> None:
    shards = [OpenShard.of(make_unit(make_identity(), 5, seed)) for seed in range(6)]
    limit = sum(shard.num_bytes for shard in shards) // 2 + 8000
    commands = [[sys.executable, "-c", _WRITER, str(tmp_path), str(limit), str(seed)] for seed in range(2)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


def test_each_file_is_hashed_once_in_a_process(
    tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = make_identity()
    units = [make_unit(identity, 5, seed) for seed in range(3)]
    write(str(tmp_path), identity, units)
    hashed: list[int] = []

    def counting(raw: bytes) -> Any:
        hashed.append(len(raw))
        return sha256(raw)

    monkeypatch.setattr("storage.shard.sha256", counting)
    dataset = Dataset.open(str(tmp_path), identity, Reading(memory_bytes=1))
    for _ in range(4):
        for unit in units:
            dataset.read(unit[0].ids())
    assert sorted(hashed) == sorted(record.bytes for record in dataset.manifests)


def test_layers_that_are_not_wanted_are_not_fetched(
    remote: str, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    identity = make_identity(hidden=["final", "model.2"])
    samples, targets = make_unit(identity, 40)
    wide = np.random.default_rng(0).normal(size=(targets.num_positions, 512)).astype(np.float16)
    targets = TargetBatch(**{**vars(targets), "hidden": {"final": wide, "model.2": wide}})
    write(remote, identity, [(samples, targets)])
    for layers, most in (((), 0.3), (("final",), 0.65), (("final", "model.2"), 1.0), (None, 1.0)):
        dataset = Dataset.open(remote, identity, Reading(layers=layers))
        fetched(dataset)
        read = dataset.read(samples.ids())
        kept = {layer: wide for layer in ("final", "model.2") if layers is None or layer in layers}
        assert_same_unit(read, (samples, TargetBatch(**{**vars(targets), "hidden": kept})))
        assert fetched(dataset)[0] <= most * dataset.manifests[0].bytes


def test_damage_in_wanted_columns_is_found_where_the_file_cannot_be_hashed(
    tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit
) -> None:
    identity = make_identity(hidden=["final"])
    unit = make_unit(identity, 20)
    write(str(tmp_path), identity, [unit])
    record = Dataset.open(str(tmp_path)).manifests[0]
    path = tmp_path / record.data_key
    raw = path.read_bytes()
    reading = Reading(layers=())
    found = 0
    for at in np.random.default_rng(1).integers(4, len(raw) // 2, 30).tolist():
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            Dataset.open(str(tmp_path), identity, reading).read(unit[0].ids())
        except IntegrityError:
            found += 1
    # The first half of the file holds the columns of tokens and targets, and hardly anything besides pages.
    assert found >= 28
    path.write_bytes(raw[:-100])
    with pytest.raises(IntegrityError, match="cannot be used"):
        Dataset.open(str(tmp_path), identity, reading).read(unit[0].ids())


def test_memory_counts_shards_that_are_being_loaded() -> None:
    lock, inside, most = threading.Lock(), [0], [0]

    def load(_unit: int) -> Any:
        with lock:
            inside[0] += 10
            most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        with lock:
            inside[0] -= 10
        return SimpleNamespace(num_bytes=10)

    cache = ShardCache(load, lambda _unit: 10, memory_bytes=35)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(cache.get, [n % 20 for n in range(200)]))
    assert 10 < most[0] <= 30
    assert sum(cache.holds(unit) for unit in range(20)) == 3


def test_a_failed_load_frees_its_room_and_is_tried_again() -> None:
    failures = iter([True, True, False])

    def load(_unit: int) -> Any:
        if next(failures):
            raise IntegrityError("damaged")
        return SimpleNamespace(num_bytes=10)

    cache = ShardCache(load, lambda _unit: 10, memory_bytes=10)
    for _ in range(2):
        with pytest.raises(IntegrityError):
            cache.get(1)
    assert cache.get(1).num_bytes == 10


def test_reading_ahead_keeps_to_its_bytes(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    unit = make_unit(make_identity(), 4)
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for n in range(50):
            taken.append(n)
            yield n

    def read(n: int) -> Unit:
        time.sleep(0.001 * (n % 3))
        return unit[0].take([n % 4]), unit[1].take([n % 4])

    largest = max(num_bytes(read(n)) for n in range(4))
    for n, got in enumerate(read_ahead(read, numbers(), 4, 3 * largest)):
        assert got[0].ids() == [unit[0].ids()[n % 4]]
        # The one just given, and three that wait; small batches let more of them wait until the largest is seen.
        assert len(taken) <= n + 1 + (3 if n >= 4 else 8)
    assert len(taken) == 50


def test_batches_at_hand_are_read_when_they_are_taken(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    unit = make_unit(make_identity(), 4)
    taken: list[int] = []
    readers: dict[int, str] = {}

    def numbers() -> Iterator[int]:
        for n in range(200):
            taken.append(n)
            yield n

    def read(n: int) -> Unit:
        readers[n] = threading.current_thread().name
        return unit[0].take([n % 4]), unit[1].take([n % 4])

    here = threading.current_thread().name
    for n, got in enumerate(read_ahead(read, numbers(), 2, 1 << 30, at_hand=lambda n: n % 5 != 0)):
        assert got[0].ids() == [unit[0].ids()[n % 4]]
        assert (readers[n] == here) == (n % 5 != 0)
        assert [m for m in readers if m > n and m % 5] == []
        # Those at hand take no memory before they are read: they are looked past for what is not.
        assert n < 2 or len(taken) > min(n + 10, 199)
        assert len(taken) <= n + 17
    assert len(taken) == 200


def test_a_remote_object_costs_one_request(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_url)
    store.write("some/key", b"value")
    filesystem = store._backend.filesystem  # type: ignore[attr-defined]
    calls: list[str] = []
    call = filesystem._call_s3

    async def counting(method: str, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return await call(method, *args, **kwargs)

    monkeypatch.setattr(filesystem, "_call_s3", counting)
    assert store.read("some/key") == b"value"
    assert store.read_if_exists("some/other") is None
    assert calls == ["get_object", "get_object"]
