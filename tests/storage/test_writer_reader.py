"""Commits and reads: exactly once under races, kills and faults; any order, bounded memory, clear refusals."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storage_faults import FaultyProxy, FlakyFileSystem, as_ordinary_user, full_disk

from storage.catalog import Catalog
from storage.errors import IdentityError, InputError, IntegrityError, StorageError
from storage.identity import DatasetIdentity
from storage.info import read_info
from storage.object_store import Store
from storage.reader import Dataset
from storage.samples import SampleBatch
from storage.shard_source import Reading
from storage.targets import TargetBatch
from storage.verify import verify_dataset
from storage.writer import DatasetWriter

MakeIdentity = Callable[..., DatasetIdentity]
Unit = tuple[SampleBatch, TargetBatch]
MakeUnit = Callable[..., Unit]
SameUnit = Callable[[Unit, Unit], None]


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a place for a dataset on each kind of store."""
    return str(tmp_path / "dataset") if request.param == "folder" else str(request.getfixturevalue("s3_url"))


def _join(units: list[Unit]) -> Unit:
    return SampleBatch.concat([u[0] for u in units]), TargetBatch.concat([u[1] for u in units])


def test_what_was_committed_is_read_back_in_any_order(
    url: str, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    identity = make_identity(hidden=["final"])
    units = [make_unit(identity, 5, seed) for seed in range(4)]
    writer = DatasetWriter.create(url, identity)
    receipts = [writer.commit(f"u{n}", *unit, attempt=1) for n, unit in enumerate(units)]
    assert [(r.unit, r.rows, r.committed) for r in receipts] == [(f"u{n}", 5, True) for n in range(4)]
    dataset = Dataset.open(url, identity)
    samples, targets = _join(units)
    order = random.Random(0).sample(range(20), 20)
    ids = samples.ids()
    assert_same_unit(dataset.read([ids[n] for n in order]), (samples.take(order), targets.take(order)))
    assert_same_unit(dataset.read(samples.sample_id[[3, 3, 17]]), (samples.take([3, 3, 17]), targets.take([3, 3, 17])))
    totals = dataset.totals()
    assert (totals.samples, totals.tokens) == (20, samples.num_tokens)
    assert totals.supervised == targets.num_positions
    assert totals.bytes == sum(r.bytes for r in receipts)
    assert totals.bytes_per_token == totals.bytes / totals.supervised


def test_second_commit_changes_nothing(url: str, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    writer = DatasetWriter.create(url, identity)
    unit = make_unit(identity)
    first = writer.commit("u", *unit, attempt=1)
    before = {key: writer.store.read(key) for key in writer.store.list()}
    second = DatasetWriter.open(url, identity).commit("u", *unit, attempt=2)
    assert second == replace(first, committed=False)
    assert {key: writer.store.read(key) for key in writer.store.list()} == before


def test_one_of_many_racing_attempts_is_committed(url: str, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    unit = make_unit(identity)
    DatasetWriter.create(url, identity)
    writers = [DatasetWriter.open(url, identity) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        receipts = list(pool.map(lambda n: writers[n].commit("u", *unit, attempt=n), range(8)))
    assert sum(receipt.committed for receipt in receipts) == 1
    assert len(Store(url).list("data/")) == 1
    assert verify_dataset(url).ok


def test_creating_twice_joins_and_another_identity_is_refused(
    url: str, make_identity: MakeIdentity, make_unit: MakeUnit
) -> None:
    identity, other = make_identity(), make_identity(top_k=7)
    writer = DatasetWriter.create(url, identity)
    assert writer.lease is None
    writer.commit("u", *make_unit(identity), attempt=1)
    assert DatasetWriter.create(url, identity).info == writer.info
    for refuse in (
        lambda: DatasetWriter.create(url, other),
        lambda: DatasetWriter.open(url, other),
        lambda: Dataset.open(url, other),
    ):
        with pytest.raises(IdentityError, match=r"capture\.top_k is 6 there, 7 here"):
            refuse()


def test_missing_samples_are_found_and_named(tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    DatasetWriter.create(str(tmp_path), identity)
    here, gone = make_unit(identity, 4, 0)[0], make_unit(identity, 3, 1)[0]
    assert Dataset.open(str(tmp_path)).missing(here.ids()).tolist() == [0, 1, 2, 3]
    DatasetWriter.open(str(tmp_path), identity).commit("u", *make_unit(identity, 4, 0), attempt=1)
    dataset = Dataset.open(str(tmp_path))
    assert dataset.missing([*gone.ids()[:1], *here.ids(), *gone.ids()[1:]]).tolist() == [0, 5, 6]
    assert dataset.missing([]).tolist() == []
    with pytest.raises(InputError, match=f"1 of 5 samples are not in .* the first is {gone.ids()[2].hex()}; run the"):
        dataset.read([*here.ids(), gone.ids()[2]])
    with pytest.raises(InputError, match="no samples were asked for"):
        dataset.read([])


def test_refused_unit_leaves_no_trace(tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    writer = DatasetWriter.create(str(tmp_path), identity)
    samples, targets = make_unit(identity)
    with pytest.raises(IntegrityError, match="NaN or infinite"):
        writer.commit("u", samples, replace(targets, logprob=targets.logprob * np.float16(np.nan)), attempt=1)
    assert writer.store.list() == ["dataset.json"]


def test_duplicates_across_units_resolve_to_the_oldest(
    tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    identity = make_identity()
    writer = DatasetWriter.create(str(tmp_path), identity)
    samples, targets = make_unit(identity, 6)
    other = replace(targets, teacher_nll=targets.teacher_nll + 1)
    writer.commit("b-first", samples.take([0, 1, 2]), targets.take([0, 1, 2]), attempt=1)
    writer.commit("a-second", samples, other, attempt=1)
    dataset = Dataset.open(str(tmp_path))
    assert (dataset.totals().samples, dataset.catalog.num_duplicates) == (6, 3)
    assert dataset.catalog.find(samples.ids())[0].tolist() == [0, 0, 0, 1, 1, 1]
    _, read = dataset.read(samples.ids())
    assert read.teacher_nll.tolist() == [*targets.teacher_nll[:3].tolist(), *other.teacher_nll[3:].tolist()]


def test_iterate_keeps_the_order_and_raises_where_it_fails(
    tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    identity = make_identity()
    writer = DatasetWriter.create(str(tmp_path), identity)
    units = [make_unit(identity, 4, seed) for seed in range(6)]
    for n, unit in enumerate(units):
        writer.commit(f"u{n}", *unit, attempt=1)
    dataset = Dataset.open(str(tmp_path), reading=Reading(memory_bytes=1))
    batches = [unit[0].ids() for unit in reversed(units)]
    for got, unit in zip(dataset.iterate(batches), reversed(units), strict=True):
        assert_same_unit(got, unit)
    reads = dataset.iterate([batches[0], [bytes(16)], batches[1]])
    assert_same_unit(next(reads), units[-1])
    with pytest.raises(InputError, match="1 of 1 samples are not in"):
        next(reads)
    stopped = dataset.iterate(batches)
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]


def test_memory_is_bounded_and_threads_read_a_shard_once(
    tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit
) -> None:
    identity = make_identity()
    writer = DatasetWriter.create(str(tmp_path), identity)
    units = [make_unit(identity, 4, seed) for seed in range(6)]
    for n, unit in enumerate(units):
        writer.commit(f"u{n}", *unit, attempt=1)
    small, large = Dataset.open(str(tmp_path), reading=Reading(memory_bytes=1)), Dataset.open(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        for dataset in (small, large):
            list(pool.map(lambda unit, d=dataset: d.read(unit[0].ids()), units * 20))
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    for unit in units:
        large.read(unit[0].ids())
    still_there = 0
    for unit in units:
        try:
            small.read(unit[0].ids())
            still_there += 1
        except IntegrityError as error:
            assert "it is missing; drop unit" in str(error)
    assert still_there <= 1


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "swapped"])
def test_damaged_shard_is_refused_with_key_and_remedy(
    url: str, make_identity: MakeIdentity, make_unit: MakeUnit, damage: str
) -> None:
    identity = make_identity()
    writer = DatasetWriter.create(url, identity)
    units = [make_unit(identity, 4, seed) for seed in range(2)]
    for n, unit in enumerate(units):
        writer.commit(f"u{n}", *unit, attempt=1)
    dataset = Dataset.open(url)
    first, second = (record.data_key for record in dataset.manifests)
    raw = writer.store.read(first)
    if damage == "missing":
        writer.store.delete(first)
    else:
        middle = len(raw) // 2
        altered = raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]
        writer.store.write(first, {"truncated": raw[:-9], "altered": altered}.get(damage, writer.store.read(second)))
    with pytest.raises(IntegrityError) as caught:
        dataset.read(units[0][0].ids())
    assert first in str(caught.value)
    assert "drop unit u0 with `lectern verify --repair` and run the capture again" in str(caught.value)
    dataset.read(units[1][0].ids())


def test_hash_check_can_be_left_out(tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    unit = make_unit(identity, 4)
    DatasetWriter.create(str(tmp_path), identity).commit("u", *unit, attempt=1)
    record = Dataset.open(str(tmp_path)).manifests[0]
    path = tmp_path / record.data_key
    raw = path.read_bytes()
    # The last bytes before the footer's length are free text of the writer: only the hash sees them change.
    at = raw.rindex(b"parquet-cpp-arrow")
    path.write_bytes(raw[:at] + b"P" + raw[at + 1 :])
    Dataset.open(str(tmp_path), reading=Reading(verify_hashes=False)).read(unit[0].ids())
    with pytest.raises(IntegrityError, match="SHA-256"):
        Dataset.open(str(tmp_path)).read(unit[0].ids())


def test_full_disk_keeps_what_was_committed(tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity("dense", 2000)
    large = make_unit(identity, 12, 1)
    with full_disk(tmp_path):
        writer = DatasetWriter.create(str(tmp_path), identity)
        small = make_unit(identity, 1, 0)
        assert writer.commit("small", *small, attempt=1).committed
        with pytest.raises(StorageError, match="free some space and run again, what was committed before is intact"):
            writer.commit("large", *large, attempt=1)
        assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp-")]
        assert Dataset.open(str(tmp_path)).missing(large[0].ids()).tolist() == list(range(12))
        Dataset.open(str(tmp_path)).read(small[0].ids())
        report = verify_dataset(str(tmp_path))
        assert (report.ok, report.units, report.orphans) == (True, 1, [])


def test_record_that_cannot_be_written_gives_its_data_back(make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity()
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        with as_ordinary_user():
            writer = DatasetWriter.create(name, identity)
            writer.commit("u0", *make_unit(identity, 2, 0), attempt=1)
            os.chmod(f"{name}/manifest", 0o555)
            with pytest.raises(StorageError, match=r"cannot create .*u1\.json: permission denied"):
                writer.commit("u1", *make_unit(identity, 2, 1), attempt=1)
            report = verify_dataset(name)
            assert (report.ok, report.units, report.orphans) == (True, 1, [])
            os.chmod(f"{name}/manifest", 0o755)


def test_lost_reply_to_the_commit_still_counts_as_committed(
    flaky: Callable[..., Store],
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
) -> None:
    identity = make_identity()
    url = flaky({}).url
    unit = make_unit(identity)
    writer = DatasetWriter.create(url, identity)
    FlakyFileSystem.calls, FlakyFileSystem.faults = 0, {2: "after"}
    assert writer.commit("u", *unit, attempt=1).committed
    assert FlakyFileSystem.calls > 2
    assert Store(url).list("data/") == [Dataset.open(url).manifests[0].data_key]


def test_commit_without_an_answer_leaves_its_data(
    flaky: Callable[..., Store],
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("storage.object_store.ATTEMPTS", 1)
    identity = make_identity()
    url = flaky({}).url
    unit = make_unit(identity)
    writer = DatasetWriter.create(url, identity)
    for fault, committed in (("before", 0), ("after", 1)):
        FlakyFileSystem.calls, FlakyFileSystem.faults = 0, {3: fault}
        with pytest.raises(StorageError, match="got lost"):
            writer.commit("u", *unit, attempt=1)
        assert len(Dataset.open(url).manifests) == committed
        # The request may still arrive, so its data stays.
        report = verify_dataset(url)
        assert (report.ok, len(report.orphans)) == (True, 1)
    Dataset.open(url).read(unit[0].ids())


def test_faults_at_every_request_lose_and_change_nothing(
    flaky: Callable[..., Store],
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
    assert_same_unit: SameUnit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("storage.object_store.wait_random_exponential", lambda **_: lambda _state: 0.0)
    identity = make_identity()
    units = [make_unit(identity, 3, seed) for seed in range(4)]
    for trial in range(25):
        rng = random.Random(trial)
        url = flaky({}).url
        writer = DatasetWriter.create(url, identity)
        FlakyFileSystem.faults = {n: rng.choice(["before", "after"]) for n in range(1000) if rng.random() < 0.2}
        for n, unit in enumerate(units):
            writer.commit(f"u{n}", *unit, attempt=1)
        dataset = Dataset.open(url)
        assert len(dataset.manifests) == 4
        for unit in units:
            assert_same_unit(dataset.read(unit[0].ids()), unit)


def test_faulty_s3_loses_and_changes_nothing(
    s3_url: str,
    s3_endpoint: str,
    make_identity: MakeIdentity,
    make_unit: MakeUnit,
    assert_same_unit: SameUnit,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("storage.object_store.wait_random_exponential", lambda **_: lambda _state: 0.0)
    identity = make_identity()
    units = [make_unit(identity, 3, seed) for seed in range(8)]
    with FaultyProxy(s3_endpoint, rate=0.2, seed=0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        writer = DatasetWriter.create(s3_url, identity)
        for n, unit in enumerate(units):
            assert writer.commit(f"u{n}", *unit, attempt=1).committed
        dataset = Dataset.open(s3_url)
        for unit in units:
            assert_same_unit(dataset.read(unit[0].ids()), unit)
        report = verify_dataset(s3_url)
    assert proxy.num_faults > 5
    assert (report.problems, report.units, report.orphans) == ([], 8, [])


COMMITTER = """
import sys
sys.path.insert(0, sys.argv[2])
from conftest import build_identity, build_unit
from storage.writer import DatasetWriter
identity = build_identity()
units = [build_unit(identity, 3, seed) for seed in range(40)]
print("ready", flush=True)
writer = DatasetWriter.create(sys.argv[1], identity)
for n, unit in enumerate(units):
    writer.commit(f"u{n}", *unit, attempt=1)
print("done", flush=True)
"""


def test_kill_9_during_commits_keeps_each_sample_exactly_once(
    tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit, assert_same_unit: SameUnit
) -> None:
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(tests.parents[1])}

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", COMMITTER, str(tmp_path), str(tests)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    for trial in range(3):
        process = start()
        time.sleep(random.Random(trial).uniform(0.02, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (tmp_path / "dataset.json").exists():
            assert verify_dataset(str(tmp_path)).ok
    process = start()
    assert process.communicate(timeout=60)[0] == "done\n"
    report = verify_dataset(str(tmp_path))
    assert (report.problems, report.units, report.samples, report.rows) == ([], 40, 120, 120)
    dataset = Dataset.open(str(tmp_path))
    for seed in range(40):
        unit = make_unit(make_identity(), 3, seed)
        assert_same_unit(dataset.read(unit[0].ids()), unit)


def test_catalog_reads_little_of_each_shard(s3_url: str, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    identity = make_identity("dense", 2000)
    unit = make_unit(identity, 30)
    receipt = DatasetWriter.create(s3_url, identity).commit("u", *unit, attempt=1)
    asked: list[int] = []

    class Counting(Store):
        def read_range(self, key: str, start: int, end: int) -> bytes:
            asked.append(end - start)
            return super().read_range(key, start, end)

    catalog = Catalog.open(Counting(s3_url), read_info(Store(s3_url)))
    assert len(catalog) == 30
    assert receipt.bytes > 500_000
    assert len(asked) <= 3
    assert sum(asked) < 100_000


def test_files_open_without_our_code(tmp_path: Path, make_identity: MakeIdentity, make_unit: MakeUnit) -> None:
    import pyarrow.dataset as pads

    identity = make_identity(hidden=["final"])
    units = [make_unit(identity, 5, seed) for seed in range(2)]
    writer = DatasetWriter.create(str(tmp_path), identity)
    for n, unit in enumerate(units):
        writer.commit(f"u{n}", *unit, attempt=1)
    table = pads.dataset(tmp_path / "data", format="parquet").to_table()
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    layout = json.loads(table.schema.metadata[b"lectern"])["hidden"]["final"]
    for samples, targets in units:
        for n, sample_id in enumerate(samples.ids()):
            row = rows[sample_id]
            assert row["tokens"] == samples.sample(n).tokens.tolist()
            own = targets.take([n])
            assert row["target_id"] == own.id.tolist()
            assert row["target_count"] == own.count.tolist()
            assert sum(row["supervised"]) == len(row["target_count"]) == len(row["tail_mass"])
            hidden = np.frombuffer(row["hidden_final"], dtype=layout["dtype"]).reshape(-1, layout["width"])
            np.testing.assert_array_equal(hidden, own.hidden["final"])


def test_identity_reaches_the_reader(tmp_path: Path, make_identity: MakeIdentity) -> None:
    identity: Any = make_identity(chat_template="ef" * 16)
    DatasetWriter.create(str(tmp_path), identity, padded_vocab_size=512)
    dataset = Dataset.open(str(tmp_path), identity)
    assert dataset.identity == identity
    assert dataset.info.tokenizer.padded_vocab_size == 512
    assert dataset.totals().bytes_per_token == 0.0
