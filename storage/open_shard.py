"""A decoded shard held open, and the copy of any of its rows into one batch.

Rows are copied in runs: one slice per column for rows that follow each other, whatever their number of entries. No
index over entries is ever built, so a batch costs little more than its bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

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
    def columns(self) -> dict[str, Mapping[str, NDArray[Any]]]:
        """What rows own one of, and each of `BOUNDS` → the columns that hold one for each, without the draws."""
        samples, targets = self.samples, self.targets
        positions: dict[str, NDArray[Any] | None] = {
            "count": targets.count,
            "tail_mass": targets.tail_mass,
            "hidden_kept": targets.hidden_kept,
            "attention_count": targets.attention_count,
        }
        return {
            "rows": {
                "sample_id": samples.sample_id,
                "teacher_nll": targets.teacher_nll,
                "teacher_entropy": targets.teacher_entropy,
            },
            "tokens": {"tokens": samples.tokens, "supervised": samples.supervised, "document": samples.document},
            "positions": {name: array for name, array in positions.items() if array is not None},
            "entries": {"id": targets.id, "logprob": targets.logprob},
            "states": targets.hidden,
            "weights": targets.attention,
        }

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


class Run(NamedTuple):
    """Rows `first` to `last` of a shard."""

    shard: OpenShard
    first: int
    last: int

    def copied(self) -> "Run":
        """Return the same rows in memory of their own, so that the shard may go."""
        return Run(OpenShard.of(join([self])), 0, self.last - self.first)


def runs_of(units: NDArray[np.int32], rows: NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """Return (unit, first row, last row + 1) of the longest runs of rows that follow each other, in order."""
    runs: list[tuple[int, int, int]] = []
    for unit, row in zip(units.tolist(), rows.tolist(), strict=True):
        if runs and runs[-1][0] == unit and runs[-1][2] == row:
            runs[-1] = (unit, runs[-1][1], row + 1)
        else:
            runs.append((unit, row, row + 1))
    return runs


def join(runs: Sequence[Run]) -> Shard:
    """Return the rows of all runs as one batch, copied: nothing of the shards is kept alive."""
    columns = [run.shard.columns for run in runs]
    cuts, offsets = _cuts(runs)
    found = {
        level: {name: _joined([own[level][name] for own in columns], cuts[level]) for name in columns[0][level]}
        for level in columns[0]
    }
    draws = [run.shard.targets.draws for run in runs]
    samples = SampleBatch(
        sample_id=found["rows"].pop("sample_id"),
        source=[name for run in runs for name in run.shard.samples.source[run.first : run.last]],
        offsets=offsets["tokens"],
        **found["tokens"],
    )
    return samples, TargetBatch(
        offsets=offsets["positions"],
        draws=None if draws[0] is None else _joined(draws, [(slice(None), cut) for cut in cuts["entries"]], axis=1),
        hidden=found["states"],
        attention=found["weights"],
        **found["rows"],
        **found["positions"],
        **found["entries"],
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
        ends = [run.shard.bounds[level][run.first : run.last + 1].tolist() for run in runs]
        cuts[level] = [slice(own[0], own[-1]) for own in ends]
        if level in {"tokens", "positions"}:
            joined = [0]
            for own in ends:
                shift = joined[-1] - own[0]
                joined += [end + shift for end in own[1:]]
            offsets[level] = np.asarray(joined, dtype=np.int64)
    return cuts, offsets


def _joined(arrays: Sequence[Any], cuts: Sequence[Any], axis: int = 0) -> NDArray[Any]:
    parts = [array[cut] for array, cut in zip(arrays, cuts, strict=True)]
    # Rows that follow each other are one slice: a plain copy is quicker.
    return parts[0].copy() if len(parts) == 1 else np.concatenate(parts, axis=axis)
