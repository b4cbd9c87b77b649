"""Forward KL(t‖s): Σ t·log(t/s).

For an estimate t̂ of the teacher kept on the entries K, the gradient on logit j is (Σ t̂)·p_j − t̂_j. `hybrid`,
`sampled` and `dense` estimates are unbiased and are used as they stand. Of `sampled` entries the teacher's own
log-probabilities are unknown: the value is Σ t̂·(−log p) less the sample's mean entropy, unbiased over whole samples
(log t̂ in its place would overstate it by a nat and more). `topk` lumps what lies outside K into one bucket of
mass T against the student's own mass q outside K: a lower bound of the full KL with the full gradient inside K,
and p_j·(Σ t̂ + T − T/q) outside.
"""

import torch
from torch import Tensor

from trainer.losses.base import EntryView, LossParts
from trainer.losses.rows import Divergence, Rows


class ForwardKL(Divergence):
    """KL divergence of the student from the teacher, teacher first."""

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """t·log(t/s), with slope −t."""
        t = rows.log_t.exp()
        return t * (rows.log_t - rows.log_s), -t

    def evaluate(self, view: EntryView) -> LossParts:
        """Return value and gradient of a chunk; see the module."""
        if view.targets.kind == "topk":
            return super().evaluate(view)
        estimate = view.targets.estimate
        known = view.targets.logprob if view.targets.kind != "sampled" else torch.zeros_like(estimate)
        # An entry of another set of draws has no mass: 0 · anything = 0.
        value = view.sum(torch.where(estimate > 0, estimate * (known - view.student_logprob), 0.0))
        if view.targets.kind == "sampled":
            value = value - view.targets.entropy
        kept = view.sum(estimate)
        return LossParts(value, kept, kept[view.row] * view.student_logprob.exp() - estimate)
