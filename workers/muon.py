"""The Muon optimizer (Jordan et al., 2024, kellerjordan.github.io/posts/muon) in the precision that the CPU is fast in.

`torch.optim.Muon` multiplies in bfloat16 whatever the machine; without native bfloat16 its steps take most of an hour
where these take seconds.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration, chosen by its authors for the steepest slope at zero."""
_ITERATIONS = 5


def native_dtype() -> torch.dtype:
    """Return the precision that this machine's CPU multiplies matrices fastest in."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U·Vᵀ of a matrix U·S·Vᵀ [rows, columns]: its singular values end between 0.5 and 1.5.

    Args:
        dtype: precision of the products; the result has it too.
    """
    flat = matrix.to(dtype)
    tall = flat.size(0) > flat.size(1)
    x = flat.T if tall else flat
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update of each matrix is orthogonalised; weight decay is decoupled."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = native_dtype()

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # a closure serves line searches alone
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                average = state.setdefault("momentum", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalized(matrix.grad.lerp(average, group["momentum"]), self.dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                stretch = max(1.0, matrix.size(0) / matrix.size(1)) ** 0.5
                matrix.add_(update, alpha=-group["lr"] * stretch)
