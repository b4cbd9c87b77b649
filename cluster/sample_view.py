"""What the teacher said about one sample, token by token, for `inspect --sample` and the report."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from storage.samples import SampleBatch
from storage.targets import Float32Array, TargetBatch

SHOWN_CHOICES = 4


@dataclass(frozen=True)
class Choice:
    """One token that the teacher considered."""

    text: str
    probability: float


@dataclass(frozen=True)
class TokenView:
    """One token of a window."""

    position: int
    text: str
    supervised: bool
    opens_document: bool
    probability: float | None
    """What the teacher gave this token; None where it is not supervised or not among the kept entries."""
    choices: list[Choice]
    """The teacher's first choices by falling probability; empty where the token is not supervised."""
    agrees: bool
    """Whether this token was the teacher's first choice."""
    tail: float
    """Teacher probability outside the kept entries."""
    entropy: float
    """Nats, with the tail counted as one token: a lower bound."""


@dataclass(frozen=True)
class SampleView:
    """One sample with what the teacher said about it."""

    sample_id: str
    source: str
    tokens: list[TokenView]
    teacher_nll: float
    teacher_entropy: float

    @property
    def agreement(self) -> float:
        """Return the share of supervised tokens that were the teacher's first choice."""
        told = [token.agrees for token in self.tokens if token.supervised]
        return sum(told) / len(told) if told else 0.0


def view_sample(samples: SampleBatch, targets: TargetBatch, row: int, text_of: Callable[[int], str]) -> SampleView:
    """Return the view of sample `row`; `text_of` gives a token id's text."""
    sample, own = samples.sample(row), targets.take([row])
    offsets = own.entry_offsets
    probabilities: Float32Array = np.exp(own.logprob.astype(np.float32))
    views, p = [], 0
    for n, token in enumerate(sample.tokens.tolist()):
        supervised = bool(sample.supervised[n])
        entries = slice(offsets[p], offsets[p + 1]) if supervised else slice(0, 0)
        ids, probability = own.id[entries], probabilities[entries]
        ranked = np.argsort(-probability, kind="stable")[:SHOWN_CHOICES]
        found = np.flatnonzero(ids == token)
        tail = float(own.tail_mass[p]) if supervised else 0.0
        views.append(
            TokenView(
                position=n,
                text=text_of(token),
                supervised=supervised,
                opens_document=n > 0 and bool(sample.document[n] != sample.document[n - 1]),
                probability=float(probability[found[0]]) if len(found) else None,
                choices=[Choice(text_of(int(ids[r])), float(probability[r])) for r in ranked],
                agrees=bool(len(ranked) and ids[ranked[0]] == token),
                tail=tail,
                entropy=_entropy(probability, tail),
            )
        )
        p += supervised
    return SampleView(
        sample_id=sample.sample_id.hex(),
        source=sample.source,
        tokens=views,
        teacher_nll=float(own.teacher_nll[0]),
        teacher_entropy=float(own.teacher_entropy[0]),
    )


def _entropy(probability: Float32Array, tail: float) -> float:
    kept = np.append(probability.astype(np.float64), tail)
    kept = kept[kept > 0]
    return max(float(-(kept * np.log(kept)).sum()), 0.0)


def visible(text: str) -> str:
    """Return a token's text with its white space made visible."""
    return (
        text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", "␣")
        if text.strip() == ""
        else (text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍"))
    )
