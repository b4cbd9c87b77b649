"""Which sample lies where: a sorted array of sample ids over all committed units."""

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from storage.manifest import ManifestRecord, each
from storage.object_store import Store
from storage.samples import ID_BYTES, Int64Array, UInt8Array
from storage.shard import read_sample_ids

SampleIds = Sequence[bytes] | UInt8Array


def id_array(sample_ids: SampleIds) -> UInt8Array:
    """Return ids given as bytes or as uint8 [N, 16] as the latter."""
    if isinstance(sample_ids, np.ndarray):
        return np.ascontiguousarray(sample_ids, dtype=np.uint8).reshape(-1, ID_BYTES)
    return np.frombuffer(b"".join(sample_ids), dtype=np.uint8).reshape(-1, ID_BYTES)


class Catalog:
    """Finds samples by id. Of a sample committed in several units the oldest one counts, for every reader alike.

    Oldest is by the record's `created_at`, then by unit id: a later commit never takes over what was there before.
    """

    def __init__(
        self, records: Sequence[ManifestRecord], sample_ids: Sequence[UInt8Array], positions: Sequence[int]
    ) -> None:
        """Build from the units' records, oldest first, their sample ids and their numbers of supervised positions."""
        self.records = list(records)
        self.positions: Int64Array = np.asarray(positions, dtype=np.int64)
        lengths = [len(ids) for ids in sample_ids]
        ids = np.concatenate([*sample_ids, np.zeros((0, ID_BYTES), dtype=np.uint8)])
        unit = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        row = np.concatenate([*(np.arange(length, dtype=np.int32) for length in lengths), np.zeros(0, dtype=np.int32)])
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
    def build(cls, store: Store, records: Sequence[ManifestRecord]) -> Self:
        """Read the id column of every unit."""
        parts = each(store, lambda record: read_sample_ids(store, record), list(records))
        return cls(records, [ids for ids, _ in parts], [positions for _, positions in parts])

    def __len__(self) -> int:
        return len(self._high)

    def find(self, sample_ids: SampleIds) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return (index into `records`, row in its data file) of each sample; the index is -1 where it is missing."""
        high, low = _halves(id_array(sample_ids))
        at = np.searchsorted(self._high, high)
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
    pairs = ids.view(">u8").astype(np.uint64)
    return pairs[:, 0], pairs[:, 1]
