"""Sparse targets in memory: what the teacher said about the supervised positions of a batch of samples.

Positions run over the supervised positions of all samples, in order; entries run over the kept tokens of
all positions, in order. Position p owns `entry_offsets[p]:entry_offsets[p+1]`.

How an estimate t̂ of the teacher's distribution is read from the entries, per position:

* `topk`, `dense`: t̂ = exp(logprob) on the entries, `tail_mass` beyond them.
* `hybrid`: entries that were never drawn are the exact head, t̂ = exp(logprob). The n draws of a set share the mass
  outside the head, M = tail_mass + Σ exp(logprob of drawn entries): t̂ = M · draws / n.
* `hybrid_counts`: the same estimate, but the log-probabilities of drawn entries are not the teacher's: they are the log
  of t̂ itself, over all sets, so that they and the head leave a `tail_mass` of 0.
* `sampled`: t̂ = draws / n; `logprob` is the log of this, over all sets, and `tail_mass` is 0: neither is stored.
* `text`: no entries, and so a `tail_mass` of 1.

`hybrid…` and `sampled` are unbiased for any loss linear in t̂. R independent sets of draws lie side by side: the entries
are those of all sets, and `draw_set` gives one of them by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from storage.samples import BoolArray, Int32Array, Int64Array, UInt8Array, offsets_of, ragged_index

Float16Array = NDArray[np.float16]
Float32Array = NDArray[np.float32]

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class TargetBatch:
    """Targets of N samples with P supervised positions and E entries in all."""

    offsets: Int64Array  # [N + 1], in positions
    count: Int32Array  # [P], entries kept at each position
    id: Int32Array  # [E], token ids; within a position: head by falling probability, then drawn by rising id
    logprob: Float16Array  # [E], natural log at T = 1
    draws: UInt8Array | None  # [R, E], all 0 = kept for its rank; only for kinds with draws
    tail_mass: Float16Array  # [P], teacher probability outside the kept entries
    teacher_nll: Float32Array  # [N], mean over the sample's supervised positions, nats
    teacher_entropy: Float32Array  # [N], mean over the sample's supervised positions, nats
    hidden: Mapping[str, NDArray[np.generic]] = field(
        default_factory=dict
    )  # layer → [K, columns], see `storage.hidden`
    hidden_kept: BoolArray | None = None  # [P], the K positions that keep states and attention; None = all of them
    attention: Mapping[str, Float16Array] = field(default_factory=dict)  # layer → [A], rows of kept positions, joined
    attention_count: Int32Array | None = None  # [P], length of each position's row, 0 where none is kept

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_positions(self) -> int:
        """Supervised positions of all samples."""
        return len(self.count)

    @property
    def num_draw_sets(self) -> int:
        """Independent sets of draws, R; 1 for kinds without draws."""
        return 1 if self.draws is None else len(self.draws)

    @property
    def drawn(self) -> BoolArray:
        """Whether each entry was drawn, in any set, rather than kept for its rank, [E]."""
        return np.zeros(len(self.id), np.bool_) if self.draws is None else np.asarray(self.draws.any(axis=0))

    @property
    def entry_offsets(self) -> Int64Array:
        """Where each position's entries start and end, [P + 1]."""
        return offsets_of(self.count.astype(np.int64))

    @property
    def state_offsets(self) -> Int64Array:
        """Where each sample's kept states start and end, [N + 1]."""
        if self.hidden_kept is None:
            return self.offsets
        return np.concatenate(([0], np.cumsum(self.hidden_kept, dtype=np.int64)))[self.offsets]

    def take(self, rows: Sequence[int]) -> "TargetBatch":
        """Return the targets of the samples at `rows`, in that order."""
        picked = list(rows)
        positions = ragged_index(self.offsets, picked)
        entries = ragged_index(self.entry_offsets, positions)  # type: ignore[arg-type]
        return TargetBatch(
            offsets=offsets_of(np.diff(self.offsets)[picked]),
            count=self.count[positions],
            id=self.id[entries],
            logprob=self.logprob[entries],
            draws=None if self.draws is None else self.draws[:, entries],
            tail_mass=self.tail_mass[positions],
            teacher_nll=self.teacher_nll[picked],
            teacher_entropy=self.teacher_entropy[picked],
            **self._take_states(picked, positions),
        )

    def _take_states(self, rows: list[int], positions: Int64Array) -> dict[str, Any]:
        states = ragged_index(self.state_offsets, rows)
        count = self.attention_count
        weights = None if count is None else ragged_index(offsets_of(count.astype(np.int64)), positions.tolist())
        return {
            "hidden": {layer: values[states] for layer, values in self.hidden.items()},
            "hidden_kept": None if self.hidden_kept is None else self.hidden_kept[positions],
            "attention": {layer: values[weights] for layer, values in self.attention.items()},
            "attention_count": None if count is None else count[positions],
        }

    @staticmethod
    def concat(batches: Sequence["TargetBatch"]) -> "TargetBatch":
        """Join batches of one kind, keeping their order."""
        draws = [b.draws for b in batches if b.draws is not None]
        return TargetBatch(
            offsets=offsets_of(np.concatenate([np.diff(b.offsets) for b in batches])),
            count=np.concatenate([b.count for b in batches]),
            id=np.concatenate([b.id for b in batches]),
            logprob=np.concatenate([b.logprob for b in batches]),
            draws=np.concatenate(draws, axis=1) if draws else None,
            tail_mass=np.concatenate([b.tail_mass for b in batches]),
            teacher_nll=np.concatenate([b.teacher_nll for b in batches]),
            teacher_entropy=np.concatenate([b.teacher_entropy for b in batches]),
            hidden={k: np.concatenate([b.hidden[k] for b in batches]) for k in batches[0].hidden},
            hidden_kept=_joined([b.hidden_kept for b in batches]),
            attention={k: np.concatenate([b.attention[k] for b in batches]) for k in batches[0].attention},
            attention_count=_joined([b.attention_count for b in batches]),
        )


def _joined(arrays: Sequence[NDArray[_T] | None]) -> NDArray[_T] | None:
    """Join arrays that all batches have, or none."""
    there = [array for array in arrays if array is not None]
    return np.concatenate(there) if there else None
