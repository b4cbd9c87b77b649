"""Stores that ignore conditional creates: one process writes at a time, a second one is refused and told why."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from storage_faults import CarelessFileSystem, FaultyProxy

from storage import lease as lease_module
from storage.compaction import compact
from storage.errors import InputError, StorageError
from storage.gc import collect_garbage
from storage.identity import DatasetIdentity
from storage.lease import LEASE_KEY, Lease, LeaseRecord, write_access
from storage.object_store import Store
from storage.reader import Dataset
from storage.verify import verify_dataset
from storage.writer import DatasetWriter


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an empty store that ignores conditional creates."""
    fsspec.register_implementation("careless", CarelessFileSystem, clobber=True)
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.0)
    return f"careless://{uuid4().hex}"


def _hold(url: str, **fields: Any) -> LeaseRecord:
    """Leave a lease of somebody else."""
    theirs = LeaseRecord.of_this_process().model_copy(update={"host": "elsewhere", "user": "ada", **fields})
    Store(url).write(LEASE_KEY, theirs.model_dump_json().encode())
    return theirs


def test_where_the_condition_is_honoured_there_is_no_lease(tmp_path: Any) -> None:
    with write_access(Store(tmp_path)) as lease:
        assert lease is None
    assert Store(tmp_path).list() == []


def test_one_writer_works_as_anywhere(url: str, make_identity: Any, make_unit: Any, assert_same_unit: Any) -> None:
    identity: DatasetIdentity = make_identity()
    units = [make_unit(identity, 2, seed) for seed in range(3)]
    with DatasetWriter.create(url, identity) as writer:
        assert writer.lease is not None
        held = json.loads(Store(url).read(LEASE_KEY))
        assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
        for n, unit in enumerate(units):
            assert writer.commit(f"u{n}", *unit, attempt=1).committed
        assert not DatasetWriter.open(url, identity).commit("u0", *units[0], attempt=2).committed
        compact(writer.store, writer.info)
        collect_garbage(writer.store, writer.info, -60)
        assert Store(url).exists(LEASE_KEY)
    assert not Store(url).exists(LEASE_KEY)
    for unit in units:
        assert_same_unit(Dataset.open(url).read(unit[0].ids()), unit)
    assert verify_dataset(url).ok


def test_a_second_writer_is_refused_and_told_who_writes(url: str, make_identity: Any) -> None:
    theirs = _hold(url, pid=77)
    with pytest.raises(InputError, match=r"ignores conditional creates.* ada@elsewhere, process 77 does.*after 120 s"):
        DatasetWriter.create(url, make_identity())
    with pytest.raises(InputError, match="only one process may write"), write_access(Store(url)):
        pass
    assert LeaseRecord.model_validate_json(Store(url).read(LEASE_KEY)) == theirs


def test_one_process_shares_its_lease(url: str, make_identity: Any) -> None:
    first, second = (DatasetWriter.create(url, make_identity()) for _ in range(2))
    assert first.lease is second.lease
    first.close()
    assert Store(url).exists(LEASE_KEY)
    second.close()
    assert not Store(url).exists(LEASE_KEY)


def test_an_expired_lease_is_void_by_the_stores_clock(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _hold(url, lease_s=0.05)
    monkeypatch.setattr("time.time", lambda: 0.0)
    time.sleep(0.1)
    with write_access(Store(url)) as lease:
        assert lease is not None and lease.record.host == socket.gethostname()


def test_the_lease_of_a_process_that_ended_here_is_void(url: str) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    _hold(url, host=socket.gethostname(), pid=ended.pid)
    with write_access(Store(url)) as lease:
        assert lease is not None


def test_a_rival_at_the_same_moment_wins_or_loses_but_never_both(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rival:
        def wait(self, _: float) -> None:
            _hold(url, user="rival")

    monkeypatch.setattr(lease_module.threading, "Event", Rival)
    with pytest.raises(InputError, match="rival@elsewhere"):
        Lease.acquire(Store(url))


def test_a_lease_is_renewed_and_its_loss_stops_commits(
    url: str, make_identity: Any, make_unit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "LEASE_S", 0.2)
    writer = DatasetWriter.create(url, make_identity())
    written = Store(url).modified(LEASE_KEY)
    assert writer.lease is not None and written is not None
    _wait(lambda: (Store(url).modified(LEASE_KEY) or 0) > written)
    _hold(url)
    _wait(lambda: writer.lease is not None and writer.lease.lost)
    with pytest.raises(StorageError, match=r"another process took .*lease\.json"):
        writer.commit("u", *make_unit(make_identity(), 2), attempt=1)
    writer.close()
    assert Store(url).exists(LEASE_KEY), "the lease of another is not ours to release"


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_s3_server_that_knows_no_condition(
    s3_url: str, s3_endpoint: str, make_identity: Any, make_unit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.0)
    with FaultyProxy(s3_endpoint, rate=0, seed=0, careless=True) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with DatasetWriter.create(s3_url, make_identity()) as writer:
            assert writer.lease is not None
            assert writer.commit("u0", *make_unit(make_identity(), 2), attempt=1).committed
        _hold(s3_url)
        with pytest.raises(InputError, match="ada@elsewhere"):
            DatasetWriter.create(s3_url, make_identity())
        assert len(Dataset.open(s3_url).manifests) == 1
