"""Weights of the terms that follow the training: learned, by homoscedastic uncertainty (Kendall, Gal and Cipolla 2018),
or set by the size of each term's gradient, in the manner of GradNorm (Chen et al. 2018) without its second loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence

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


SMOOTHING = 0.9
"""Share of what was measured before in the gradients that weights are made of."""
MOST_CHANGE = 100.0
"""Weights stay within this factor of the configured ones: a term that is all but solved has next to no gradient."""


class GradientBalance:
    """Weights under which the gradients of the terms stand to each other as the configured weights do.

    With c_i the configured weights and g_i the root of the mean squared norm of term i's gradient on a position's
    states, w_i = c_i · m / g_i, m = Σ c_j·g_j / Σ c_j: the sum of all weighted norms stays what it was.
    """

    def __init__(self, terms: Sequence[str], every: int) -> None:
        """Measure at step 0 and every so many; until there is a measure the configured weights hold."""
        self._every = every
        self.names = [f"{term}_gradient" for term in terms]
        """Names of what is measured."""
        self.squares = dict.fromkeys(self.names, 0.0)
        """Mean squared gradient of each term per position, smoothed; 0 where it was never measured."""

    def is_due(self, step: int) -> bool:
        """Tell whether gradients are measured in a step, 0, 1, …."""
        return step % self._every == 0

    def observe(self, step: int, losses: Mapping[str, float]) -> dict[str, float]:
        """Take in the mean squared gradients among a step's losses, the same ones on all ranks.

        Returns the losses with the smoothed norms in their place, so far as there are any.
        """
        for name, old in self.squares.items():
            new = losses[name] if self.is_due(step) else 0.0
            self.squares[name] = SMOOTHING * old + (1 - SMOOTHING) * new if old and new else new or old
        norms = {name: math.sqrt(square) for name, square in self.squares.items() if square}
        return {**{name: value for name, value in losses.items() if name not in self.squares}, **norms}

    def weights(self, configured: Sequence[float]) -> list[float]:
        """Return the weights that follow from the configured ones; a term without a measure keeps its own."""
        squares = zip(self.squares.values(), configured, strict=True)
        norms = [math.sqrt(square) if weight > 0 else 0.0 for square, weight in squares]
        known = [(weight, norm) for weight, norm in zip(configured, norms, strict=True) if norm > 0]
        if not known:
            return list(configured)
        mean = sum(weight * norm for weight, norm in known) / sum(weight for weight, _ in known)
        factors = [min(max(mean / norm, 1 / MOST_CHANGE), MOST_CHANGE) if norm > 0 else 1.0 for norm in norms]
        return [weight * factor for weight, factor in zip(configured, factors, strict=True)]


def squared_gradient(loss_of: Callable[[dict[str, Tensor]], Tensor], states: Mapping[str, Tensor]) -> Tensor:
    """Return the squared norm of a loss's gradient on the states it is made of, float32; goes no further back."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in states.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(loss_of(leaves), list(leaves.values()), allow_unused=True)
    return torch.stack([gradient.float().square().sum() for gradient in found if gradient is not None]).sum()
