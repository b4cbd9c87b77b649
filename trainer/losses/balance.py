"""Weights of the terms learned with the student, by homoscedastic uncertainty (Kendall, Gal and Cipolla 2018)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Balance(nn.Module):
    """Σ ½·exp(−s_i)·L_i + ½·s_i over the terms with a weight, s learned; at rest s_i = log L_i."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Begin with s so that ½·exp(−s) is the given weight; terms of weight 0 stay out."""
        super().__init__()
        self._active = [n for n, weight in enumerate(weights) if weight > 0]
        self._size = len(weights)
        self.log_variance = nn.Parameter(torch.tensor([-math.log(2.0 * weights[n]) for n in self._active]))

    def forward(self) -> Tensor:
        """Return s, float32 [active terms]; under ZeRO 3 the parameter exists within this call alone."""
        return self.log_variance.float() * 1.0

    def weights(self, s: Tensor) -> list[float]:
        """Return the weight ½·exp(−s) of each term."""
        found = [0.0] * self._size
        for n, weight in zip(self._active, (torch.exp(-s.detach()) / 2).tolist(), strict=True):
            found[n] = weight
        return found

    def rest(self, s: Tensor, sums: Tensor, num_positions: int) -> Tensor:
        """Return what a total weighted by `weights` lacks, summed over positions: ½·s_i·P, and the gradient on s.

        Args:
            s: what `forward` returned.
            sums: detached sum of each term over the positions, [terms].
            num_positions: P.
        """
        weight = torch.exp(-s) / 2
        return ((weight - weight.detach()) * sums[self._active]).sum() + s.sum() * num_positions / 2
