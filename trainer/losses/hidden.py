"""Hidden-state transfer: squared error through a learned linear projector, in units of the teacher's variance."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MIN_VARIANCE = 1e-6
"""Least channel variance that an error is divided by."""


class HiddenTransfer(nn.Module):
    """Projects student states to the teacher's width and compares them, one projector per mapped layer."""

    def __init__(self, widths: Mapping[str, tuple[int, int]], variance: Mapping[str, Tensor]) -> None:
        """Build the projectors.

        Args:
            widths: dataset layer → (student width, teacher width).
            variance: dataset layer → teacher variance of each channel, float32 [teacher width].
        """
        super().__init__()
        self.layers = list(widths)
        self.projectors = nn.ModuleList(nn.Linear(*widths[layer], bias=False) for layer in self.layers)
        # Plain tensors, not buffers: casting the module to bfloat16 must leave them alone.
        self._variance = {layer: variance[layer].float().clamp_min(MIN_VARIANCE) for layer in self.layers}

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        rows: Tensor | None = None,
        weight: float = 1,
    ) -> Tensor:
        """Return the error summed over positions, averaged over channels and layers.

        Args:
            student: dataset layer → the mapped student states, [P, student width].
            teacher: dataset layer → teacher states, [K, teacher width].
            rows: int64 [K], the positions that the teacher's states belong to; none where K = P.
            weight: how many positions each kept one stands for, so that the sum is that over all P in expectation.
        """
        total = torch.zeros((), dtype=torch.float32, device=next(iter(student.values())).device)
        for layer, projector in zip(self.layers, self.projectors, strict=True):
            states = student[layer] if rows is None else student[layer].index_select(0, rows)
            error = projector(states).float() - teacher[layer].float()
            variance = self._variance[layer].to(error.device)
            total = total + (error.square() / variance).mean(-1).sum()
        return total * weight / len(self.layers)
