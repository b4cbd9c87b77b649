"""Reverse KL(s‖t): Σ s·log(s/t), which lets the student leave out what it cannot say (MiniLLM, Gu et al. 2024)."""

from torch import Tensor

from trainer.losses.rows import Divergence, Rows


class ReverseKL(Divergence):
    """KL divergence of the teacher from the student, student first."""

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """s·log(s/t); the slope's further term s sums to a constant over the row and drops out of the gradient."""
        value = rows.log_s.exp() * (rows.log_s - rows.log_t)
        return value, value
