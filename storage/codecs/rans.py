"""Range asymmetric numeral systems (Duda 2013) in many lanes at once, each step vectorised over the lanes.

A lane is a stack of symbols with a 32-bit state of its own and 16-bit words behind it. A symbol of frequency f out of
2^PROB_BITS costs log2(2^PROB_BITS / f) bits. Encoding runs backwards, so that decoding runs forwards.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.errors import IntegrityError
from storage.samples import Int64Array, offsets_of

UInt16Array = NDArray[np.uint16]
UInt32Array = NDArray[np.uint32]

PROB_BITS = 12
LOWEST = 1 << 16
"""A lane's state at its start, and the least it may be between symbols."""


@dataclass(frozen=True, eq=False)
class Lanes:
    """The finished lanes: lane l owns `words[offsets[l]:offsets[l + 1]]`."""

    state: UInt32Array  # [L]
    offsets: Int64Array  # [L + 1]
    words: UInt16Array  # [W], in the order in which decoding wants them


def encode_lanes(lane: Int64Array, start: Int64Array, frequency: Int64Array, num_lanes: int) -> Lanes:
    """Encode symbols, given by their intervals of cumulated frequency, into lanes.

    Args:
        lane: which lane each symbol goes to, [S]; a lane's symbols come out in the order in which they stand here.
        start: where the symbol's interval begins, [S], out of 2^PROB_BITS.
        frequency: its width, [S], at least 1.
        num_lanes: L; lanes without symbols are allowed.
    """
    order = np.argsort(lane, kind="stable")
    start, frequency = start[order].astype(np.uint64), frequency[order].astype(np.uint64)
    length = np.bincount(lane, minlength=num_lanes)
    first = offsets_of(length)[:-1]
    longest_first = np.argsort(-length, kind="stable")
    ranked_length, ranked_first = length[longest_first], first[longest_first]
    state = np.full(num_lanes, LOWEST, dtype=np.uint64)  # in the order of longest_first
    owners, words = [], []
    bits, limit = np.uint64(PROB_BITS), np.uint64(32 - PROB_BITS)
    for step in range(int(length.max(initial=0)) - 1, -1, -1):
        num = int(np.searchsorted(-ranked_length, -step, side="left"))
        at = ranked_first[:num] + step
        f, x = frequency[at], state[:num]
        full = np.flatnonzero(x >= f << limit)
        if len(full):
            owners.append(longest_first[full])
            words.append((x[full] & np.uint64(0xFFFF)).astype(np.uint16))
            x[full] >>= np.uint64(16)
        quotient = x // f
        state[:num] = (quotient << bits) + (x - quotient * f) + start[at]
    owner = np.concatenate([*owners, np.zeros(0, dtype=np.int64)])[::-1]
    flat = np.concatenate([*words, np.zeros(0, dtype=np.uint16)])[::-1]
    final = np.empty(num_lanes, dtype=np.uint32)
    final[longest_first] = state
    in_lanes = flat[np.argsort(owner, kind="stable")]
    return Lanes(final, offsets_of(np.bincount(owner, minlength=num_lanes)), in_lanes)


class LaneReader:
    """Takes symbols out of lanes."""

    def __init__(self, lanes: Lanes) -> None:
        self._state = lanes.state.astype(np.uint64)
        self._next = lanes.offsets[:-1].copy()
        self._end = lanes.offsets[1:]
        self._words = np.append(lanes.words, np.uint16(0)).astype(np.uint64)

    def take(
        self, lane: Int64Array, table: Int64Array, symbols: NDArray[np.uint8], starts: UInt16Array
    ) -> NDArray[np.uint8]:
        """Return the next symbols, [S].

        Args:
            lane: non-decreasing, [S]; a lane named m times gives m symbols in order.
            table: which table each symbol is coded with, [S].
            symbols: symbol at each point of each table, [tables, 2^PROB_BITS].
            starts: cumulated frequency of the symbols of each table, [tables, A + 1].

        Raises:
            IntegrityError: a lane has too few words.
        """
        out = np.empty(len(lane), dtype=np.uint8)
        if not len(lane):
            return out
        edges = np.flatnonzero(np.diff(lane, prepend=-1))
        length = np.diff(edges, append=len(lane))
        state, mask, bits = self._state, np.uint64((1 << PROB_BITS) - 1), np.uint64(PROB_BITS)
        for step in range(int(length.max())):
            at = (edges if step == 0 else edges[length > step]) + step
            lanes, tables = lane[at], table[at]
            x = state[lanes]
            point = x & mask
            symbol = symbols[tables, point]
            begin = starts[tables, symbol].astype(np.uint64)
            x = (starts[tables, symbol + np.intp(1)] - begin) * (x >> bits) + point - begin
            low = np.flatnonzero(x < LOWEST)
            if len(low):
                x[low] = (x[low] << np.uint64(16)) | self._next_words(lanes[low])
            state[lanes] = x
            out[at] = symbol
        return out

    def _next_words(self, lanes: Int64Array) -> NDArray[np.uint64]:
        at = self._next[lanes]
        if (at >= self._end[lanes]).any():
            raise IntegrityError("a packed stream ends too early")
        self._next[lanes] = at + 1
        return self._words[at]

    def finish(self) -> None:
        """Raise IntegrityError unless every lane was read to its very end."""
        if (self._next != self._end).any() or (self._state != LOWEST).any():
            raise IntegrityError("a packed stream does not end where it should")
