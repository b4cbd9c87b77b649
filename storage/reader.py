"""Opens a dataset and reads samples with their targets by id, in any order, in bounded memory."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Self

import numpy as np

from storage.catalog import Catalog, SampleIds, id_array
from storage.errors import InputError
from storage.identity import DatasetIdentity, require_same
from storage.info import DatasetInfo, read_info
from storage.object_store import Store
from storage.samples import Int64Array, SampleBatch
from storage.shard import Shard, read_shard
from storage.targets import TargetBatch


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


class Dataset:
    """A dataset as it was when opened. Thread-safe; build a new one in each process from its URL."""

    def __init__(
        self, store: Store, info: DatasetInfo, catalog: Catalog, verify_hashes: bool, memory_bytes: int
    ) -> None:
        self.store = store
        self.info = info
        self.catalog = catalog
        self.manifests = catalog.records
        """Records of all committed units, in the order in which duplicates are resolved."""
        self._shards = _ShardCache(lambda unit: read_shard(store, self.manifests[unit], verify_hashes), memory_bytes)

    @classmethod
    def open(
        cls,
        url: str,
        expected: DatasetIdentity | None = None,
        verify_hashes: bool = True,
        memory_bytes: int = 1 << 30,
    ) -> Self:
        """Open what is committed at `url` now.

        `memory_bytes` bounds the decoded shards that are kept; one is always kept. Raises InputError when there is
        no dataset, IdentityError when it is not the expected one, IntegrityError when a record or shard is damaged.
        """
        store = Store(url)
        info = read_info(store)
        if expected is not None:
            require_same(expected, info.identity, store.shown())
        return cls(store, info, Catalog.open(store, info), verify_hashes, memory_bytes)

    @property
    def identity(self) -> DatasetIdentity:
        """Return what the dataset was captured from."""
        return self.info.identity

    def missing(self, sample_ids: SampleIds) -> Int64Array:
        """Return the indices of the asked samples that are not in the dataset."""
        return np.flatnonzero(self.catalog.find(sample_ids)[0] < 0)

    def read(self, sample_ids: SampleIds) -> Shard:
        """Return the asked samples and their targets, in the asked order; InputError when one is missing."""
        units, rows = self.catalog.find(sample_ids)
        absent = np.flatnonzero(units < 0)
        if len(absent):
            raise InputError(
                f"{len(absent)} of {len(units)} samples are not in {self.store.shown()}, the first is "
                f"{id_array(sample_ids)[absent[0]].tobytes().hex()}; run the capture, which scores what is missing"
            )
        if len(units) == 0:
            raise InputError("no samples were asked for; name at least one sample id")
        parts, asked = [], []
        for unit in dict.fromkeys(units.tolist()):
            where = np.flatnonzero(units == unit)
            samples, targets = self._shards.get(unit)
            picked = rows[where].tolist()
            parts.append((samples.take(picked), targets.take(picked)))
            asked.append(where)
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate(asked), kind="stable").tolist()
        samples = SampleBatch.concat([part[0] for part in parts])
        targets = TargetBatch.concat([part[1] for part in parts])
        return samples.take(order), targets.take(order)

    def iterate(self, batches: Sequence[SampleIds], read_ahead: int = 2) -> Iterator[Shard]:
        """Yield `read` of each list of ids, in order, while a thread reads up to `read_ahead` batches before."""
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lectern-read")
        ahead: deque[Future[Shard]] = deque()
        try:
            for batch in batches:
                ahead.append(pool.submit(self.read, batch))
                if len(ahead) > read_ahead:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

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


class _ShardCache:
    """Decoded shards, least recently used first, bounded by bytes; a shard asked for twice at once is read once."""

    def __init__(self, load: Callable[[int], Shard], memory_bytes: int) -> None:
        self._load = load
        self._memory_bytes = memory_bytes
        self._lock = Lock()
        self._entries: OrderedDict[int, Future[Shard]] = OrderedDict()
        self._sizes: dict[int, int] = {}

    def get(self, unit: int) -> Shard:
        """Return a shard, from memory or by loading it."""
        with self._lock:
            future = self._entries.get(unit)
            mine = future is None
            if future is None:
                future = self._entries[unit] = Future()
            self._entries.move_to_end(unit)
        if mine:
            self._fill(unit, future)
        return future.result()

    def _fill(self, unit: int, future: "Future[Shard]") -> None:
        try:
            shard = self._load(unit)
        except BaseException as error:
            with self._lock:
                del self._entries[unit]
            future.set_exception(error)
            return
        with self._lock:
            self._sizes[unit] = _num_bytes(shard)
            self._evict(unit)
        future.set_result(shard)

    def _evict(self, newest: int) -> None:
        for unit in [u for u in self._entries if u in self._sizes and u != newest]:
            if sum(self._sizes.values()) <= self._memory_bytes:
                return
            del self._entries[unit], self._sizes[unit]


def _num_bytes(shard: Shard) -> int:
    samples, targets = shard
    arrays = [*vars(samples).values(), *vars(targets).values(), *targets.hidden.values()]
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
