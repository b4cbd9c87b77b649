"""Hidden-state transfer: student states through a learned adapter, compared with those of the teacher.

The adapter is linear, after a LayerNorm where that is asked for. The distance is the squared error in units of the
teacher's variance of each channel, or 1 − cosine, which leaves the length of the states free.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

MIN_VARIANCE = 1e-6
"""Least channel variance that an error is divided by."""


class HiddenTransfer(nn.Module):
    """Projects student states to the teacher's width and compares them, one adapter per mapped layer."""

    def __init__(
        self,
        widths: Mapping[str, tuple[int, int]],
        variance: Mapping[str, Tensor],
        distance: Literal["mse", "cosine"] = "mse",
        norm: bool = False,
    ) -> None:
        """Build the adapters.

        Args:
            widths: dataset layer → (student width, teacher width).
            variance: dataset layer → teacher variance of each channel, float32 [teacher width].
            distance: see the module.
            norm: normalise the student's states before they are projected.
        """
        super().__init__()
        self.layers = list(widths)
        self._distance = distance
        self.norms = nn.ModuleList(nn.LayerNorm(widths[layer][0]) for layer in self.layers) if norm else None
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
        """Return the distance summed over positions, averaged over layers (and `mse` over channels).

        Args:
            student: dataset layer → the mapped student states, [P, student width].
            teacher: dataset layer → teacher states, [K, teacher width].
            rows: int64 [K], the positions that the teacher's states belong to; none where K = P.
            weight: how many positions each kept one stands for, so that the sum is that over all P in expectation.
        """
        total = torch.zeros((), dtype=torch.float32, device=next(iter(student.values())).device)
        for n, layer in enumerate(self.layers):
            states = student[layer] if rows is None else student[layer].index_select(0, rows)
            if self.norms is not None:
                states = self.norms[n](states)
            projected, target = self.projectors[n](states).float(), teacher[layer].float()
            if self._distance == "cosine":
                total = total + (1.0 - cosine_similarity(projected, target, dim=-1)).sum()
                continue
            variance = self._variance[layer].to(projected.device)
            total = total + ((projected - target).square() / variance).mean(-1).sum()
        return total * weight / len(self.layers)
