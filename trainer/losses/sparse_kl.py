"""Forward KL(t‖s) on sparse targets, with the gradients in closed form.

For an estimate t̂ of the teacher kept on the entries K, the gradient on logit j is (Σ t̂)·p_j − t̂_j. `hybrid`,
`sampled` and `dense` estimates are unbiased and are used as they stand. Of `sampled` entries the teacher's own
log-probabilities are unknown: the value is Σ t̂·(−log p) less the sample's mean entropy, unbiased over whole samples
(log t̂ in its place would overstate it by a nat and more). `topk` lumps what lies outside K into one bucket of
mass T against the student's own mass q outside K: a lower bound of the full KL with the full gradient inside K,
and p_j·(Σ t̂ + T − T/q) outside.
"""

import torch

from trainer.losses.base import EntryView, LossParts

MIN_TAIL = 1e-7
"""Least tail mass of the student that the bucket's logarithm sees; float32 cannot tell less from none."""


class ForwardKL:
    """KL divergence of the student from the teacher, teacher first."""

    name = "forward_kl"
    accepts = frozenset({"topk", "hybrid", "sampled", "dense"})
    unbiased_on = frozenset({"hybrid", "sampled", "dense"})

    def evaluate(self, view: EntryView) -> LossParts:
        """Return value and gradient of a chunk; see the module."""
        estimate = view.targets.estimate
        kept = view.sum(estimate)
        if view.targets.kind == "sampled":
            value = view.sum(_times_log(estimate, -view.student_logprob)) - view.targets.entropy
        else:
            value = view.sum(_times_log(estimate, view.targets.logprob - view.student_logprob))
        student = view.student_logprob.exp()
        if view.targets.kind != "topk":
            return LossParts(value, kept, kept[view.row] * student - estimate)
        tail = view.targets.tail_mass
        log_q = log_tail(view.sum(student))
        value = value + _times_log(tail, tail.clamp_min(1e-30).log() - log_q)
        total = kept + tail
        return LossParts(value, total - tail * torch.exp(-log_q), total[view.row] * student - estimate)


def log_tail(kept: torch.Tensor) -> torch.Tensor:
    """Return log(1 − kept) for the student's mass on the entries, kept away from log 0."""
    return torch.log1p(-kept.clamp_max(1.0 - MIN_TAIL))


def _times_log(mass: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """Return mass · log_ratio with 0 · anything = 0."""
    return torch.where(mass > 0, mass * log_ratio, 0.0)
