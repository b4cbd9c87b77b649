"""One pass over the output head: cross-entropy and sparse distillation together.

The gradient of every term on the logits is known in closed form, so it is written over the logits chunk by chunk
while they are at hand, and only the gradients on hidden states and head survive the forward pass. The
[positions, vocabulary] tensor never exists whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.base import EntryView, SparseLoss, SparseTargets

CHUNK_BYTES = 16 << 20
"""Bytes of float32 logits worked on at a time, so that they stay near the caches…"""
MIN_CHUNK = 256
"""…but at least this many positions, so that the matrix products stay efficient at large vocabularies."""


@dataclass(frozen=True)
class HeadTerms:
    """Weights of the terms computed at the output head."""

    cross_entropy: float
    losses: Sequence[tuple[float, SparseLoss]]


def head_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: SparseTargets, terms: HeadTerms
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the terms over all positions, and the sum of each term by itself (detached).

    Args:
        hidden: input of the head at the supervised positions, [P, width].
        weight: the head, [vocabulary, width]; `bias` [vocabulary] or none.
        targets: P positions.
        terms: what is summed.

    Returns:
        A float32 scalar that can be differentiated, and float32 [1 + losses]: cross-entropy first.
    """
    total, each = _HeadLoss.apply(hidden, weight, bias, targets, terms)  # type: ignore[no-untyped-call]
    return total, each


def logits_loss(logits: Tensor, targets: SparseTargets, terms: HeadTerms) -> tuple[Tensor, Tensor]:
    """Return what `head_loss` returns, from the logits [P, vocabulary] themselves."""
    total, each = _LogitsLoss.apply(logits, targets, terms)  # type: ignore[no-untyped-call]
    return total, each


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: SparseTargets,
        terms: HeadTerms,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden)
        # Summed in float32 over the chunks, whatever the precision of the weights.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        each = torch.zeros(1 + len(terms.losses), dtype=torch.float32, device=hidden.device)
        for part, first, last in _chunks(targets, weight.shape[0]):
            rows = hidden[first:last]
            logits = torch.nn.functional.linear(rows, weight, bias).float()
            each += write_gradient(logits, part, terms)
            gradient = logits.to(hidden.dtype)
            torch.mm(gradient, weight, out=grad_hidden[first:last])
            if grad_weight is not None:
                grad_weight += gradient.T @ rows
            if grad_bias is not None:
                grad_bias += logits.sum(0)
        ctx.grads = (grad_hidden, _cast(grad_weight, weight), _cast(grad_bias, bias))
        ctx.mark_non_differentiable(each)
        return (each * _weights(terms, each)).sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.grads), None, None


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: SparseTargets, terms: HeadTerms) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits)
        each = torch.zeros(1 + len(terms.losses), dtype=torch.float32, device=logits.device)
        for part, first, last in _chunks(targets, logits.shape[1]):
            chunk = logits[first:last].to(torch.float32, copy=True)
            each += write_gradient(chunk, part, terms)
            gradient[first:last] = chunk
        ctx.gradient = gradient
        ctx.mark_non_differentiable(each)
        return (each * _weights(terms, each)).sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * grad_total.to(ctx.gradient.dtype), None, None


def write_gradient(logits: Tensor, targets: SparseTargets, terms: HeadTerms) -> Tensor:
    """Overwrite float32 logits [C, V] with the gradient of the weighted sum of the terms on them.

    Returns:
        The sum of each term over the chunk, float32 [1 + losses], cross-entropy first.
    """
    log_norm = torch.logsumexp(logits, dim=1)
    label_logprob = logits.gather(1, targets.label[:, None])[:, 0] - log_norm
    counts = targets.entry_offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(counts), device=logits.device), counts, output_size=len(targets.id))
    view = EntryView(targets, row, logits[row, targets.id] - log_norm[row])
    outside = torch.full_like(log_norm, terms.cross_entropy)
    at_entries = terms.cross_entropy * view.student_logprob.exp()
    sums = [-label_logprob.sum()]
    for weight, loss in terms.losses:
        parts = loss.evaluate(view)
        outside += weight * parts.outside
        at_entries += weight * parts.at_entries
        sums.append(parts.value.sum())
    logits.sub_(log_norm[:, None]).exp_().mul_(outside[:, None])
    logits[row, targets.id] = at_entries
    if terms.cross_entropy:
        logits[torch.arange(len(counts), device=logits.device), targets.label] -= terms.cross_entropy
    return torch.stack(sums)


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


def _weights(terms: HeadTerms, like: Tensor) -> Tensor:
    return torch.tensor([terms.cross_entropy, *(weight for weight, _ in terms.losses)]).to(like)


def _chunks(targets: SparseTargets, vocabulary: int) -> list[tuple[SparseTargets, int, int]]:
    size = max(MIN_CHUNK, CHUNK_BYTES // (4 * vocabulary))
    edges = [
        (first, min(first + size, end)) for begin, end in pairwise(targets.edges()) for first in range(begin, end, size)
    ]
    return [(targets.positions(first, last), first, last) for first, last in edges]
