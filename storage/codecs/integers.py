"""Non-negative integers in contexts: a bucket coded by rANS with the context's own frequencies, and raw bits below it.

Whoever codes walks over the data once and calls `integers(field, context, lane, values)`; the same walk serves both
directions. `Recorder` notes the values and packs them at the end, once all frequencies are known; `Unpacker` returns
them one call after another, so that a context may depend on everything that was coded before.
"""

from dataclasses import dataclass
from typing import Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from storage.codecs.rans import PROB_BITS, LaneReader, Lanes, encode_lanes
from storage.errors import IntegrityError
from storage.samples import Int64Array, UInt8Array, offsets_of

EXACT = 16
"""Integers below this have a bucket of their own; above, an octave has 4 buckets."""
NUM_BUCKETS = EXACT + 4 * 27
"""Enough for 31 bits."""
OWN_TABLE = 256
"""Values that a context must have to get a table of its own; the rest of a field share one."""


class Coder(Protocol):
    """One direction of the codec."""

    def integers(self, field: int, context: Int64Array, lane: Int64Array, values: Int64Array | None) -> Int64Array:
        """Code values [n] of a field, each in its context and lane; lanes non-decreasing. Returns the values."""
        ...


@dataclass(frozen=True, eq=False)
class Layout:
    """How rows are cut into lanes: row r owns the lanes `lane_offsets[r]:lane_offsets[r + 1]`."""

    lane_offsets: Int64Array  # [N + 1]
    lane: Int64Array  # [P], the lane of each position

    @property
    def num_lanes(self) -> int:
        """Lanes of all rows, L."""
        return int(self.lane_offsets[-1])

    @property
    def row_of_lane(self) -> Int64Array:
        """Return the row of each lane, [L]."""
        return np.repeat(np.arange(len(self.lane_offsets) - 1), np.diff(self.lane_offsets))

    @classmethod
    def of(cls, positions: Int64Array, lane_positions: int) -> "Layout":
        """Give each row, of so many positions [N], a lane for every `lane_positions` of them."""
        lane_offsets = offsets_of(-(-positions // lane_positions))
        within = np.arange(positions.sum()) - np.repeat(offsets_of(positions)[:-1], positions)
        return cls(lane_offsets, np.repeat(lane_offsets[:-1], positions) + within // lane_positions)


def bucket_of(values: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the bucket of each value and the number of raw bits below it."""
    octave = np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1  # floor(log2)
    width = np.where(values < EXACT, 0, octave - 2)
    return np.where(values < EXACT, values, EXACT + 4 * (octave - 4) + ((values >> width) & 3)), width


_BUCKETS = np.arange(NUM_BUCKETS, dtype=np.int64)
_WIDTH = np.where(_BUCKETS < EXACT, 0, (_BUCKETS - EXACT) // 4 + 2)
_BASE = np.where(_BUCKETS < EXACT, _BUCKETS, (4 + (_BUCKETS - EXACT) % 4) << _WIDTH)


class Recorder:
    """Notes what is coded."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, Int64Array, Int64Array, Int64Array]] = []

    def integers(self, field: int, context: Int64Array, lane: Int64Array, values: Int64Array | None) -> Int64Array:
        """Note values; see `Coder`."""
        assert values is not None
        self._calls.append((field, context, lane, values))
        return values

    def pack(self, layout: Layout) -> tuple["Tables", list[bytes]]:
        """Return the frequencies and the packed rows."""
        keys = np.concatenate([field * MAX_CONTEXTS + context for field, context, _, _ in self._calls])
        lane = np.concatenate([lane for _, _, lane, _ in self._calls])
        bucket, width = bucket_of(np.concatenate([values for *_, values in self._calls]))
        low = np.concatenate([values for *_, values in self._calls]) & ((1 << width) - 1)
        tables = Tables.count(keys, bucket)
        number = tables.number(keys)
        start = tables.starts[number, bucket].astype(np.int64)
        frequency = tables.starts[number, bucket + 1].astype(np.int64) - start
        lanes = encode_lanes(lane, start, frequency, layout.num_lanes)
        return tables, _join_rows(layout, lanes, *_pack_bits(layout.row_of_lane[lane], low, width, layout))


MAX_CONTEXTS = 1 << 16
"""Contexts of one field are below this."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Frequencies of the buckets: one table for each field, and one for each of its contexts that is used enough."""

    keys: Int64Array  # [T], rising: field · MAX_CONTEXTS + context, or the field's last key for what is shared
    levels: UInt8Array  # [T, NUM_BUCKETS], frequencies on a logarithmic scale, 0 where there are none
    starts: NDArray[np.uint16]  # [T, NUM_BUCKETS + 1], cumulated

    @classmethod
    def count(cls, keys: Int64Array, bucket: Int64Array) -> "Tables":
        """Count buckets by key."""
        known, place, times = np.unique(keys, return_inverse=True, return_counts=True)
        shared = _shared(known)
        target = np.where(times >= OWN_TABLE, known, shared)
        kept, row = np.unique(target, return_inverse=True)
        counts = np.bincount(row[place] * NUM_BUCKETS + bucket, minlength=len(kept) * NUM_BUCKETS)
        return cls.of(kept, _levels_of(counts.reshape(len(kept), NUM_BUCKETS)))

    @classmethod
    def of(cls, keys: Int64Array, levels: UInt8Array) -> "Tables":
        """Build tables from what is stored of them."""
        weights = _weights(levels)
        starts = np.zeros((len(keys), NUM_BUCKETS + 1), dtype=np.uint16)
        np.cumsum(_normalised(weights), axis=1, out=starts[:, 1:])
        return cls(keys, levels, starts)

    def number(self, keys: Int64Array) -> Int64Array:
        """Return the number of each key's table; IntegrityError where there is none."""
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        other = np.searchsorted(self.keys, _shared(keys))
        found = np.where(self.keys[at] == keys, at, np.minimum(other, len(self.keys) - 1))
        if ((self.keys[found] != keys) & (self.keys[found] != _shared(keys))).any():
            raise IntegrityError("a packed stream uses a table that is not in its codebook")
        return found

    def to_bytes(self) -> bytes:
        """Return the tables as bytes."""
        return len(self.keys).to_bytes(4, "little") + self.keys.astype("<u4").tobytes() + self.levels.tobytes()

    @classmethod
    def from_bytes(cls, raw: memoryview) -> tuple["Tables", memoryview]:
        """Return the tables and what stands behind them."""
        size = int.from_bytes(raw[:4], "little")
        end = 4 + size * (4 + NUM_BUCKETS)
        if size == 0 or len(raw) < end:
            raise IntegrityError("a codebook is too short")
        keys = np.frombuffer(raw, "<u4", size, 4).astype(np.int64)
        levels = np.frombuffer(raw, np.uint8, size * NUM_BUCKETS, 4 + 4 * size).reshape(size, NUM_BUCKETS)
        if (np.diff(keys) <= 0).any() or not levels.any(axis=1).all():
            raise IntegrityError("a codebook holds no tables that could have been written")
        return cls.of(keys, levels), raw[end:]


class Unpacker:
    """Returns what was packed."""

    def __init__(self, tables: Tables, layout: Layout, rows: list[memoryview]) -> None:
        lanes, self._bits, self._bit_end = _split_rows(layout, rows)
        self._tables = tables
        self._lanes = LaneReader(lanes)
        self._row_of_lane = layout.row_of_lane
        self._bit_at = np.concatenate([[0], self._bit_end[:-1]]) if len(rows) else np.zeros(0, dtype=np.int64)
        points = np.asarray(tables.starts[:, 1:] - tables.starts[:, :-1], dtype=np.int64)
        names = np.tile(_BUCKETS.astype(np.uint8), len(tables.keys))
        self._symbols = np.repeat(names, points.reshape(-1)).reshape(len(tables.keys), 1 << PROB_BITS)

    def integers(self, field: int, context: Int64Array, lane: Int64Array, values: Int64Array | None) -> Int64Array:
        """Return the next values; see `Coder`."""
        number = self._tables.number(field * MAX_CONTEXTS + context)
        bucket = self._lanes.take(lane, number, self._symbols, self._tables.starts)
        width = _WIDTH[bucket]
        return _BASE[bucket] + self._raw(self._row_of_lane[lane], width)

    def _raw(self, row: Int64Array, width: Int64Array) -> Int64Array:
        """Return the next raw bits of each row, in order."""
        if not width.any():
            return np.zeros(len(row), dtype=np.int64)
        ends = np.cumsum(width)
        edges = np.flatnonzero(np.diff(row, prepend=-1))
        base = np.repeat(ends[edges] - width[edges], np.diff(edges, append=len(row)))
        at = self._bit_at[row] + ends - width - base
        last = np.append(edges[1:], len(row)) - 1
        self._bit_at[row[last]] = at[last] + width[last]
        if (self._bit_at > self._bit_end).any():
            raise IntegrityError("a packed stream ends too early")
        byte = at >> 3
        word = self._bits[byte].astype(np.int64)
        for n in range(1, 5):
            word |= self._bits[byte + n].astype(np.int64) << (8 * n)
        return np.asarray((word >> (at & 7)) & ((1 << width) - 1))

    def finish(self) -> None:
        """Raise IntegrityError unless everything was read to the very end."""
        self._lanes.finish()
        if (self._bit_end - self._bit_at >= 8).any():
            raise IntegrityError("a packed stream does not end where it should")


def _shared(keys: Int64Array) -> Int64Array:
    return keys | (MAX_CONTEXTS - 1)


def _levels_of(counts: Int64Array) -> UInt8Array:
    """Return counts on a scale of 4 steps to the octave, rounded, at least 1 where there is any."""
    scaled = np.round(4 * np.log2(np.maximum(counts, 1))) + 1
    return np.where(counts > 0, scaled, 0).astype(np.uint8)


def _weights(levels: UInt8Array) -> Int64Array:
    """Return what levels stand for; integers all through, so that every machine gets the same tables."""
    steps = np.array([16, 19, 23, 27], dtype=np.int64)  # 16 · 2^(n/4)
    step = np.maximum(levels.astype(np.int64) - 1, 0)
    return np.where(levels > 0, steps[step % 4] << (step // 4), 0)


def _normalised(weights: Int64Array) -> Int64Array:
    """Scale rows of weights to add up to 2^PROB_BITS, at least 1 where there is any weight."""
    total = 1 << PROB_BITS
    scaled = weights * total // weights.sum(axis=1, keepdims=True)
    scaled = np.where((weights > 0) & (scaled == 0), 1, scaled)
    largest = scaled.argmax(axis=1)
    scaled[np.arange(len(scaled)), largest] += total - scaled.sum(axis=1)
    return scaled


def _pack_bits(row: Int64Array, values: Int64Array, width: Int64Array, layout: Layout) -> tuple[UInt8Array, Int64Array]:
    """Return the raw bits of each row, lowest first, padded to bytes, and where each row's bytes begin, [N + 1]."""
    wide = np.flatnonzero(width)
    order = wide[np.argsort(row[wide], kind="stable")]
    widths, rows = width[order], row[order]
    num_rows = len(layout.lane_offsets) - 1
    in_row = np.bincount(rows, weights=widths, minlength=num_rows).astype(np.int64)
    byte_offsets = offsets_of(-(-in_row // 8))
    begin = offsets_of(widths)[:-1] + (8 * byte_offsets[:-1] - offsets_of(in_row)[:-1])[rows]
    within = np.arange(widths.sum()) - np.repeat(offsets_of(widths)[:-1], widths)
    bits = np.zeros(8 * byte_offsets[-1], dtype=np.uint8)
    bits[np.repeat(begin, widths) + within] = (np.repeat(values[order], widths) >> within) & 1
    return np.packbits(bits, bitorder="little"), byte_offsets


def _join_rows(layout: Layout, lanes: Lanes, bits: UInt8Array, bit_offsets: Int64Array) -> list[bytes]:
    """Return each row: checksum, then of its lanes the states, the numbers of words, the words, then the raw bits."""
    rows = []
    count = np.diff(lanes.offsets).astype("<u4")
    for first, last, low, high in zip(
        layout.lane_offsets[:-1], layout.lane_offsets[1:], bit_offsets[:-1], bit_offsets[1:], strict=True
    ):
        words = lanes.words[lanes.offsets[first] : lanes.offsets[last]].astype("<u2")
        parts = [lanes.state[first:last].astype("<u4"), count[first:last], words, bits[low:high]]
        body = b"".join(part.tobytes() for part in parts)
        rows.append(crc32(body).to_bytes(4, "little") + body)
    return rows


def _split_rows(layout: Layout, rows: list[memoryview]) -> tuple[Lanes, UInt8Array, Int64Array]:
    """Return the lanes of all rows, their raw bits end to end, and where each row's bits end, in bits."""
    state, count, words, bits = [], [], [], []
    for raw, num in zip(rows, np.diff(layout.lane_offsets).tolist(), strict=True):
        body = raw[4:]
        if len(raw) < 4 + 8 * num or crc32(body) != int.from_bytes(raw[:4], "little"):
            raise IntegrityError("a packed row is damaged: its checksum does not match")
        state.append(np.frombuffer(body, "<u4", num))
        count.append(np.frombuffer(body, "<u4", num, 4 * num).astype(np.int64))
        size = int(count[-1].sum())
        if len(body) < 8 * num + 2 * size:
            raise IntegrityError("a packed row is shorter than it says")
        words.append(np.frombuffer(body, "<u2", size, 8 * num))
        bits.append(np.frombuffer(body, np.uint8, offset=8 * num + 2 * size))
    lanes = Lanes(
        np.concatenate([*state, np.zeros(0, np.uint32)]).astype(np.uint32),
        offsets_of(np.concatenate([*count, np.zeros(0, np.int64)])),
        np.concatenate([*words, np.zeros(0, np.uint16)]).astype(np.uint16),
    )
    ends = 8 * np.cumsum([len(part) for part in bits])
    return lanes, np.concatenate([*bits, np.zeros(8, np.uint8)]), ends
