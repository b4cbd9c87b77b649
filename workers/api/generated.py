"""Targets on text that the teacher wrote: from the log-probabilities that came with its own tokens.

`lectern generate` with `generate.logprobs` keeps them with each answer, and writes the tokens of prompt and completion
as columns of the kept rows. A source with `tokens_field` makes samples of exactly these tokens; here each document of a
sample is found again among the kept rows, and its answer gives the targets. Nothing is asked, or paid, again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq

from storage.object_store import Store
from storage.range_file import RangeFile
from storage.samples import Int32Array, Sample
from storage.tokenizer import Tokenizer
from workers.api.answers import AnswerStore
from workers.api.reply import Reply
from workers.api.scoring import ScoredPositions, documents_of

_ID_PREFIX = "token_id:"
NOT_FOUND = (
    "it is no whole completion that the teacher wrote with its log-probabilities; raise data.window_tokens where "
    "completions are cut, and take sources from generate.url alone"
)


class TokenNames:
    """Which token a name that an endpoint gives stands for, where that is exact."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Spell out the vocabulary; a text that several tokens have names none of them."""
        self._ids: dict[str, int] = {}
        twice: set[str] = set()
        for token in range(tokenizer.vocab_size):
            text = tokenizer.decode([token])
            if text in self._ids or "\ufffd" in text:
                twice.add(text)
            self._ids[text] = token
        for text in twice:
            self._ids.pop(text, None)
        self._vocab_size = tokenizer.vocab_size

    def id(self, name: Any) -> int | None:
        """Return the token's id, or None."""
        if not isinstance(name, str):
            return None
        if name.startswith(_ID_PREFIX):
            number = name.removeprefix(_ID_PREFIX)
            return int(number) if number.isdigit() and int(number) < self._vocab_size else None
        return self._ids.get(name)


@dataclass(frozen=True)
class GeneratedTokens:
    """A completion's tokens and what the teacher thought at each; N tokens."""

    ids: list[int]
    own: list[float]
    """Log-probability of each."""
    entries: list[dict[int, float]]
    """Id → log-probability of the best tokens at each, those with an exact name."""

    @classmethod
    def of(cls, reply: Reply, names: TokenNames) -> Self | None:
        """Read an answer; None where it tells nothing, or has a token without an exact name."""
        content = reply.logprobs.get("content") if isinstance(reply.logprobs, Mapping) else None
        if not isinstance(content, list) or not content:
            return None
        ids, own, entries = [], [], []
        try:
            for item in content:
                token = names.id(item["token"])
                if token is None:
                    return None
                ids.append(token)
                own.append(_logprob(item["logprob"]))
                best = ((names.id(other["token"]), _logprob(other["logprob"])) for other in item["top_logprobs"])
                entries.append({other: value for other, value in best if other is not None})
        except (KeyError, TypeError, ValueError):
            return None
        return cls(ids, own, entries)


class GeneratedText:
    """The kept completions of a place, by their tokens."""

    def __init__(self, completions: Store, answers: AnswerStore, names: TokenNames, entries: int) -> None:
        """Read which there are; targets have at most so many entries."""
        self._answers, self._names, self._entries = answers, names, entries
        self._rows: dict[bytes, tuple[bytes, int]] = {}
        """Digest of a row's tokens → key of its answer, and how many of the tokens are the prompt's."""
        for key in completions.list("kept-"):
            for tokens, supervised, completion_id in _rows(completions, key):
                prompt = int(np.argmax(supervised))
                self._rows[_digest(tokens)] = (bytes.fromhex(completion_id), prompt)

    def __len__(self) -> int:
        return len(self._rows)

    def score(self, sample: Sample) -> list[ScoredPositions] | None:
        """Return what was said about each document of a sample, or None where one is not found."""
        found = []
        for ids, _ in documents_of(sample):
            positions = self._document(ids)
            if positions is None:
                return None
            found.append(positions)
        return found

    def _document(self, ids: Sequence[int]) -> ScoredPositions | None:
        key, prompt = self._rows.get(_digest(np.asarray(ids, dtype=np.int32)), (b"", 0))
        answer = self._answers.get(key)
        generated = GeneratedTokens.of(answer.reply, self._names) if answer is not None and answer.reply else None
        if generated is None or generated.ids != list(ids[prompt:]):
            return None
        best = [
            # Where no entry has an exact name the token itself, which has, stands alone before the tail.
            sorted(row.items(), key=lambda item: (-item[1], item[0]))[: self._entries] or [(token, own)]
            for row, token, own in zip(generated.entries, generated.ids, generated.own, strict=True)
        ]
        # Of the prompt nothing is known, and nothing is supervised.
        empty: list[Any] = [[] for _ in range(prompt - 1)]
        return ScoredPositions(
            ids=[*empty, *([token for token, _ in row] for row in best)],
            logprobs=[*empty, *([value for _, value in row] for row in best)],
            own=[*(0.0 for _ in empty), *generated.own],
        )


def _rows(store: Store, key: str) -> Iterable[tuple[Int32Array, Any, str]]:
    file = pq.ParquetFile(RangeFile(store, key, store.size(key)))
    if "tokens" not in file.schema_arrow.names:
        return
    for batch in file.iter_batches(columns=["tokens", "supervised", "completion_id"]):
        for row in batch.to_pylist():
            if row["tokens"] is not None:
                yield np.asarray(row["tokens"], dtype=np.int32), np.asarray(row["supervised"]), row["completion_id"]


def _digest(tokens: Int32Array) -> bytes:
    return blake2b(np.ascontiguousarray(tokens, dtype="<i4").tobytes(), digest_size=16).digest()


def _logprob(value: Any) -> float:
    number = float(value)
    if number != number:
        raise ValueError("a log-probability that is no number")
    return min(max(number, -1e4), 0.0)
