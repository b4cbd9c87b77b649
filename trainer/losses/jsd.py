"""Generalised Jensen–Shannon divergence JSD(β) = β·KL(t‖m) + (1 − β)·KL(s‖m), m = β·t + (1 − β)·s.

From GKD (Agarwal et al. 2024). At the ends, where this is 0, it stands for KL(t‖s) at β = 0 and KL(s‖t) at β = 1, the
limits of JSD(β) / β and JSD(β) / (1 − β).
"""

from torch import Tensor

from trainer.losses.forward_kl import ForwardKL
from trainer.losses.reverse_kl import ReverseKL
from trainer.losses.rows import Divergence, Rows, log_mix


class JSD(Divergence):
    """Divergence of both from their mixture."""

    def __init__(self, beta: float = 0.5) -> None:
        self._beta = beta
        self._end: Divergence | None = {0.0: ForwardKL(), 1.0: ReverseKL()}.get(beta)

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Both terms; what the mixture's own change adds to the slope sums to a constant and drops out."""
        if self._end is not None:
            return self._end.pointwise(rows)
        log_m = log_mix(self._beta, rows.log_t, rows.log_s)
        slope = (1.0 - self._beta) * rows.log_s.exp() * (rows.log_s - log_m)
        return self._beta * rows.log_t.exp() * (rows.log_t - log_m) + slope, slope
