"""A decoded shard held open, and the copy of any of its rows into one batch.

Rows are copied in runs: one slice per column for rows that follow each other, whatever their number of entries. No
index over entries is ever built, so a batch costs little more than its bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from storage.samples import Int64Array, SampleBatch, offsets_of
from storage.targets import TargetBatch

Shard = tuple[SampleBatch, TargetBatch]


BOUNDS = ("tokens", "positions", "entries", "states", "weights")
"""What rows own several of: tokens, supervised positions, entries, hidden states, attention weights."""


@dataclass(frozen=True, eq=False)
class OpenShard:
    """A shard of N rows in memory, or mapped from a file."""

    samples: SampleBatch
    targets: TargetBatch
    bounds: Mapping[str, Int64Array]  # what → [N + 1], how many of them come before each row

    @classmethod
    def of(cls, shard: Shard) -> Self:
        """Hold a decoded shard."""
        samples, targets = shard
        attention = targets.attention_count
        weights = np.zeros(1, np.int64) if attention is None else offsets_of(attention.astype(np.int64))
        bounds = {
            "tokens": samples.offsets,
            "positions": targets.offsets,
            "entries": targets.entry_offsets[targets.offsets],
            "states": targets.state_offsets,
            "weights": np.zeros_like(targets.offsets) if attention is None else weights[targets.offsets],
        }
        return cls(samples, targets, bounds)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return num_bytes((self.samples, self.targets)) + sum(array.nbytes for array in self.bounds.values())


def num_bytes(shard: Shard) -> int:
    """Return the bytes of a batch's arrays."""
    samples, targets = shard
    fields = [*vars(samples).values(), *vars(targets).values()]
    arrays = [*fields, *targets.hidden.values(), *targets.attention.values()]
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


@dataclass(frozen=True, eq=False)
class Run:
    """Rows `first` to `last` of a shard."""

    shard: OpenShard
    first: int
    last: int

    def copied(self) -> "Run":
        """Return the same rows in memory of their own, so that the shard may go."""
        return Run(OpenShard.of(join([self])), 0, self.last - self.first)


def runs_of(units: NDArray[np.int32], rows: NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """Return (unit, first row, last row + 1) of the longest runs of rows that follow each other, in order."""
    starts = np.ones(len(units), dtype=np.bool_)
    starts[1:] = (units[1:] != units[:-1]) | (rows[1:] != rows[:-1] + 1)
    begins = np.flatnonzero(starts)
    lengths = np.diff(np.append(begins, len(units)))
    firsts = rows[begins]
    return list(zip(units[begins].tolist(), firsts.tolist(), (firsts + lengths).tolist(), strict=True))


def join(runs: Sequence[Run]) -> Shard:
    """Return the rows of all runs as one batch, copied: nothing of the shards is kept alive."""
    all_samples, all_targets = [run.shard.samples for run in runs], [run.shard.targets for run in runs]
    cuts, offsets = _cuts(runs)
    draws = [t.draws[:, cut] for t, cut in zip(all_targets, cuts["entries"], strict=True) if t.draws is not None]
    first = all_targets[0]

    def sample(name: str, level: str) -> NDArray[Any]:
        return _joined([getattr(s, name) for s in all_samples], cuts[level])

    def target(name: str, level: str) -> NDArray[Any]:
        return _joined([getattr(t, name) for t in all_targets], cuts[level])

    samples = SampleBatch(
        sample_id=sample("sample_id", "rows"),
        source=[name for s, cut in zip(all_samples, cuts["rows"], strict=True) for name in s.source[cut]],
        offsets=offsets["tokens"],
        tokens=sample("tokens", "tokens"),
        supervised=sample("supervised", "tokens"),
        document=sample("document", "tokens"),
    )
    return samples, TargetBatch(
        offsets=offsets["positions"],
        count=target("count", "positions"),
        id=target("id", "entries"),
        logprob=target("logprob", "entries"),
        draws=np.concatenate(draws, axis=1) if draws else None,
        tail_mass=target("tail_mass", "positions"),
        teacher_nll=target("teacher_nll", "rows"),
        teacher_entropy=target("teacher_entropy", "rows"),
        hidden={k: _joined([t.hidden[k] for t in all_targets], cuts["states"]) for k in first.hidden},
        hidden_kept=None if first.hidden_kept is None else target("hidden_kept", "positions"),
        attention={k: _joined([t.attention[k] for t in all_targets], cuts["weights"]) for k in first.attention},
        attention_count=None if first.attention_count is None else target("attention_count", "positions"),
    )


def _cuts(runs: Sequence[Run]) -> tuple[dict[str, list[slice]], dict[str, Int64Array]]:
    """Return what the rows of each run own of every kind of column, and the offsets of all rows together."""
    targets = runs[0].shard.targets
    unused = {"states": not targets.hidden, "weights": not targets.attention}
    cuts = {"rows": [slice(run.first, run.last) for run in runs]}
    offsets = {}
    for level in BOUNDS:
        if unused.get(level):
            continue
        bounds = [run.shard.bounds[level] for run in runs]
        ends = [(int(b[run.first]), int(b[run.last])) for b, run in zip(bounds, runs, strict=True)]
        cuts[level] = [slice(*pair) for pair in ends]
        if level in {"tokens", "positions"}:
            lengths = [
                np.diff(b[run.first : run.last + 1]) if run.last - run.first > 1 else (pair[1] - pair[0],)
                for b, run, pair in zip(bounds, runs, ends, strict=True)
            ]
            offsets[level] = offsets_of(np.concatenate(lengths))
    return cuts, offsets


def _joined(arrays: Sequence[NDArray[Any]], cuts: Sequence[slice]) -> NDArray[Any]:
    return np.concatenate([array[cut] for array, cut in zip(arrays, cuts, strict=True)])
