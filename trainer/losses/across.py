"""Losses across tokenizers: teacher and student read the same text in other tokens, over other vocabularies.

ALM (approximate likelihood matching, Minixhofer et al. 2025) compares how likely both find each chunk of text that
both spell in whole tokens: with f(p) = p^(1/τ), the divergence between the two-way distributions (f, 1 − f) of teacher
and student, times τ, so that τ does not change how strongly it counts. ULD (Boizard et al. 2024) compares the sorted
probabilities, rank by rank, where both predict from the same text: Σ |sort(t) − sort(s)|, the shorter one padded with
zeros; of targets of kind `topk` the ranks behind the kept ones are one bucket, which makes it a lower bound.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

from storage.heads import full_logprobs
from trainer.losses.base import SparseTargets
from trainer.losses.full import FullTeacher
from trainer.losses.head import row_chunks

LEAST = 1e-7
"""Least surprisal of a chunk over τ that a logarithm sees; float32 cannot tell less from none."""


@dataclass(frozen=True, eq=False)
class AcrossTargets:
    """What the teacher said about a text, laid over the student's P supervised tokens."""

    teacher: SparseTargets  # of the teacher's M supervised tokens
    teacher_chunk: Tensor  # int64 [M], chunk of each token; -1 for none
    student_chunk: Tensor  # int64 [P]
    num_chunks: int
    pairs: Tensor  # int64 [Q, 2], positions of both that predict from the same text; the student's rise

    def to(self, device: torch.device | str) -> "AcrossTargets":
        """Return the same targets on a device."""
        moved = {
            name: getattr(self, name).to(device) for name in ("teacher", "teacher_chunk", "student_chunk", "pairs")
        }
        return AcrossTargets(num_chunks=self.num_chunks, **moved)


@dataclass(frozen=True)
class AcrossTerms:
    """Weights of the terms, and how teacher and student are compared."""

    cross_entropy: float
    divergence: float
    kind: Literal["alm", "uld"]
    tau: float


