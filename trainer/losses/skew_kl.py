"""Skew KL divergences (DistiLLM, Ko et al. 2024): the second argument is mixed with a little of the first.

The mixture keeps the ratio below 1/α, so that neither the gradient nor its variance runs away; α = 0.1.
"""

from torch import Tensor

from trainer.losses.rows import Divergence, Rows, log_mix


class SkewKL(Divergence):
    """KL(t‖m) with m = α·t + (1 − α)·s."""

    def __init__(self, alpha: float = 0.1) -> None:
        self._alpha = alpha

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """t·log(t/m), with slope −t·(1 − α)·s/m."""
        t, log_m = rows.log_t.exp(), log_mix(self._alpha, rows.log_t, rows.log_s)
        return t * (rows.log_t - log_m), -t * (1.0 - self._alpha) * (rows.log_s - log_m).exp()


class ReverseSkewKL(Divergence):
    """KL(s‖m) with m = (1 − α)·t + α·s."""

    def __init__(self, alpha: float = 0.1) -> None:
        self._alpha = alpha

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """s·log(s/m), with slope s·(log(s/m) − α·s/m) and a constant."""
        s = rows.log_s.exp()
        log_ratio = rows.log_s - log_mix(self._alpha, rows.log_s, rows.log_t)
        value = s * log_ratio
        return value, value - self._alpha * s * log_ratio.exp()
