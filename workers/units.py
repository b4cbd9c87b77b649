"""Work units: the samples that are scored together and committed together. Planning is a pure function."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from storage.samples import ID_BYTES, Int64Array, UInt8Array


@dataclass(frozen=True)
class WorkUnit:
    """Some rows of the sample set and how many tokens they hold."""

    unit_id: str
    """Hex hash of the dataset's fingerprint and of the sample ids in order."""
    rows: tuple[int, ...]
    """Rows of the sample set, rising."""
    num_tokens: int


class UnitPlan(Sequence[WorkUnit]):
    """All units of a piece of work; each is made when it is asked for, so that a million cost what their rows cost."""

    def __init__(
        self, rows: Int64Array, ends: Int64Array, num_tokens: Int64Array, sample_ids: UInt8Array, fingerprint: str
    ) -> None:
        """`rows` int64 [R] in order, unit n being `rows[ends[n - 1]:ends[n]]`; the rest as in `plan_units`."""
        self._rows, self._ends = rows, ends
        self._num_tokens, self._sample_ids, self._fingerprint = num_tokens, sample_ids, fingerprint.encode()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> WorkUnit:  # type: ignore[override]
        """Return one unit; slices are not served."""
        end = int(self._ends[index])
        position = index % len(self._ends)
        rows = self._rows[int(self._ends[position - 1]) if position else 0 : end]
        digest = blake2b(self._fingerprint, digest_size=16, person=b"lectern.unit")
        digest.update(np.ascontiguousarray(self._sample_ids[rows]).reshape(-1, ID_BYTES).tobytes())
        return WorkUnit(digest.hexdigest(), tuple(rows.tolist()), int(self._num_tokens[rows].sum()))

    def __iter__(self) -> Iterator[WorkUnit]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnitPlan) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def tokens(self) -> int:
        """Tokens of all units."""
        return int(self._num_tokens[self._rows].sum())

    def rotated(self, start: int) -> Sequence[WorkUnit]:
        """Return the units beginning with number `start` modulo their count."""
        return _Rotated(self, start)


class _Rotated(Sequence[WorkUnit]):
    def __init__(self, plan: UnitPlan, start: int) -> None:
        self._plan, self._start = plan, start

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> WorkUnit:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._plan[(index + self._start) % len(self)]


def unit_of(
    rows: Sequence[int] | Int64Array, num_tokens: Int64Array, sample_ids: UInt8Array, fingerprint: str
) -> WorkUnit:
    """Return rows of a sample set as one unit: what is left of a unit when some of its samples are not."""
    (whole,) = plan_units(rows, num_tokens, sample_ids, fingerprint, unit_tokens=1 << 62)
    return whole


def plan_units(
    rows: Sequence[int] | Int64Array,
    num_tokens: Int64Array,
    sample_ids: UInt8Array,
    fingerprint: str,
    unit_tokens: int,
    asked: Sequence[int] | Int64Array | None = None,
) -> UnitPlan:
    """Cut rows, in rising order, into units of about `unit_tokens` tokens; a sample is never split.

    The cuts are made in `asked`, not in `rows`: whoever plans the same samples, whatever of them is done by then,
    gets the same units, and of two who work at once only one commits each. Units of which a part is done are put
    together with their neighbours of that sort.

    Args:
        rows: rows of the sample set still to be scored, each once, in any order.
        num_tokens: tokens of every row of the sample set, [N].
        sample_ids: ids of every row of the sample set, uint8 [N, 16].
        fingerprint: identity of the dataset; part of each unit's id.
        unit_tokens: a unit closes with the sample that reaches this many tokens.
        asked: all rows that the dataset shall hold in the end, `rows` among them; none means `rows`.
    """
    missing = np.unique(np.asarray(rows, dtype=np.int64))
    if not len(missing):
        return UnitPlan(missing, np.zeros(0, dtype=np.int64), num_tokens, sample_ids, fingerprint)
    whole = missing if asked is None else np.union1d(missing, np.asarray(asked, dtype=np.int64))
    ends = np.cumsum(num_tokens[whole])
    # Balanced: as many units as needed, each with its share of the tokens.
    num_units = max(1, int(np.ceil(ends[-1] / unit_tokens)))
    cut = np.minimum((ends - 1) * num_units // ends[-1], num_units - 1)
    unit_of_row = cut[np.searchsorted(whole, missing)]
    unit_of_row = _join_remains(unit_of_row, np.bincount(cut, minlength=num_units), num_tokens[missing], unit_tokens)
    borders = np.append(np.flatnonzero(np.diff(unit_of_row)) + 1, len(missing)).astype(np.int64)
    return UnitPlan(missing, borders, num_tokens, sample_ids, fingerprint)


def _join_remains(unit_of_row: Int64Array, whole_rows: Int64Array, tokens: Int64Array, unit_tokens: int) -> Int64Array:
    """Give neighbouring units that are not whole one number, as long as together they hold `unit_tokens` or less.

    `unit_of_row` [R] rises; `whole_rows` [U] counts the rows of each unit before anything was done.
    """
    numbers, first, rows = np.unique(unit_of_row, return_index=True, return_counts=True)
    sizes = np.add.reduceat(tokens, first)
    partial = rows < whole_rows[numbers]
    if not partial.any():
        return unit_of_row
    joined = numbers.copy()
    total = 0
    for n in range(len(numbers)):
        fits = n > 0 and partial[n] and partial[n - 1] and total + sizes[n] <= unit_tokens
        total = total + sizes[n] if fits else sizes[n]
        joined[n] = joined[n - 1] if fits else numbers[n]
    return np.repeat(joined, rows)