def across_loss(
    scored: Tensor,
    head: tuple[Tensor, Tensor | None] | None,
    label: Tensor,
    targets: AcrossTargets,
    terms: AcrossTerms,
    teacher: FullTeacher | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of cross-entropy and divergence, and the sum of each by itself (detached).

    Logits exist for one chunk of positions at a time, and are made again in the backward pass.

    Args:
        scored: input of the head at the student's positions, [P, width], or logits [P, V].
        head: weight [V, width] and bias [V] of the head; none where logits are given.
        label: the student's tokens, int64 [P].
        targets: what the teacher said.
        terms: what is summed.
        teacher: whole distributions of the teacher's M positions that are taken instead of the entries.
    """
    vocabulary = scored.shape[1] if head is None else head[0].shape[0]
    logprob, distance = [], scored.new_zeros((), dtype=torch.float32)
    for first, last in row_chunks(len(scored), vocabulary):
        paired = (targets.pairs[:, 1] >= first) & (targets.pairs[:, 1] < last)
        pairs = targets.pairs[paired] if terms.kind == "uld" else targets.pairs[:0]
        own, part = checkpoint(
            _rows, scored[first:last], head, label[first:last], pairs, first, targets.teacher, teacher,
            use_reentrant=False,
        )  # fmt: skip
        logprob.append(own)
        distance = distance + part
    joined = torch.cat(logprob) if logprob else scored.new_zeros(0, dtype=torch.float32)
    if terms.kind == "alm":
        distance = alm(joined, targets, label_logprob(targets.teacher, teacher), terms.tau)
    hard = -joined.sum()
    return terms.cross_entropy * hard + terms.divergence * distance, torch.stack([hard, distance]).detach()


def alm(student: Tensor, targets: AcrossTargets, teacher: Tensor, tau: float) -> Tensor:
    """Return the divergence of the chunks' likelihoods, summed over those whose likelihood the teacher told.

    Args:
        student: log-probability of each of the student's tokens, [P].
        targets: which chunk each belongs to.
        teacher: likewise of the teacher's tokens, [M]; NaN where it is not known.
        tau: τ.
    """
    s = chunk_sums(student, targets.student_chunk, targets.num_chunks) / tau
    t = chunk_sums(teacher, targets.teacher_chunk, targets.num_chunks) / tau
    known = t.isfinite()
    s, t = s[known].clamp_max(-LEAST), t[known].clamp_max(-LEAST)
    f = t.exp()
    return tau * (f * (t - s) + (1.0 - f) * (_log1mexp(t) - _log1mexp(s))).sum()


def sorted_distance(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Return Σ |sort(t) − sort(s)| of each row, [Q].

    Args:
        student: probabilities over the student's vocabulary, [Q, V].
        teacher: those of the kept entries, 0 beyond them, [Q, K].
        kept: how many entries a row has, the likeliest ones, int64 [Q]; the ranks behind them are one bucket.
    """
    t = teacher.sort(dim=1, descending=True).values
    s = student.topk(min(t.shape[1], student.shape[1]), dim=1).values
    s = pad(s, (0, t.shape[1] - s.shape[1]))
    ranked = torch.arange(t.shape[1], device=t.device) < kept[:, None]
    s, t = s * ranked, t * ranked
    behind = (1.0 - s.sum(1)) - (1.0 - t.sum(1))
    return (s - t).abs().sum(1) + behind.abs()


def label_logprob(targets: SparseTargets, full: FullTeacher | None = None) -> Tensor:
    """Return the teacher's log-probability of each of its tokens, float32 [M]; NaN where it is not known.

    That is where its entry was not kept, and on draws alone, which tell how often a token was drawn.
    """
    if full is not None and full.head is not None and full.states is not None:
        parts, first = [torch.zeros_like(targets.tail_mass[:0])], 0
        for logprob in full_logprobs(full.states, full.head):
            label = targets.label[first : first + len(logprob)]
            parts.append(logprob.gather(1, label[:, None])[:, 0])
            first += len(logprob)
        return torch.cat(parts)
    row = targets.rows()
    found = torch.full_like(targets.tail_mass, torch.nan)
    own = (targets.id == targets.label[row]) & (targets.kind != "sampled")
    found[row[own]] = targets.logprob[own]
    return found


def _rows(
    scored: Tensor,
    head: tuple[Tensor, Tensor | None] | None,
    label: Tensor,
    pairs: Tensor,
    first: int,
    targets: SparseTargets,
    full: FullTeacher | None,
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of a chunk's labels [C], and the sorted distance summed over its pairs."""
    logprob = (scored if head is None else linear(scored, *head)).float().log_softmax(1)
    own = logprob.gather(1, label[:, None])[:, 0]
    if not len(pairs):
        return own, own.new_zeros(())
    student = logprob.index_select(0, pairs[:, 1] - first).exp()
    return own, sorted_distance(student, *_entries(targets, pairs[:, 0], full)).sum()


def _entries(targets: SparseTargets, rows: Tensor, full: FullTeacher | None) -> tuple[Tensor, Tensor]:
    """Return the teacher's kept probabilities at some positions, [Q, K] with 0 beyond a row's own, and how many."""
    if full is not None and full.head is not None and full.states is not None:
        whole = full.head.logits(full.states.index_select(0, rows)).float().softmax(1)
        return whole, torch.full_like(rows, whole.shape[1])
    begin, kept = targets.entry_offsets[rows], targets.entry_offsets.diff()[rows]
    place = torch.arange(int(kept.max()), device=rows.device)
    there = place < kept[:, None]
    entry = torch.where(there, begin[:, None] + place, 0)
    return torch.where(there, targets.logprob[entry].exp(), 0.0), kept


def chunk_sums(values: Tensor, chunk: Tensor, num_chunks: int) -> Tensor:
    """Sum the log-probabilities of tokens over the chunks that they belong to, [tokens] → [chunks]."""
    inside = chunk >= 0
    return values.new_zeros(num_chunks).index_add(0, chunk[inside], values[inside])


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) for x < 0."""
    return torch.log(-torch.expm1(x))
