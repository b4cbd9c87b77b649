"""How far two captures of the same samples are apart."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError
from storage.targets import TargetBatch

KINDS_WITH_LOGPROBS = frozenset({"topk", "hybrid", "dense"})


@dataclass(frozen=True)
class Spread:
    """The distribution of absolute differences, nats."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, differences: NDArray[np.float64]) -> "Spread":
        """Summarise differences of any shape; at least one."""
        values = np.abs(differences)
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return cls(float(values.mean()), float(p50), float(p90), float(p99), float(values.max()))


@dataclass(frozen=True)
class Difference:
    """Two captures, the first as stored, the second scored again."""

    of: str
    """What was compared: `logprob` of entries, or `nll`, the mean loss of samples, for kinds without the former."""
    compared: int
    """Entries, or samples."""
    unmatched: float
    """Share of the first capture's entries that the second did not keep."""
    top1_agreement: float | None
    """Share of positions with the same first entry."""
    spread: Spread


def compare(stored: TargetBatch, again: TargetBatch, kind: str) -> Difference:
    """Return how the targets of the same samples, in the same order, differ.

    Raises:
        InputError: they are not those of the same samples, or there is nothing to compare.
    """
    if not np.array_equal(stored.offsets, again.offsets) or not stored.num_positions:
        raise InputError("the two captures are not of the same samples with at least one supervised position")
    if kind not in KINDS_WITH_LOGPROBS:
        loss = stored.teacher_nll.astype(np.float64) - again.teacher_nll
        return Difference("nll", len(loss), 0.0, None, Spread.of(loss))
    size = int(max(stored.id.max(), again.id.max())) + 1
    left, right = (
        np.repeat(np.arange(batch.num_positions, dtype=np.int64), batch.count) * size + batch.id
        for batch in (stored, again)
    )
    _, mine, theirs = np.intersect1d(left, right, assume_unique=True, return_indices=True)
    if not len(mine):
        raise InputError("the two captures have no entry in common: the teacher is another one")
    apart = stored.logprob[mine].astype(np.float64) - again.logprob[theirs].astype(np.float64)
    first = stored.id[stored.entry_offsets[:-1]] == again.id[again.entry_offsets[:-1]]
    return Difference("logprob", len(mine), 1 - len(mine) / len(left), float(first.mean()), Spread.of(apart))
