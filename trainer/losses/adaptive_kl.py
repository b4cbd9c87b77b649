"""Adaptive KL (Wu et al. 2025): forward and reverse KL weighed by where the student is wrong.

The head is the upper half of the teacher's mass. With g_head and g_tail the sums of |t − s| over head and tail,
the divergence is (g_head·KL(t‖s) + g_tail·KL(s‖t)) / (g_head + g_tail); the weights have no gradient.
"""

from torch import Tensor

from trainer.losses.forward_kl import ForwardKL
from trainer.losses.reverse_kl import ReverseKL
from trainer.losses.rows import Divergence, Rows

MIN_GAP = 1e-12
"""Least sum of |t − s| that a weight is divided by."""


class AdaptiveKL(Divergence):
    """Forward KL where the head is off, reverse KL where the tail is."""

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The weighted sum of both."""
        gap = (rows.log_t.exp() - rows.log_s.exp()).abs()
        head = rows.sum(gap * rows.upper_half())
        forward_share = rows.spread(head / rows.sum(gap).clamp_min(MIN_GAP))
        forward, reverse = ForwardKL().pointwise(rows), ReverseKL().pointwise(rows)
        value, slope = (forward_share * f + (1.0 - forward_share) * r for f, r in zip(forward, reverse, strict=True))
        return value, slope
