"""Sparse targets on a device, and what a loss makes of a chunk of them."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Targets of P positions with E entries, as tensors; position p owns `entry_offsets[p]:entry_offsets[p+1]`."""

    kind: str  # as in `storage.config.Kind`, or `mixed` where the positions' kinds differ
    label: Tensor  # int64 [P], the token that stands in the text
    entry_offsets: Tensor  # int64 [P + 1]
    id: Tensor  # int64 [E]
    estimate: Tensor  # float32 [E], t̂: estimated teacher probability of each entry
    logprob: Tensor  # float32 [E], teacher log-probability of each entry
    drawn: Tensor  # bool [E], whether the entry was drawn rather than kept for its rank
    tail_mass: Tensor  # float32 [P], teacher probability outside the entries
    entropy: Tensor  # float32 [P], mean teacher entropy of the sample that the position belongs to
    runs: tuple[tuple[str, int], ...] = ()  # where mixed: (kind, position after its last), in order

    @property
    def num_positions(self) -> int:
        """Supervised positions, P."""
        return len(self.label)

    def to(self, device: torch.device | str) -> "SparseTargets":
        """Return the same targets on a device."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if f.name not in {"kind", "runs"}
        }
        return SparseTargets(kind=self.kind, runs=self.runs, **moved)

    def edges(self) -> list[int]:
        """Return where the kind changes, 0 and P included."""
        return [0, *(end for _, end in self.runs)] if self.runs else [0, self.num_positions]

    def rows(self) -> Tensor:
        """Return the position of each entry, int64 [E]."""
        positions = torch.arange(self.num_positions, device=self.id.device)
        return torch.repeat_interleave(positions, self.entry_offsets.diff(), output_size=len(self.id))

    def positions(self, first: int, last: int) -> "SparseTargets":
        """Return the targets of positions `first` to `last`, which must be of one kind."""
        begin, end = int(self.entry_offsets[first]), int(self.entry_offsets[last])
        return SparseTargets(
            kind=next((kind for kind, end in self.runs if end >= last), self.kind),
            label=self.label[first:last],
            entry_offsets=self.entry_offsets[first : last + 1] - begin,
            id=self.id[begin:end],
            estimate=self.estimate[begin:end],
            logprob=self.logprob[begin:end],
            drawn=self.drawn[begin:end],
            tail_mass=self.tail_mass[first:last],
            entropy=self.entropy[first:last],
        )


def first_choice(targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """Return the teacher's most probable entry of each position and its probability, int64 [P] and float32 [P]."""
    row = targets.rows()
    # Sorted by position, the head before what was drawn, then by falling probability: each position's first entry is
    # its best. The log-probabilities of drawn entries may be estimates.
    order = torch.argsort(targets.logprob, descending=True, stable=True)
    order = order[torch.argsort((2 * row + targets.drawn)[order], stable=True)]
    best = order[targets.entry_offsets[:-1]]
    return targets.id[best], targets.logprob[best].exp()


@dataclass(frozen=True, eq=False)
class EntryView:
    """A chunk of C positions with the student's log-probabilities at its entries."""

    targets: SparseTargets
    row: Tensor  # int64 [E], which position of the chunk an entry belongs to
    student_logprob: Tensor  # float32 [E]

    def head(self) -> "EntryView":
        """Return the same positions with the head alone: the mass that draws share counts as tail."""
        kept = ~self.targets.drawn
        beyond = self.sum(torch.where(kept, 0.0, self.targets.estimate))
        entries = ("id", "estimate", "logprob", "drawn")
        offsets = torch.nn.functional.pad(self.sum(kept.to(torch.int64)).cumsum(0), (1, 0))
        targets = replace(
            self.targets,
            entry_offsets=offsets,
            tail_mass=beyond,
            **{name: getattr(self.targets, name)[kept] for name in entries},
        )
        return EntryView(targets, self.row[kept], self.student_logprob[kept])

    def sum(self, values: Tensor) -> Tensor:
        """Sum values over the entries of each position, [E] → [C]."""
        out = torch.zeros(self.targets.num_positions, dtype=values.dtype, device=values.device)
        return out.index_add_(0, self.row, values)


@dataclass(frozen=True, eq=False)
class LossParts:
    """A loss over a chunk and its closed-form gradient on the logits.

    The gradient on logit j of a position is `outside · p_j` where j is no entry, and `at_entries` where it is:
    every loss that sees the vocabulary as the entries plus one bucket has this shape.
    """

    value: Tensor  # float32 [C]
    outside: Tensor  # float32 [C]
    at_entries: Tensor  # float32 [E]
