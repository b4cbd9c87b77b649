"""Forward KL(t‖s): Σ t·log(t/s).

For an estimate t̂ of the teacher kept on the entries K, the gradient on logit j is (Σ t̂)·p_j − t̂_j. `hybrid…`,
`sampled` and `dense` estimates are unbiased and are used as they stand. Where the teacher's log-probabilities of drawn
entries are unknown, the value is Σ t̂·(−log p) less the sample's mean entropy, unbiased over whole samples
(log t̂ in its place would overstate it by a nat and more). `topk` lumps what lies outside K into one bucket of
mass T against the student's own mass q outside K: a lower bound of the full KL with the full gradient inside K,
and p_j·(Σ t̂ + T − T/q) outside.

On hybrid targets `draw_weight` λ mixes both: λ times the unbiased divergence plus 1 − λ times the one that sees the
head and one bucket. That replaces the tail's estimate t̂_j = M·draws/n by λ·t̂_j + (1 − λ)·(M/q)·p_j: the student's
own tail, which has no noise, is a control variate for it. Both parts are least where the student is the teacher, so
no λ > 0 moves the optimum; the smaller it is, the less noise there is, and the slower the tail is learnt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from storage.identity import COUNTED_KINDS, HEAD_KINDS
from trainer.losses.base import EntryView, LossParts
from trainer.losses.rows import Divergence, Rows


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL divergence of the student from the teacher, teacher first."""

    draw_weight: float = 1.0
    """λ on hybrid targets; 1 is unbiased."""

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """t·log(t/s), with slope −t."""
        t = rows.log_t.exp()
        return t * (rows.log_t - rows.log_s), -t

    def evaluate(self, view: EntryView) -> LossParts:
        """Return value and gradient of a chunk; see the module."""
        kind = view.targets.kind
        if kind == "topk":
            return super().evaluate(view)
        if self.draw_weight == 1 or kind not in HEAD_KINDS:
            return _estimated(view)
        drawn, bucket = _estimated(view), super().evaluate(view.head())
        at_entries = bucket.outside[view.row] * view.student_logprob.exp()
        at_entries[~view.targets.drawn] = bucket.at_entries
        return LossParts(
            torch.lerp(bucket.value, drawn.value, self.draw_weight),
            torch.lerp(bucket.outside, drawn.outside, self.draw_weight),
            torch.lerp(at_entries, drawn.at_entries, self.draw_weight),
        )


def _estimated(view: EntryView) -> LossParts:
    """Return value and gradient against the estimate t̂ as it stands."""
    estimate, counted = view.targets.estimate, view.targets.kind in COUNTED_KINDS
    known = torch.zeros_like(estimate) if counted else view.targets.logprob
    # An entry of another set of draws has no mass: 0 · anything = 0.
    value = view.sum(torch.where(estimate > 0, estimate * (known - view.student_logprob), 0.0))
    if counted:
        value = value - view.targets.entropy
    kept = view.sum(estimate)
    return LossParts(value, kept, kept[view.row] * view.student_logprob.exp() - estimate)
