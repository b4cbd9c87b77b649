"""What the rows of a data file share: which token ids are likely where, and the frequencies of the coded integers.

Ids are coded as ranks. After a token that is frequent in the file, the ids that were kept most often after it come
first, in a list of its own; all ids follow by how often they were kept in the whole file, in classes of one octave each
and by rising id within a class, so that one small number per id is all that has to be stored.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from storage.codecs.integers import Tables
from storage.errors import IntegrityError
from storage.samples import Int32Array, Int64Array, UInt8Array, offsets_of

MIN_POSITIONS = 24
"""Positions that must follow a token in a file for it to get a list of its own."""
MIN_KEPT = 3
"""How often an id must have been kept there to be listed…"""
MAX_LISTED = 96
"""…and the most ids that a list has."""
_HEADER = np.dtype([("vocab_size", "<u4"), ("draws", "<u2"), ("sets", "<u2"), ("lists", "<u4"), ("listed", "<u4")])


@dataclass(frozen=True, eq=False)
class Ranks:
    """The orders of the ids."""

    classes: UInt8Array  # [V], octave of the number of times that an id was kept
    heads: Int32Array  # [T], rising: the tokens with lists of their own
    offsets: Int64Array  # [T + 1]
    listed: Int32Array  # [I], ids of the lists, likeliest first

    @classmethod
    def count(cls, before: Int64Array, owner: Int64Array, ids: Int32Array, vocab_size: int) -> "Ranks":
        """Count what was kept.

        Args:
            before: the token before each position, [P].
            owner: the position of each entry, [E].
            ids: the entries, [E].
            vocab_size: V.
        """
        times = np.bincount(ids, minlength=vocab_size)
        classes = np.maximum(np.frexp(times.astype(np.float64))[1] - 2, 0).astype(np.uint8)  # 0 for less than 4
        heads = np.flatnonzero(np.bincount(before, minlength=vocab_size) >= MIN_POSITIONS)
        if not len(heads) or not len(ids):
            return cls(classes, np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int32))
        number = np.full(vocab_size, -1, dtype=np.int64)
        number[heads] = np.arange(len(heads))
        of_entry = number[before[owner]]
        known = of_entry >= 0
        keys, kept = np.unique(of_entry[known] * vocab_size + ids[known], return_counts=True)
        keys, kept = keys[kept >= MIN_KEPT], kept[kept >= MIN_KEPT]
        order = np.lexsort((keys, -kept, keys // vocab_size))
        head = keys[order] // vocab_size
        place = np.arange(len(order)) - offsets_of(np.bincount(head, minlength=len(heads)))[head]
        taken = place < MAX_LISTED
        sizes = np.bincount(head[taken], minlength=len(heads))
        return cls(
            classes,
            heads.astype(np.int32),
            offsets_of(sizes),
            (keys[order][taken] % vocab_size).astype(np.int32),
        )

    def order(self) -> Int64Array:
        """Return the ids of the whole file, likeliest first, [V]."""
        return np.argsort(-self.classes.astype(np.int64), kind="stable")

    def list_of(self, before: Int64Array) -> Int64Array:
        """Return the number of the list after each token, −1 where it has none, [P]."""
        if not len(self.heads):
            return np.full(len(before), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.heads, before), len(self.heads) - 1)
        return np.asarray(np.where(self.heads[at] == before, at, -1))


class Ranking:
    """Ids to ranks and back, given the number of the list that applies (−1: none)."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._order = ranks.order()
        self._rank = np.empty(len(self._order), dtype=np.int64)
        self._rank[self._order] = np.arange(len(self._order))
        sizes = np.diff(ranks.offsets)
        head = np.repeat(np.arange(len(sizes)), sizes)
        keys = head * len(self._order) + ranks.listed
        self._sorted = np.argsort(keys)
        self._keys = keys[self._sorted]
        self._place = (np.arange(len(keys)) - ranks.offsets[:-1][head])[self._sorted]

    def size(self, lists: Int64Array) -> Int64Array:
        """Return how many ids each list has."""
        return np.asarray(np.where(lists >= 0, np.append(np.diff(self._ranks.offsets), 0)[lists], 0))

    def ranks(self, lists: Int64Array, ids: Int64Array) -> Int64Array:
        """Return the rank of each id under its list."""
        rank = self._rank[ids] + self.size(lists)
        if len(self._keys):
            keys = lists * len(self._order) + ids
            at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            rank = np.where((self._keys[at] == keys) & (lists >= 0), self._place[at], rank)
        return rank

    def ids(self, lists: Int64Array, ranks: Int64Array) -> Int64Array:
        """Return the id of each rank under its list; IntegrityError for ranks that no id has."""
        size = self.size(lists)
        beyond = ranks - size
        if (beyond >= len(self._order)).any():
            raise IntegrityError("a packed stream names a token id that the codebook does not have")
        ids: Int64Array = self._order[np.maximum(beyond, 0)]
        inside = beyond < 0
        at = np.append(self._ranks.offsets, 0)[lists[inside]] + ranks[inside]
        ids[inside] = self._ranks.listed[at]
        return ids


@dataclass(frozen=True, eq=False)
class Codebook:
    """All that rows of a file share."""

    draws: int  # of one set; 0 for kinds without draws
    sets: int
    ranks: Ranks
    tables: Tables

    def to_bytes(self) -> bytes:
        """Return the codebook as bytes, a checksum first."""
        ranks = self.ranks
        sizes = np.diff(ranks.offsets)
        header = np.array((len(ranks.classes), self.draws, self.sets, len(sizes), len(ranks.listed)), dtype=_HEADER)
        parts = [header, ranks.classes, ranks.heads.astype("<u4"), sizes.astype("<u2")]
        # Byte by byte, since the low bytes of ids tell nothing of one another.
        parts += [(ranks.listed >> shift).astype(np.uint8) for shift in (0, 8, 16, 24)]
        body = b"".join(part.tobytes() for part in parts) + self.tables.to_bytes()
        return crc32(body).to_bytes(4, "little") + body

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Codebook":
        """Read a codebook back; IntegrityError where it is damaged."""
        view = memoryview(raw)
        body = view[4:]
        if len(raw) < 4 + _HEADER.itemsize or crc32(body) != int.from_bytes(view[:4], "little"):
            raise IntegrityError("a codebook is damaged: its checksum does not match")
        vocab_size, draws, sets, lists, listed = (int(n) for n in np.frombuffer(body, _HEADER, 1)[0])
        sizes_at = _HEADER.itemsize + vocab_size + 4 * lists
        end = sizes_at + 2 * lists + 4 * listed
        if len(body) < end:
            raise IntegrityError("a codebook is too short")
        classes = np.frombuffer(body, np.uint8, vocab_size, _HEADER.itemsize)
        heads = np.frombuffer(body, "<u4", lists, _HEADER.itemsize + vocab_size).astype(np.int32)
        sizes = np.frombuffer(body, "<u2", lists, sizes_at).astype(np.int64)
        planes = np.frombuffer(body, np.uint8, 4 * listed, sizes_at + 2 * lists).reshape(4, listed).astype(np.int32)
        ids = planes[0] | (planes[1] << 8) | (planes[2] << 16) | (planes[3] << 24)
        if sizes.sum() != listed or (np.diff(heads) <= 0).any() or (ids < 0).any() or (ids >= vocab_size).any():
            raise IntegrityError("a codebook holds no lists that could have been written")
        tables, rest = Tables.from_bytes(body[end:])
        if len(rest):
            raise IntegrityError("a codebook is longer than it says")
        return cls(draws, sets, Ranks(classes, heads, offsets_of(sizes), ids), tables)
