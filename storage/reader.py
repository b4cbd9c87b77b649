"""Opens a dataset and reads samples with their targets by id, in any order, in bounded memory."""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Lock, current_thread
from typing import Self

import numpy as np
from numpy.typing import NDArray

from storage.catalog import Catalog, SampleIds, id_array
from storage.errors import InputError
from storage.identity import DatasetIdentity, require_same
from storage.info import DatasetInfo, read_info
from storage.object_store import Store
from storage.open_shard import OpenShard, Run, Shard, join, runs_of
from storage.parts import Part
from storage.read_ahead import read_ahead
from storage.samples import Int64Array
from storage.shard_cache import ShardCache
from storage.shard_source import DEFAULT_READING, Reading, ShardSource

LOCAL_THREADS = 2
REMOTE_THREADS = 8
"""Shards that are read side by side, memory permitting."""
_LOADERS = "lectern-load"


@dataclass(frozen=True)
class Totals:
    """Size of a dataset. All but `samples` count rows as stored, a sample in two units twice."""

    samples: int
    tokens: int
    supervised: int
    bytes: int
    """Of the data files."""
    bytes_per_token: float
    """Per supervised token."""


def _end(pool: ThreadPoolExecutor) -> None:
    """Wait for idle threads to end: a process that is forked meanwhile inherits the locks of Arrow's allocator."""
    pool.shutdown(wait=not current_thread().name.startswith(_LOADERS))


@dataclass(frozen=True, eq=False)
class _Located:
    """Asked samples and where they lie: indices of the records, -1 where a sample is missing, and rows."""

    sample_ids: SampleIds
    units: NDArray[np.int32]
    rows: NDArray[np.int32]


class Dataset:
    """A dataset as it was when opened. Thread-safe; build a new one in each process from its URL."""

    def __init__(self, store: Store, info: DatasetInfo, catalog: Catalog, reading: Reading = DEFAULT_READING) -> None:
        self.store = store
        self.info = info
        self.catalog = catalog
        self.manifests = catalog.records
        """Records of all committed units, in the order in which duplicates are resolved."""
        self.reading = reading
        source = ShardSource(store, self.manifests, info.identity, reading)
        self._shards = ShardCache(source.load, source.expected_bytes, reading.memory_bytes)
        self._threads = LOCAL_THREADS if store.is_local else REMOTE_THREADS
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Lock()

    @classmethod
    def open(cls, url: str, expected: DatasetIdentity | None = None, reading: Reading = DEFAULT_READING) -> Self:
        """Open what is committed at `url` now.

        Raises InputError when there is no dataset, IdentityError when it is not the expected one, IntegrityError when
        a record or shard is damaged.
        """
        store = Store(url)
        info = read_info(store)
        if expected is not None:
            require_same(expected, info.identity, store.shown())
        return cls(store, info, Catalog.open(store, info), reading)

    @property
    def identity(self) -> DatasetIdentity:
        """Return what the dataset was captured from."""
        return self.info.identity

    def missing(self, sample_ids: SampleIds) -> Int64Array:
        """Return the indices of the asked samples that are not in the dataset."""
        return np.flatnonzero(self.catalog.find(sample_ids)[0] < 0)

    def read(self, sample_ids: SampleIds) -> Shard:
        """Return the asked samples and their targets, in the asked order; InputError when one is missing."""
        return self._read(self._located(sample_ids))

    def _located(self, sample_ids: SampleIds) -> "_Located":
        return _Located(sample_ids, *self.catalog.find(sample_ids))

    def _read(self, asked: "_Located") -> Shard:
        sample_ids, units, rows = asked.sample_ids, asked.units, asked.rows
        absent = np.flatnonzero(units < 0)
        if len(absent):
            raise InputError(
                f"{len(absent)} of {len(units)} samples are not in {self.store.shown()}, the first is "
                f"{id_array(sample_ids)[absent[0]].tobytes().hex()}; run the capture, which scores what is missing"
            )
        if len(units) == 0:
            raise InputError("no samples were asked for; name at least one sample id")
        return join(self._runs(units, rows))

    def parts(self, sample_ids: SampleIds) -> list[Part]:
        """Return `read` as the one part that there is, which makes this a `TargetReader`."""
        samples, targets = self.read(sample_ids)
        return [Part(self.identity.capture, np.arange(len(samples)), samples, targets)]

    def iterate(self, batches: Iterable[SampleIds]) -> Iterator[Shard]:
        """Yield `read` of each list of ids, in order, reading ahead within half of the memory that may be used."""
        coming: set[int] = set()

        def at_hand(asked: _Located) -> bool:
            late = {unit for unit in set(asked.units.tolist()) if not self._shards.holds(unit)} - coming
            coming.update(late)
            return not late

        def read(asked: _Located) -> Shard:
            try:
                return self._read(asked)
            finally:
                coming.difference_update(asked.units.tolist())

        return read_ahead(read, map(self._located, batches), self._threads, self.reading.memory_bytes // 2, at_hand)

    def _runs(self, units: NDArray[np.int32], rows: NDArray[np.int32]) -> list[Run]:
        """Return the asked rows in order."""
        wanted = runs_of(units, rows)
        of_unit: dict[int, list[int]] = {}
        for n, (unit, _, _) in enumerate(wanted):
            of_unit.setdefault(unit, []).append(n)
        runs: dict[int, Run] = {}
        uncopied: list[int] = []
        held_bytes = 0
        for shard, asked in zip(self._arriving(list(of_unit)), of_unit.values(), strict=True):
            for n in asked:
                runs[n] = Run(shard, wanted[n][1], wanted[n][2])
            uncopied += asked
            held_bytes += shard.num_bytes
            if held_bytes > self.reading.memory_bytes // 4:
                # A run keeps its whole shard in memory, whatever the cache lets go.
                runs |= {n: runs[n].copied() for n in uncopied}
                uncopied, held_bytes = [], 0
        return [runs[n] for n in range(len(wanted))]

    def _arriving(self, units: list[int]) -> Iterator[OpenShard]:
        """Yield the shards in order; those that are not in memory are read side by side."""
        if sum(not self._shards.holds(unit) for unit in units) < 2:
            yield from map(self._shards.get, units)
            return
        pool = self._loaders()
        left = iter(units)
        ahead = deque(pool.submit(self._shards.get, unit) for unit in islice(left, self._threads))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(self._shards.get, unit) for unit in islice(left, 1))

    def _loaders(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix=_LOADERS)
                weakref.finalize(self, _end, self._pool)
            return self._pool

    def totals(self) -> Totals:
        """Return the size of the dataset."""
        size_bytes = sum(record.bytes for record in self.manifests)
        supervised = int(self.catalog.positions.sum())
        return Totals(
            samples=len(self.catalog),
            tokens=sum(record.tokens for record in self.manifests),
            supervised=supervised,
            bytes=size_bytes,
            bytes_per_token=size_bytes / supervised if supervised else 0.0,
        )
