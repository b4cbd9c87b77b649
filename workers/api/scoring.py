"""Scores given tokens through an endpoint: requests, and answers made into top-k targets with their tail."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from storage.samples import Sample, SampleBatch, offsets_of
from storage.targets import TargetBatch
from workers.api.reply import BrokenReplyError, Reply, Request

ScoringMethod = Literal["prompt_logprobs", "echo"]
_ID_PREFIX = "token_id:"


@dataclass(frozen=True)
class ScoredPositions:
    """What an endpoint said about positions 1 … L−1 of a document of L tokens."""

    ids: list[list[int]]
    """Entries by falling probability, at most k."""
    logprobs: list[list[float]]
    own: list[float]
    """Log-probability of the document's own token."""
    spelled: dict[int, str] = field(default_factory=dict)
    """Token id → its text, where the endpoint gives both."""


def documents_of(sample: Sample) -> Iterator[tuple[list[int], list[int]]]:
    """Yield for each document with a supervised token its ids, and the supervised places in it, rising.

    Attention restarts at each document, so each is a prompt of its own, up to its last supervised token.
    """
    for number in np.unique(sample.document):
        inside = np.flatnonzero(sample.document == number)
        supervised = np.flatnonzero(sample.supervised[inside])
        if len(supervised):
            yield sample.tokens[inside[: supervised[-1] + 1]].tolist(), supervised.tolist()


def scoring_request(ids: Sequence[int], model: str | None, method: ScoringMethod, entries: int) -> Request:
    """Return the request that scores a document's tokens; an answer that does not is broken."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0.0,
        "return_tokens_as_token_ids": True,
    }
    body |= {"prompt_logprobs": entries} if method == "prompt_logprobs" else {"echo": True, "logprobs": entries}

    def check(reply: Reply) -> None:
        scored_positions(reply, method, ids, entries)

    return Request("/completions", body, len(ids), 1, len(ids), wants_logprobs=True, check=check)


def scored_positions(reply: Reply, method: ScoringMethod, ids: Sequence[int], entries: int) -> ScoredPositions:
    """Read an answer; BrokenReplyError when it does not fit the tokens sent."""
    try:
        rows = _prompt_rows(reply, ids) if method == "prompt_logprobs" else _echo_rows(reply, ids)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BrokenReplyError(
            f"log-probabilities of the prompt that cannot be read ({error!r})", reply.usage
        ) from None
    spelled: dict[int, str] = {}
    found = ScoredPositions([], [], [], spelled)
    for (entry, own), token in zip(rows, ids[1:], strict=True):
        best = sorted(((value, -i) for i, (value, _) in entry.items()), reverse=True)[:entries]
        found.ids.append([-i for _, i in best])
        found.logprobs.append([min(value, 0.0) for value, _ in best])
        found.own.append(own)
        if token in entry and entry[token][1] is not None:
            spelled[token] = str(entry[token][1])
    return found


_Row = tuple[dict[int, tuple[float, str | None]], float]
"""Entry id → (log-probability, text), and the own token's log-probability."""


def _prompt_rows(reply: Reply, ids: Sequence[int]) -> list[_Row]:
    """vLLM: a list with null, then `{id: {logprob, rank, decoded_token}}` for each further token."""
    raw = reply.prompt_logprobs
    if not isinstance(raw, list) or len(raw) != len(ids):
        raise ValueError(f"{len(raw) if isinstance(raw, list) else 'no'} rows for {len(ids)} tokens")
    rows = []
    for item, token in zip(raw[1:], ids[1:], strict=True):
        entry = {int(i): (_number(value["logprob"]), value.get("decoded_token")) for i, value in item.items()}
        if token not in entry:
            raise ValueError(f"nothing about token {token}, which was sent")
        rows.append((entry, entry[token][0]))
    return rows


def _echo_rows(reply: Reply, ids: Sequence[int]) -> list[_Row]:
    """OpenAI's completions: parallel lists over prompt and completion; only tokens named by id are used."""
    raw = reply.logprobs
    tokens, own, top = raw["tokens"], raw["token_logprobs"], raw["top_logprobs"]
    if min(len(tokens), len(own), len(top)) < len(ids):
        raise ValueError(f"{len(tokens)} tokens came back for {len(ids)}")
    named = [_id(token) for token in tokens[: len(ids)]]
    if named != list(ids):
        raise ValueError("other tokens came back than were sent")
    rows = []
    for n in range(1, len(ids)):
        # A string that is no id may stand for several tokens: its mass is left to the tail.
        entries = {_id(name): (_number(value), None) for name, value in top[n].items()}
        rows.append(({i: value for i, value in entries.items() if i is not None}, _number(own[n])))
    return rows  # type: ignore[return-value]


def _id(token: str) -> int | None:
    return int(token.removeprefix(_ID_PREFIX)) if token.startswith(_ID_PREFIX) else None


def _number(value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise ValueError("a log-probability that is no number")
    return max(number, -1e4)


def targets_of(samples: SampleBatch, scored: Sequence[Sequence[ScoredPositions]]) -> TargetBatch:
    """Return the targets of samples from what was said about their documents, in the order of `documents_of`.

    The tail is what the entries leave. `teacher_entropy` takes it as one more token: a lower bound of the entropy.
    """
    ids: list[list[int]] = []
    logprobs: list[list[float]] = []
    nll, entropy = [], []
    for n, documents in enumerate(scored):
        own: list[float] = []
        begin = len(ids)
        for (_, supervised), found in zip(documents_of(samples.sample(n)), documents, strict=True):
            for place in supervised:
                ids.append(found.ids[place - 1])
                logprobs.append(found.logprobs[place - 1])
                own.append(found.own[place - 1])
        nll.append(-float(np.mean(own)))
        entropy.append(float(np.mean([_entropy(row) for row in logprobs[begin:]])))
    mass = np.array([math.fsum(math.exp(value) for value in row) for row in logprobs])
    return TargetBatch(
        offsets=offsets_of(samples.num_supervised()),
        count=np.array([len(row) for row in ids], dtype=np.int32),
        id=np.array([i for row in ids for i in row], dtype=np.int32),
        logprob=np.array([value for row in logprobs for value in row], dtype=np.float16),
        draws=None,
        tail_mass=np.clip(1.0 - mass, 0.0, 1.0).astype(np.float16),
        teacher_nll=np.array(nll, dtype=np.float32),
        teacher_entropy=np.array(entropy, dtype=np.float32),
    )


def text_targets(samples: SampleBatch) -> TargetBatch:
    """Return the targets of kind `text`: no entries. What the teacher thought of the text is unknown: 0."""
    positions = int(samples.num_supervised().sum())
    return TargetBatch(
        offsets=offsets_of(samples.num_supervised()),
        count=np.zeros(positions, dtype=np.int32),
        id=np.zeros(0, dtype=np.int32),
        logprob=np.zeros(0, dtype=np.float16),
        draws=None,
        tail_mass=np.ones(positions, dtype=np.float16),
        teacher_nll=np.zeros(len(samples), dtype=np.float32),
        teacher_entropy=np.zeros(len(samples), dtype=np.float32),
    )


def _entropy(logprobs: Sequence[float]) -> float:
    tail = max(0.0, 1.0 - math.fsum(math.exp(value) for value in logprobs))
    inside = -math.fsum(value * math.exp(value) for value in logprobs)
    return inside - (tail * math.log(tail) if tail > 0 else 0.0)
