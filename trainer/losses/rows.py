"""Teacher and student side by side at some positions, in the two layouts that every divergence is written for.

Sparse targets tell the vocabulary as the kept entries plus one bucket for all else; whole distributions tell it token
by token. A divergence gives, for each category of a row, its share of the value and `slope` = s · ∂D/∂s; with
G = Σ slope over the row, the gradient on the logit of category i is slope_i − s_i·G, and on a token j of the bucket
with student mass q it is p_j·(slope_bucket / q − G).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.losses.base import EntryView, LossParts

MIN_TAIL = 1e-7
"""Least mass outside the entries that a logarithm sees; float32 cannot tell less from none."""


@dataclass(frozen=True, eq=False)
class Rows(ABC):
    """Log-probabilities of the categories of C positions; all tensors of one layout have the shape of `log_t`."""

    log_t: Tensor  # float32, teacher
    log_s: Tensor  # float32, student

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """Sum over the categories of each position, → [C]."""

    @abstractmethod
    def spread(self, values: Tensor) -> Tensor:
        """Give each category the value of its position, [C] → the layout."""

    @abstractmethod
    def upper_half(self) -> Tensor:
        """Tell which categories make up the upper half of the teacher's mass, the one that crosses it included."""


class FullRows(Rows):
    """Whole distributions: [C, V]."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the vocabulary."""
        return values.sum(1)

    def spread(self, values: Tensor) -> Tensor:
        """Add the dimension of the vocabulary."""
        return values[:, None]

    def upper_half(self) -> Tensor:
        """Sort each row."""
        mass, order = self.log_t.exp().sort(dim=1, descending=True)
        return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, mass.cumsum(1) - mass < 0.5)


@dataclass(frozen=True, eq=False)
class BucketRows(Rows):
    """The entries of all positions, then one bucket for each: [E + C]."""

    row: Tensor  # int64 [E + C], the position of a category
    num_positions: int  # C

    @classmethod
    def of(cls, view: EntryView) -> "BucketRows":
        """Lay out a chunk of sparse targets."""
        positions = torch.arange(view.targets.num_positions, device=view.row.device)
        return cls(
            torch.cat([view.targets.logprob, view.targets.tail_mass.clamp_min(MIN_TAIL).log()]),
            torch.cat([view.student_logprob, log_tail(view.sum(view.student_logprob.exp()))]),
            torch.cat([view.row, positions]),
            view.targets.num_positions,
        )

    def sum(self, values: Tensor) -> Tensor:
        """Scatter-add by position."""
        return values.new_zeros(self.num_positions).index_add_(0, self.row, values)

    def spread(self, values: Tensor) -> Tensor:
        """Gather by position."""
        return values[self.row]

    def upper_half(self) -> Tensor:
        """Sort all categories by position, then by falling mass; sums run on over the positions before."""
        order = torch.argsort(self.log_t, descending=True, stable=True)
        order = order[torch.argsort(self.row[order], stable=True)]
        mass = self.log_t.exp().double()
        before = mass[order].cumsum(0) - mass[order]
        totals = self.sum(mass)
        start = (totals.cumsum(0) - totals)[self.row[order]]
        return torch.zeros_like(order, dtype=torch.bool).index_put_((order,), before - start < 0.5)


class Divergence(ABC):
    """A divergence between teacher and student."""

    @abstractmethod
    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return each category's share of the value, and its slope; see the module."""

    def evaluate(self, view: EntryView) -> LossParts:
        """Return value and gradient of a chunk of sparse targets, all that is no entry taken as one bucket."""
        rows = BucketRows.of(view)
        value, slope = self.pointwise(rows)
        total = rows.sum(slope)
        entries = len(view.row)
        outside = slope[entries:] * torch.exp(-rows.log_s[entries:]) - total
        return LossParts(rows.sum(value), outside, slope[:entries] - view.student_logprob.exp() * total[view.row])


def log_tail(kept: Tensor) -> Tensor:
    """Return log(1 − kept) for the student's mass on the entries, kept away from log 0."""
    return torch.log1p(-kept.clamp_max(1.0 - MIN_TAIL))


def log_mix(share: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log(share · a + (1 − share) · b)."""
    one, other = log_a.new_tensor(share).log(), log_a.new_tensor(1.0 - share).log()
    return torch.logaddexp(log_a + one, log_b + other)
