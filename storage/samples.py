"""Samples in memory: context windows, their ids, and batches of them as flat arrays.

A sample is one context window. Its id depends on its token ids, its supervised mask and its document
boundaries alone, so a cached target stays valid for any order, batch size, world size or run that uses
the same window.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

ID_BYTES = 16
NO_LABEL = -100
"""Label of a token of which nobody says the class; the number that PyTorch ignores."""

Int16Array = NDArray[np.int16]
Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
UInt8Array = NDArray[np.uint8]
BoolArray = NDArray[np.bool_]

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Sample:
    """One context window of length L.

    `supervised[i]` is true when the student must predict `tokens[i]`, from the tokens before it in the same
    document; a document's first token is never supervised. `document` numbers the packed documents 0, 1, ….
    """

    source: str
    tokens: Int32Array  # [L]
    supervised: BoolArray  # [L]
    document: Int16Array  # [L]
    label: Int32Array | None = None  # [L], the class of each token; None where nobody says one
    sample_id: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_id", compute_sample_id(self.tokens, self.supervised, self.document))


def compute_sample_id(tokens: Int32Array, supervised: BoolArray, document: Int16Array) -> bytes:
    """Return the 16-byte BLAKE2b id of a window: length, token ids, supervised mask, document boundaries."""
    starts = np.flatnonzero(np.diff(document)).astype("<i4")
    digest = blake2b(digest_size=ID_BYTES, person=b"lectern.sample")
    digest.update(len(tokens).to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
    digest.update(np.packbits(supervised).tobytes())
    digest.update(starts.tobytes())
    return digest.digest()


@dataclass(frozen=True, eq=False)
class SampleBatch:
    """N samples as flat arrays; sample n owns `offsets[n]:offsets[n+1]` of every token-wise array."""

    sample_id: UInt8Array  # [N, 16]
    source: list[str]  # [N]
    offsets: Int64Array  # [N + 1]
    tokens: Int32Array  # [T]
    supervised: BoolArray  # [T]
    document: Int16Array  # [T]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Self:
        """Concatenate samples, keeping their order."""
        lengths = [len(s.tokens) for s in samples]
        ids = np.frombuffer(b"".join(s.sample_id for s in samples), dtype=np.uint8).reshape(len(samples), ID_BYTES)
        return cls(
            sample_id=ids,
            source=[s.source for s in samples],
            offsets=offsets_of(lengths),
            tokens=_join([s.tokens for s in samples], np.int32),
            supervised=_join([s.supervised for s in samples], np.bool_),
            document=_join([s.document for s in samples], np.int16),
        )

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, padding not counted."""
        return len(self.tokens)

    def lengths(self) -> Int64Array:
        """Return the number of tokens of each sample, [N]."""
        return np.diff(self.offsets)

    def num_supervised(self) -> Int64Array:
        """Return the number of supervised positions of each sample, [N]."""
        sums = np.concatenate(([0], np.cumsum(self.supervised, dtype=np.int64)))
        return np.asarray(sums[self.offsets[1:]] - sums[self.offsets[:-1]])

    def ids(self) -> list[bytes]:
        """Return the sample ids as bytes, in order."""
        raw = self.sample_id.tobytes()
        return [raw[i : i + ID_BYTES] for i in range(0, len(raw), ID_BYTES)]

    def sample(self, n: int) -> Sample:
        """Return sample `n` by itself."""
        part = slice(self.offsets[n], self.offsets[n + 1])
        return Sample(self.source[n], self.tokens[part], self.supervised[part], self.document[part])

    def take(self, rows: Sequence[int]) -> "SampleBatch":
        """Return the samples at `rows`, in that order."""
        index = ragged_index(self.offsets, rows)
        return SampleBatch(
            sample_id=self.sample_id[list(rows)],
            source=[self.source[r] for r in rows],
            offsets=offsets_of(self.lengths()[list(rows)]),
            tokens=self.tokens[index],
            supervised=self.supervised[index],
            document=self.document[index],
        )

    @classmethod
    def concat(cls, batches: Sequence["SampleBatch"]) -> "SampleBatch":
        """Join batches, keeping their order."""
        return SampleBatch(
            sample_id=np.concatenate([b.sample_id for b in batches]),
            source=[name for b in batches for name in b.source],
            offsets=offsets_of(np.concatenate([b.lengths() for b in batches])),
            tokens=np.concatenate([b.tokens for b in batches]),
            supervised=np.concatenate([b.supervised for b in batches]),
            document=np.concatenate([b.document for b in batches]),
        )


def offsets_of(lengths: Iterable[int] | Int64Array) -> Int64Array:
    """Return [0, l0, l0+l1, …] for the given lengths."""
    counts = np.asarray(list(lengths) if not isinstance(lengths, np.ndarray) else lengths, dtype=np.int64)
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def ragged_index(offsets: Int64Array, rows: Sequence[int]) -> Int64Array:
    """Return the flat positions that `rows` of a ragged array own, in the order of `rows`."""
    picked = np.asarray(rows, dtype=np.int64)
    starts, lengths = offsets[picked], offsets[picked + 1] - offsets[picked]
    new = offsets_of(lengths)
    return np.arange(new[-1], dtype=np.int64) + np.repeat(starts - new[:-1], lengths)


def _join(arrays: Sequence[NDArray[_T]], dtype: type[_T]) -> NDArray[_T]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype=dtype)
