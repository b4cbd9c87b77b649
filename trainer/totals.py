"""Sums over held-out positions, and the scores that they come to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from storage.samples import NO_LABEL
from trainer.alignment import Aligned
from trainer.losses import EntryView, ForwardKL, SparseTargets, first_choice
from trainer.losses.across import AcrossTargets, chunk_sums, label_logprob

BINS = 15
"""Confidence bins of the expected calibration error."""

Scores = dict[str, Any]


@dataclass
class Bins:
    """Sums for the expected calibration error: in each confidence bin, hits and confidence."""

    count: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))
    hits: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))
    confidence: NDArray[np.float64] = field(default_factory=lambda: np.zeros(BINS))

    def add(self, confidence: NDArray[np.floating[Any]], hit: NDArray[np.bool_]) -> None:
        """Add positions."""
        bin_ = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
        self.count += np.bincount(bin_, minlength=BINS)
        self.hits += np.bincount(bin_, weights=hit.astype(np.float64), minlength=BINS)
        self.confidence += np.bincount(bin_, weights=confidence.astype(np.float64), minlength=BINS)

    def error(self) -> float:
        """Return Σ |hits − confidence| over the bins, per position."""
        return float(np.abs(self.hits - self.confidence).sum() / max(self.count.sum(), 1.0))


@dataclass
class Accuracy:
    """Counts of positions whose label the data gives."""

    count: int = 0
    hits: int = 0

    def add(self, hit: NDArray[np.bool_], given: NDArray[np.bool_]) -> None:
        """Add positions; those that are not `given` do not count."""
        self.count += int(given.sum())
        self.hits += int((hit & given).sum())

    def share(self) -> float | None:
        """Return the share of hits; none without labels."""
        return self.hits / self.count if self.count else None


@dataclass
class Totals:
    """Sums over positions."""

    loss: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    kl: float = 0.0
    agreements: int = 0
    told: bool = True
    """Whether the targets tell the teacher's probabilities."""
    bins: Bins = field(default_factory=Bins)
    classifies: bool = False
    """Whether the targets are classes: some positions may have no label, others one that the teacher gave."""
    bytes: dict[str, int] | None = None
    """Bytes of the text that losses are told of, where they are told per byte."""
    positions: int = 0
    accuracy: Accuracy = field(default_factory=Accuracy)
    chunks: int = 0
    """Chunks of text that teacher and student both spell in whole tokens…"""
    chunks_known: int = 0
    """…those whose likelihood the teacher told…"""
    chunk_gap: float = 0.0
    """…and the sum of |log p − log q| over these."""

    def add(self, source: str, targets: SparseTargets, logprob: Tensor, given: NDArray[np.bool_]) -> None:
        """Add positions of one source; log-probabilities [P, V], `given`: labels that the data says, bool [P]."""
        said = targets.label != NO_LABEL
        own = logprob.gather(1, targets.label.clamp_min(0)[:, None])[said, 0]
        row = targets.rows()
        divergence = ForwardKL().evaluate(EntryView(targets, row, logprob[row, targets.id])).value
        confidence, guess = logprob.max(-1)
        self.add_loss(source, -float(own.double().sum()), len(own))
        self.positions += len(logprob)
        self.told = self.told and targets.kind != "text"
        if self.told:
            self.kl += float(divergence.double().sum())
            self.agreements += int((guess == first_choice(targets)[0]).sum())
        hit, known = (guess == targets.label).cpu().numpy(), said.cpu().numpy()
        self.accuracy.add(hit, known & given)
        self.bins.add(confidence.exp().cpu().numpy()[known], hit[known])

    def add_loss(self, source: str, nats: float, tokens: int) -> None:
        """Add the loss of tokens of one source."""
        self.loss[source] = self.loss.get(source, 0.0) + nats
        self.tokens[source] = self.tokens.get(source, 0) + tokens

    def add_chunks(self, across: AcrossTargets, own: Tensor) -> None:
        """Add the chunks of a batch; `own`: log-probability of each of the student's tokens, [P]."""
        said = label_logprob(across.teacher)
        student = chunk_sums(own, across.student_chunk, across.num_chunks)
        gap = (student - chunk_sums(said, across.teacher_chunk, across.num_chunks)).abs()
        known = gap.isfinite()
        self.chunks += across.num_chunks
        self.chunks_known += int(known.sum())
        self.chunk_gap += float(gap[known].double().sum())

    def add_bytes(self, source: str, samples: Sequence[Aligned], own: bool) -> None:
        """Add the text of samples: what their `own` tokens, those of the student, cover, or the teacher's."""
        if self.bytes is not None:
            new = sum(one.num_own_bytes if own else one.num_bytes for one in samples)
            self.bytes[source] = self.bytes.get(source, 0) + new

    def scores(self) -> Scores:
        """Return the averages."""
        positions = max(self.positions, 1)
        counts = self.tokens if self.bytes is None else self.bytes
        return {
            "loss": {source: self.loss[source] / max(counts[source], 1) for source in self.loss},
            "kl_to_teacher": self.kl / positions if self.told else None,
            "top1_agreement": self.agreements / positions if self.told else None,
            "ece": self.bins.error(),
            "tokens": self.tokens,
            **({"accuracy": self.accuracy.share()} if self.classifies else {}),
            **({} if self.bytes is None else self._across()),
        }

    def _across(self) -> Scores:
        return {
            "unit": "byte",
            "bytes": self.bytes,
            "chunk_gap": self.chunk_gap / self.chunks_known if self.chunks_known else None,
            "chunks_known": self.chunks_known / max(self.chunks, 1),
        }
