"""Which sample lies where: a sorted array of sample ids over all committed units."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from storage.committed import read_uncovered
from storage.index import Index
from storage.info import DatasetInfo
from storage.manifest import ManifestRecord, each
from storage.object_store import Store
from storage.samples import ID_BYTES, UInt8Array
from storage.shard import read_sample_ids

SampleIds = Sequence[bytes] | UInt8Array


def id_array(sample_ids: SampleIds) -> UInt8Array:
    """Return ids given as bytes or as uint8 [N, 16] as the latter."""
    if isinstance(sample_ids, np.ndarray):
        return np.ascontiguousarray(sample_ids, dtype=np.uint8).reshape(-1, ID_BYTES)
    return np.frombuffer(b"".join(sample_ids), dtype=np.uint8).reshape(-1, ID_BYTES)


class Catalog:
    """Finds samples by id. Of a sample committed in several units the first one counts, for every reader alike.

    First are the units of the index, in its order, which no later generation changes; then those that it does not
    cover, by the record's `created_at` and unit id. So a later commit never takes over what an index holds.
    """

    def __init__(self, index: Index) -> None:
        """Build from all units in the order in which duplicates are resolved."""
        self.records = index.records
        self.positions = index.positions
        self.num_uncovered = 0
        """Units that the store's index does not cover: each cost some requests of its own."""
        ids = index.sample_ids
        lengths = np.asarray([record.rows for record in index.records], dtype=np.int64)
        unit = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        row = (np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.int32)
        high, low = _halves(ids)
        order = np.lexsort((low, high))  # stable: the oldest of equal ids comes first
        high, low = high[order], low[order]
        first = np.ones(len(order), dtype=np.bool_)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        kept = order[first]
        self.num_duplicates = len(order) - len(kept)
        self._high, self._low = high[first], low[first]
        self._unit, self._row = unit[kept], row[kept]
        self.sample_ids: UInt8Array = ids[np.sort(kept)]
        """All samples, each once, in order of unit and row; uint8 [N, 16]."""

    @classmethod
    def open(cls, store: Store, info: DatasetInfo) -> Self:
        """Read what is committed now: the newest index, and record and id column of each unit that it lacks."""
        index, uncovered = read_uncovered(store, info)
        catalog = cls(with_units(store, index, uncovered))
        catalog.num_uncovered = len(uncovered)
        return catalog

    def __len__(self) -> int:
        return len(self._high)

    def find(self, sample_ids: SampleIds) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return (index into `records`, row in its data file) of each sample; the index is -1 where it is missing."""
        high, low = _halves(id_array(sample_ids))
        at = np.searchsorted(self._high, high)
        if at.max(initial=0) < len(self) and (self._high[at] == high).all() and (self._low[at] == low).all():
            return self._unit[at], self._row[at]  # as nearly always
        unit, row = np.full(len(high), -1, dtype=np.int32), np.full(len(high), -1, dtype=np.int32)
        # Ids are hashes: equal high halves of different ids hardly ever occur, but must be walked over.
        open_ = np.flatnonzero(at < len(self._high))
        while len(open_ := open_[self._high[at[open_]] == high[open_]]):
            hit = self._low[at[open_]] == low[open_]
            unit[open_[hit]], row[open_[hit]] = self._unit[at[open_[hit]]], self._row[at[open_[hit]]]
            open_ = open_[~hit]
            at[open_] += 1
            open_ = open_[at[open_] < len(self._high)]
        return unit, row


def _halves(ids: UInt8Array) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    pairs = ids.view(np.uint64)
    return pairs[:, 0], pairs[:, 1]


def with_units(store: Store, index: Index, records: Sequence[ManifestRecord]) -> Index:
    """Return an index extended by units, whose id columns are read and checked against their records."""
    parts = each(store, lambda record: read_sample_ids(store, record), list(records))
    return index.extended(records, [ids for ids, _ in parts], [positions for _, positions in parts])
