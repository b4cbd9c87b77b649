"""Total variation distance ½·Σ|t − s|: bounded by 1, and unmoved by how small a probability is."""

from torch import Tensor

from trainer.losses.rows import Divergence, Rows


class TVD(Divergence):
    """Half the sum of absolute differences."""

    def pointwise(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """½·|t − s|, with slope ½·s·sign(s − t)."""
        s = rows.log_s.exp()
        gap = s - rows.log_t.exp()
        return gap.abs() / 2, s * gap.sign() / 2
