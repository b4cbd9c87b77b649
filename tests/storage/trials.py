"""The life of a small dataset under faults, for the tests and `benchmarks/commit.py`: what must hold afterwards."""

import errno
import os
import random
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from storage_faults import Killed, SteppedStore

from storage.backends import Backend, Stored
from storage.compaction import compact
from storage.gc import collect_garbage
from storage.identity import DatasetIdentity
from storage.info import read_info
from storage.object_store import Store
from storage.reader import Dataset
from storage.verify import verify_dataset
from storage.writer import DatasetWriter
from tests.storage.conftest import Unit, build_identity, build_unit, check_same_unit

NUM_UNITS = 5
NOW = -60.0
"""An age that makes everything old enough to be cleaned up."""
T = TypeVar("T")


def make_units(identity: DatasetIdentity, num_units: int = NUM_UNITS) -> list[Unit]:
    """Return units of two samples each."""
    return [build_unit(identity, 2, seed) for seed in range(num_units)]


def identity() -> DatasetIdentity:
    """Return an identity with few tokens, so that units are small."""
    return build_identity(vocab_size=60)


def live(store: Store, units: Sequence[Unit], attempt: int = 1) -> None:
    """Commit all units, compact in between, clean up."""
    info = read_info(store)
    writer = DatasetWriter(store, info)
    for n, unit in enumerate(units):
        writer.commit(f"u{n}", *unit, attempt=attempt)
        if n % 2:
            compact(store, info)
    collect_garbage(store, info, NOW)


def num_steps(url: Path, units: Sequence[Unit]) -> int:
    """Return how many changes `live` makes to a store."""
    DatasetWriter.create(str(url), identity())
    store = SteppedStore(url)
    live(store, units)
    return store.steps


def end_at_step(url: Path, units: Sequence[Unit], step: int, after: bool, sigkill: bool) -> None:
    """Live until the process ends right before or after a change: by an exception, or by SIGKILL in a child."""
    DatasetWriter.create(str(url), identity())
    if not sigkill:
        try:
            live(SteppedStore(url, step, after), units)
        except Killed:
            return
        raise AssertionError(f"step {step} was never reached")
    child = os.fork()
    if child == 0:
        try:
            live(SteppedStore(url, step, after), units)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def race(make_store: Callable[[], Store], units: Sequence[Unit], rng: random.Random) -> None:
    """Two writers commit all units in orders of their own and two compactors follow them, all at once."""
    orders = [rng.sample(range(len(units)), len(units)) for _ in range(2)]
    stores = [make_store() for _ in range(4)]

    def write(worker: int) -> None:
        writer = DatasetWriter(stores[worker], read_info(stores[worker]))
        for n in orders[worker]:
            writer.commit(f"u{n}", *units[n], attempt=worker)

    def fold(worker: int) -> None:
        for _ in range(3):
            compact(stores[worker], read_info(stores[worker]))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write, 0), pool.submit(write, 1), pool.submit(fold, 2), pool.submit(fold, 3)]:
            done.result()


def wrong_rows(url: str, units: Sequence[Unit]) -> list[str]:
    """Return what is wrong with a dataset that must hold exactly these units, each once, and nothing else."""
    problems = []
    dataset = Dataset.open(url)
    found = sorted(record.unit for record in dataset.manifests)
    if found != sorted(f"u{n}" for n in range(len(units))):
        problems.append(f"units {found}")
    for n, unit in enumerate(units):
        try:
            check_same_unit(dataset.read(unit[0].ids()), unit)
        except Exception as error:
            problems.append(f"u{n}: {error}")
    collect_garbage(Store(url), read_info(Store(url)), NOW)
    report = verify_dataset(url)
    return problems + report.problems + [f"orphan {key}" for key in report.orphans]


class FaultyBackend:
    """Fails a share of the requests: errors 500 and 503, time-outs, and replies that get lost after the deed."""

    def __init__(self, inner: Backend, rate: float, rng: random.Random) -> None:
        self._inner, self._rate, self._rng = inner, rate, rng
        self.num_faults = 0

    def _try(self, deed: Callable[[], T]) -> T:
        fault = self._rng.choice(["500", "503", "timeout", "lost"]) if self._rng.random() < self._rate else ""
        self.num_faults += bool(fault)
        if fault == "timeout":
            raise TimeoutError("no answer in time")
        if fault in {"500", "503"}:
            raise OSError(errno.EIO, f"the server answered {fault}")
        result = deed()
        if fault == "lost":
            raise ConnectionResetError("the reply got lost")
        return result

    def read(self, key: str, start: int | None, end: int | None) -> bytes:
        """Read, or fail."""
        return self._try(lambda: self._inner.read(key, start, end))

    def write(self, key: str, data: bytes) -> None:
        """Write, or fail, perhaps after having written."""
        self._try(lambda: self._inner.write(key, data))

    def create(self, key: str, data: bytes) -> bool:
        """Create, or fail, perhaps after having created."""
        return self._try(lambda: self._inner.create(key, data))

    def list(self, prefix: str) -> Any:
        """List, or fail."""
        return self._try(lambda: self._inner.list(prefix))

    def stat(self, key: str) -> Stored:
        """Look up, or fail."""
        return self._try(lambda: self._inner.stat(key))

    def scan(self) -> Iterable[Stored]:
        """List everything, or fail."""
        return self._try(lambda: list(self._inner.scan()))

    def delete(self, key: str) -> None:
        """Delete, or fail, perhaps after having deleted."""
        self._try(lambda: self._inner.delete(key))

    def abort(self, key: str, upload: str) -> None:
        """Give an upload up, or fail."""
        self._try(lambda: self._inner.abort(key, upload))


def faulty_store(url: str | Path, rate: float, rng: random.Random) -> Store:
    """Return a store that fails a share of its requests."""
    store = Store(url)
    store._backend = FaultyBackend(store._backend, rate, rng)
    return store
