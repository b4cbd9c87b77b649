"""One pass over the output head: cross-entropy and divergence together.

The gradient of every term on the logits is known in closed form, so it is written over the logits chunk by chunk
while they are at hand, and only the gradients on hidden states and head survive the forward pass. The
[positions, vocabulary] tensor never exists whole. One softmax serves all terms on sparse targets: beyond
cross-entropy they cost gathers and scatters at the entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.base import EntryView, SparseTargets
from trainer.losses.full import FullTeacher, full_gradient
from trainer.losses.rows import Divergence
from trainer.losses.softmax import exponentials

CHUNK_BYTES = 16 << 20
"""Bytes of float32 logits worked on at a time, so that they stay near the caches…"""
MIN_CHUNK = 256
"""…but at least this many positions, so that the matrix products stay efficient at large vocabularies."""


@dataclass(frozen=True)
class HeadTerms:
    """Weights of the terms computed at the output head."""

    cross_entropy: float
    divergences: Sequence[tuple[float, Divergence]] = ()
    temperature: float = 1.0
    """Of the divergences; other than 1 only with a FullTeacher."""


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: SparseTargets,
    terms: HeadTerms,
    teacher: FullTeacher | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the terms over all positions, and the sum of each term by itself (detached).

    Args:
        hidden: input of the head at the supervised positions, [P, width].
        weight: the head, [vocabulary, width]; `bias` [vocabulary] or none.
        targets: P positions.
        terms: what is summed.
        teacher: whole distributions of the P positions that the divergences take instead of the entries.

    Returns:
        A float32 scalar that can be differentiated once, and float32 [1 + divergences]: cross-entropy first.
    """
    total, each = _HeadLoss.apply(hidden, weight, bias, targets, terms, teacher)  # type: ignore[no-untyped-call]
    return total, each


def logits_loss(
    logits: Tensor, targets: SparseTargets, terms: HeadTerms, teacher: FullTeacher | None = None
) -> tuple[Tensor, Tensor]:
    """Return what `head_loss` returns, from the logits [P, vocabulary] themselves."""
    total, each = _LogitsLoss.apply(logits, targets, terms, teacher)  # type: ignore[no-untyped-call]
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
        teacher: FullTeacher | None,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.empty_like(hidden)
        # Summed in float32 over the chunks, whatever the precision of the weights.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        each = torch.zeros(1 + len(terms.divergences), dtype=torch.float32, device=hidden.device)
        for first, last in _chunks(targets, weight.shape[0]):
            rows = hidden[first:last]
            logits = torch.nn.functional.linear(rows, weight, bias).float()
            each += write_gradient(logits, targets.positions(first, last), terms, _part(teacher, first, last, logits))
            gradient = logits.to(hidden.dtype)
            torch.mm(gradient, weight, out=grad_hidden[first:last])
            if grad_weight is not None and gradient.dtype == torch.float32:
                grad_weight.addmm_(gradient.T, rows)
            elif grad_weight is not None:
                grad_weight += gradient.T @ rows
            if grad_bias is not None:
                grad_bias += logits.sum(0)
        ctx.grads = (grad_hidden, _cast(grad_weight, weight), _cast(grad_bias, bias))
        ctx.mark_non_differentiable(each)
        return (each * _weights(terms, each)).sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, grad_total), None, None, None


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: SparseTargets, terms: HeadTerms, teacher: FullTeacher | None
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits)
        each = torch.zeros(1 + len(terms.divergences), dtype=torch.float32, device=logits.device)
        for first, last in _chunks(targets, logits.shape[1]):
            chunk = logits[first:last].to(torch.float32, copy=True)
            each += write_gradient(chunk, targets.positions(first, last), terms, _part(teacher, first, last, chunk))
            gradient[first:last] = chunk
        ctx.grads = (gradient,)
        ctx.mark_non_differentiable(each)
        return (each * _weights(terms, each)).sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, grad_total), None, None, None


def write_gradient(logits: Tensor, targets: SparseTargets, terms: HeadTerms, teacher: Tensor | None = None) -> Tensor:
    """Overwrite float32 logits [C, V] with the gradient of the weighted sum of the terms on them.

    Args:
        logits: the student's.
        targets: of these positions.
        terms: what is summed.
        teacher: the teacher's logits [C, V] where the divergences take whole distributions; overwritten.

    Returns:
        The sum of each term over the chunk, float32 [1 + divergences], cross-entropy first.
    """
    weighted = terms.divergences
    full = [] if teacher is None else full_gradient(logits, teacher, weighted, terms.temperature)
    sparse = weighted if teacher is None else ()
    positions = torch.arange(targets.num_positions, device=logits.device)
    row = targets.rows()
    label_logit, entry_logit = logits[positions, targets.label], logits[row, targets.id]
    largest, norm = exponentials(logits)
    log_norm = largest + norm.log()
    view = EntryView(targets, row, entry_logit - log_norm[row])
    outside = torch.full_like(norm, terms.cross_entropy)
    at_entries = terms.cross_entropy * view.student_logprob.exp()
    sums = [(log_norm - label_logit).sum()]
    for weight, divergence in sparse:
        parts = divergence.evaluate(view)
        outside += weight * parts.outside
        at_entries += weight * parts.at_entries
        sums.append(parts.value.sum())
    logits.mul_((outside / norm)[:, None])
    if sparse:
        logits[row, targets.id] = at_entries
    if terms.cross_entropy:
        logits[positions, targets.label] -= terms.cross_entropy
    if teacher is not None:
        logits += teacher
    return torch.stack([*sums, *full])


def _part(teacher: FullTeacher | None, first: int, last: int, logits: Tensor) -> Tensor | None:
    return None if teacher is None else teacher.logits(first, last, logits.shape[1])


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)


def _scaled(ctx: Any, grad_total: Tensor) -> list[Tensor | None]:
    """Return the gradients times that of the total, in place: they are handed out once."""
    grads, ctx.grads = ctx.grads, None
    return [None if grad is None else grad.mul_(grad_total.to(grad.dtype)) for grad in grads]


def _weights(terms: HeadTerms, like: Tensor) -> Tensor:
    return torch.tensor([terms.cross_entropy, *(weight for weight, _ in terms.divergences)]).to(like)


def row_chunks(count: int, vocabulary: int, begin: int = 0) -> Iterator[tuple[int, int]]:
    """Return the runs in which positions `begin` to `count` are worked on."""
    size = max(MIN_CHUNK, CHUNK_BYTES // (4 * vocabulary))
    return ((first, min(first + size, count)) for first in range(begin, count, size))


def _chunks(targets: SparseTargets, vocabulary: int) -> Iterator[tuple[int, int]]:
    return chain.from_iterable(row_chunks(end, vocabulary, begin) for begin, end in pairwise(targets.edges()))
