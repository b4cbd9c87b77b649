"""What the rows of a data file share: which token ids are likely where, and the frequencies of the coded integers.

Ids are coded as ranks. At positions that are alike, the ids that were kept most often there come first, in a list of
their own; all ids follow by how often they were kept in the whole file, in classes of one octave each and by rising id
within a class, so that one small number per id is all that has to be stored.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from storage.codecs.integers import Tables
from storage.codecs.lists import Lists, usual_list
from storage.errors import IntegrityError
from storage.samples import Int32Array, Int64Array, UInt8Array, offsets_of

VERSION = 2
"""Of what is packed. Version 1: a list for each frequent token and no others, log-probabilities in uniform steps and in
the context of their rank, numbers of entries as they are."""
_HEADER = np.dtype([("vocab_size", "<u4"), ("draws", "<u2"), ("sets", "<u2"), ("lists", "<u4"), ("listed", "<u4")])
_HEADER_2 = np.dtype([("most", "<u2"), ("tokens", "<u4")])
_VERSION_SHIFT = 24
"""Where the version stands in `vocab_size`; version 1 wrote 0."""
NUM_CLASSES = 32


@dataclass(frozen=True, eq=False)
class Ranks:
    """The orders of the ids."""

    classes: UInt8Array  # [V], octave of the number of times that an id was kept
    tokens: Int64Array  # [T], rising: those after which a list is usual
    usual: Int64Array  # [T], its number
    offsets: Int64Array  # [K + 1]
    listed: Int32Array  # [I], ids of the lists, likeliest first

    @classmethod
    def of(cls, lists: Lists, before: Int64Array, ids: Int32Array, vocab_size: int) -> "Ranks":
        """Count the ids, [E], kept in a file; `before` is the token before each position, [P]."""
        times = np.bincount(ids, minlength=vocab_size)
        classes = np.maximum(np.frexp(times.astype(np.float64))[1] - 2, 0).astype(np.uint8)  # 0 for less than 4
        return cls(classes, *lists.usual(before), lists.offsets, lists.ids)

    def order(self) -> Int64Array:
        """Return the ids of the whole file, likeliest first, [V]."""
        return np.argsort(-self.classes.astype(np.int64), kind="stable")

    def list_of(self, before: Int64Array) -> Int64Array:
        """Return the number of the list that is usual after each token, −1 where none is, [P]."""
        return usual_list(before, self.tokens, self.usual)


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

    @property
    def num_lists(self) -> int:
        """Lists that there are."""
        return len(self._ranks.offsets) - 1

    def size(self, lists: Int64Array) -> Int64Array:
        """Return how many ids each list has."""
        return np.asarray(np.append(np.diff(self._ranks.offsets), 0)[lists])

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
        at = self._ranks.offsets[lists[inside]] + ranks[inside]
        ids[inside] = self._ranks.listed[at]
        return ids

    def kinds(self, lists: Int64Array, ranks: Int64Array) -> Int64Array:
        """Return what each rank is known to be: its place in all lists end to end, or behind them its id's class."""
        beyond = ranks - self.size(lists)
        inside = beyond < 0
        classes = self._ranks.classes[self._order[np.maximum(beyond, 0)]]
        kind: Int64Array = len(self._ranks.listed) + classes.astype(np.int64)
        kind[inside] = self._ranks.offsets[lists[inside]] + ranks[inside]
        return kind

    def shares(self, kinds: Int64Array, level: Int64Array, above: Int64Array) -> UInt8Array:
        """Return how far above its position's least log-probability an entry of each kind lies on average, in 1/256.

        Args:
            kinds: of each entry, [E].
            level: the least log-probability of its position in steps below 0, [E].
            above: how many steps it lies above that, [E].
        """
        share = 256 * above / np.maximum(level, 1)
        size = len(self._ranks.listed) + NUM_CLASSES
        times = np.maximum(np.bincount(kinds, minlength=size), 1)
        return np.clip(np.rint(np.bincount(kinds, share, minlength=size) / times), 0, 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Codebook:
    """What rows of a file share beside the frequencies."""

    version: int
    draws: int  # of one set; 0 for kinds without draws
    sets: int
    most: int  # entries of a head; 0 in version 1
    ranks: Ranks
    shares: UInt8Array  # [I + NUM_CLASSES], see `Ranking.shares`; empty in version 1

    def to_bytes(self, tables: Tables) -> bytes:
        """Return codebook and frequencies as bytes, a checksum first."""
        ranks = self.ranks
        sizes = np.diff(ranks.offsets)
        vocab_size = len(ranks.classes) | VERSION << _VERSION_SHIFT
        place = np.empty(len(ranks.classes), dtype=np.int64)
        place[ranks.order()] = np.arange(len(place))
        parts: list[NDArray[np.generic]] = [
            np.array((vocab_size, self.draws, self.sets, len(sizes), len(ranks.listed)), dtype=_HEADER),
            np.array((self.most, len(ranks.tokens)), dtype=_HEADER_2),
            ranks.classes,
            ranks.tokens.astype("<u4"),
            ranks.usual.astype("<u2"),
            sizes.astype("<u2"),
            # Byte by byte, since the low bytes of ids tell nothing of one another.
            *((place[ranks.listed] >> shift).astype(np.uint8) for shift in (0, 8, 16, 24)),
            self.shares,
        ]
        body = b"".join(part.tobytes() for part in parts) + tables.to_bytes()
        return crc32(body).to_bytes(4, "little") + body

    @classmethod
    def from_bytes(cls, raw: bytes) -> tuple["Codebook", Tables]:
        """Read codebook and frequencies back; IntegrityError where they are damaged."""
        parts = _Parts(memoryview(raw)[4:])
        if crc32(parts.rest) != int.from_bytes(raw[:4], "little"):
            raise IntegrityError("a codebook is damaged: its checksum does not match")
        size, draws, sets, num_lists, num_listed = (int(n) for n in parts.take(_HEADER, 1)[0])
        version, vocab_size = max(size >> _VERSION_SHIFT, 1), size & ((1 << _VERSION_SHIFT) - 1)
        if version > VERSION:
            raise IntegrityError(
                f"a codebook has version {version}; this release reads up to {VERSION}: install a later one"
            )
        most, num_tokens = (0, num_lists) if version == 1 else (int(n) for n in parts.take(_HEADER_2, 1)[0])
        classes = parts.take(np.uint8, vocab_size)
        tokens = parts.take("<u4", num_tokens).astype(np.int64)
        usual = np.arange(num_lists) if version == 1 else parts.take("<u2", num_tokens).astype(np.int64)
        sizes = parts.take("<u2", num_lists).astype(np.int64)
        planes = parts.take(np.uint8, 4 * num_listed).reshape(4, num_listed).astype(np.int64)
        listed = planes[0] | (planes[1] << 8) | (planes[2] << 16) | (planes[3] << 24)
        shares = parts.take(np.uint8, 0 if version == 1 else num_listed + NUM_CLASSES)
        if (
            sizes.sum() != num_listed
            or (np.diff(tokens) <= 0).any()
            or (listed >= vocab_size).any()
            or (usual >= num_lists).any()
            or (classes >= NUM_CLASSES).any()
        ):
            raise IntegrityError("a codebook holds no lists that could have been written")
        ranks = Ranks(classes, tokens, usual, offsets_of(sizes), listed.astype(np.int32))
        if version > 1:  # lists are kept as places in the order of the file
            ranks = Ranks(classes, tokens, usual, ranks.offsets, ranks.order()[listed].astype(np.int32))
        tables, rest = Tables.from_bytes(parts.rest)
        if len(rest):
            raise IntegrityError("a codebook is longer than it says")
        return cls(version, draws, sets, most, ranks, shares), tables


class _Parts:
    """Takes arrays off the front of bytes; IntegrityError where there are too few."""

    def __init__(self, raw: memoryview) -> None:
        self.rest = raw

    def take(self, dtype: str | type | np.dtype, count: int) -> NDArray:  # type: ignore[type-arg]
        size = np.dtype(dtype).itemsize * count
        if len(self.rest) < size:
            raise IntegrityError("a codebook is too short")
        part = np.frombuffer(self.rest[:size], dtype, count)
        self.rest = self.rest[size:]
        return part
