"""Two tokenizers on one text: the student's tokens of a sample, and how they lie over the teacher's.

Every token covers a run of bytes. Where a token of both sides ends at the same byte there is a common border; what lies
between two of them is a chunk: the least text that both sides spell in whole tokens. Start and end tokens are laid over
each other as if they were one byte of text; other special tokens are text as they are written.
"""

import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.samples import BoolArray, Int16Array, Int32Array, Int64Array, Sample, SampleBatch
from storage.token_bytes import TokenBytes, token_bytes
from storage.tokenizer import Tokenizer

CACHE_BYTES = 256 << 20
"""Aligned samples that an aligner keeps."""
_NONE = -1


@dataclass(frozen=True, eq=False)
class Overlay:
    """Which chunk the tokens of both sides belong to, and where both predict the same text."""

    num_chunks: int
    left: Int64Array  # [A], chunk of each token; -1 where its chunk does not count
    right: Int64Array  # [B], likewise
    starts: Int64Array  # [Q, 2], tokens of both sides that begin at one byte and count


def overlay(left: Int64Array, right: Int64Array, counted_left: BoolArray, counted_right: BoolArray) -> Overlay:
    """Lay two rows of tokens over one text.

    A chunk counts where all of its tokens do, on both sides, and these cover the same bytes. So none reaches over the
    end of a document, whose first tokens never count.

    Args:
        left: where the tokens of one side begin and end, in bytes, [A, 2], in order.
        right: those of the other side, [B, 2].
        counted_left, counted_right: which tokens count.
    """
    ends = np.intersect1d(left[:, 1], right[:, 1])
    chunks = [np.searchsorted(ends, side[:, 1], side="left") for side in (left, right)]
    whole = np.ones(len(ends) + 1, dtype=np.bool_)
    sizes = []
    for chunk, side, counted in zip(chunks, (left, right), (counted_left, counted_right), strict=True):
        sizes.append(np.bincount(chunk, weights=side[:, 1] - side[:, 0], minlength=len(whole)))
        whole[chunk[~counted & (side[:, 1] > side[:, 0])]] = False
    whole &= (sizes[0] == sizes[1]) & (sizes[0] > 0)
    number = np.where(whole, np.cumsum(whole) - 1, _NONE)
    _, at_left, at_right = np.intersect1d(
        np.where(counted_left, left[:, 0], -1), np.where(counted_right, right[:, 0], -2), return_indices=True
    )
    return Overlay(int(whole.sum()), number[chunks[0]], number[chunks[1]], np.stack([at_left, at_right], axis=1))


@dataclass(frozen=True, eq=False)
class Aligned:
    """A sample in the student's tokens, and how they lie over the P supervised ones of the teacher."""

    sample: Sample
    """What the student reads; its supervised tokens, S of them, are those that hold supervised text."""
    num_bytes: int
    """Bytes of the teacher's supervised tokens; start and end tokens have none."""
    num_own_bytes: int
    """Bytes of the student's supervised tokens."""
    num_chunks: int
    teacher_chunk: Int32Array  # [P], chunk of each supervised token of the teacher; -1 for none
    student_chunk: Int32Array  # [S]
    pairs: Int32Array  # [Q, 2], supervised positions of both that predict from the same text


class Aligner:
    """Aligns samples of a teacher's tokenizer with a student's. Thread-safe; pickles without what it has kept."""

    def __init__(self, teacher: Tokenizer, student: Tokenizer, max_tokens: int = sys.maxsize) -> None:
        """Take both tokenizers; InputError where one does not spell text.

        Args:
            teacher: the teacher's tokenizer.
            student: the student's.
            max_tokens: most tokens of a document for the student; what is beyond them is left out.
        """
        self._teacher, self._student = teacher, student
        self._theirs, self._own = token_bytes(self._teacher), token_bytes(self._student)
        self._max_tokens = max_tokens
        self._spaced = self._theirs.spell(self._teacher.encode_batch(["a"])[0]).startswith(b" ")
        self._lock = Lock()
        self._kept: OrderedDict[bytes, Aligned] = OrderedDict()
        self._kept_bytes = 0

    @property
    def vocab_size(self) -> int:
        """Ids of the student's tokenizer."""
        return self._student.vocab_size

    @property
    def folder(self) -> Path:
        """Where the student's tokenizer was loaded from."""
        return self._student.folder

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._teacher, self._student, self._max_tokens)

    def num_tokens(self, samples: SampleBatch) -> int:
        """Return how many tokens of the student's samples are."""
        return sum(len(self.align(samples.sample(n)).sample.tokens) for n in range(len(samples)))

    def align(self, sample: Sample) -> Aligned:
        """Return a sample aligned; of one that was asked for lately what was found then."""
        with self._lock:
            found = self._kept.get(sample.sample_id)
        if found is not None:
            return found
        made = self._align(sample)
        with self._lock:
            if sample.sample_id not in self._kept:
                self._kept[sample.sample_id] = made
                self._kept_bytes += _num_bytes(made)
            while self._kept_bytes > CACHE_BYTES and len(self._kept) > 1:
                self._kept_bytes -= _num_bytes(self._kept.popitem(last=False)[1])
        return made

    def _align(self, sample: Sample) -> Aligned:
        theirs = self._spans(sample.tokens, self._teacher, self._theirs)
        supervised_upto = np.concatenate(([0], np.cumsum(np.where(sample.supervised, np.diff(theirs)[:, 0], 0))))
        tokens, spans, numbers = self._own_tokens(sample, theirs)
        # A token that holds supervised text in part counts, else that text would go unlearnt.
        edges = np.concatenate(([0], theirs[:, 1]))
        held = np.interp(spans[:, 1], edges, supervised_upto) - np.interp(spans[:, 0], edges, supervised_upto)
        first = np.diff(numbers, prepend=-1) != 0
        supervised = (held > 0) & ~first
        over = overlay(theirs, spans, sample.supervised, supervised)
        theirs_at, own_at = (np.cumsum(mask) - 1 for mask in (sample.supervised, supervised))
        pairs = np.stack([theirs_at[over.starts[:, 0]], own_at[over.starts[:, 1]]], axis=1)
        return Aligned(
            sample=Sample(sample.source, tokens, supervised, numbers),
            num_bytes=_text_bytes(theirs, sample.supervised & ~_marks(sample.tokens, self._teacher)),
            num_own_bytes=_text_bytes(spans, supervised & ~_marks(tokens, self._student)),
            num_chunks=over.num_chunks,
            teacher_chunk=over.left[sample.supervised].astype(np.int32),
            student_chunk=over.right[supervised].astype(np.int32),
            pairs=pairs.astype(np.int32),
        )

    def _own_tokens(self, sample: Sample, theirs: Int64Array) -> tuple[Int32Array, Int64Array, Int16Array]:
        """Return the student's tokens, their bytes [B, 2] in the sample's text, and their documents."""
        marks = {self._teacher.bos_id: self._student.bos_id, self._teacher.eos_id: self._student.eos_id}
        marked = np.isin(sample.tokens, [mark for mark in marks if mark is not None])
        # A run ends where the document does, and before and after each mark.
        fresh = np.diff(sample.document, prepend=-1) != 0
        begins = np.flatnonzero(fresh | marked | np.concatenate(([False], marked[:-1])))
        runs = list(zip(begins.tolist(), [*begins[1:].tolist(), len(sample.tokens)], strict=True))
        raw = [b"" if marked[a] else self._theirs.spell(sample.tokens[a:b]) for a, b in runs]
        # The space that the teacher's tokenizer may put before a text is none of it; the first token has its byte.
        spaces = [self._spaced and one.startswith(b" ") for one in raw]
        texts = [_whole_characters(one[space:]) for one, space in zip(raw, spaces, strict=True)]
        encoded = self._student.encode_batch([text for _, text in texts])
        tokens: list[NDArray[np.int32]] = []
        spans: list[Int64Array] = []
        numbers: list[Int16Array] = []
        room: dict[int, int] = {}
        for (a, _), space, (skipped, text), ids in zip(runs, spaces, texts, encoded, strict=True):
            number, begin = int(sample.document[a]), int(theirs[a, 0])
            if marked[a]:
                mark = marks[int(sample.tokens[a])]
                ids = np.array([] if mark is None else [mark], dtype=np.int32)
                placed = np.array([[begin, begin + 1]] * len(ids), dtype=np.int64).reshape(-1, 2)
            else:
                placed = self._placed(ids, text.encode(), begin + space + skipped)
                placed[:1, 0] -= space
                ids = ids[: len(placed)]
            most = room.get(number, self._max_tokens)
            ids, placed = ids[:most], placed[:most]
            room[number] = most - len(ids)
            tokens.append(ids)
            spans.append(placed)
            numbers.append(np.full(len(ids), number, dtype=np.int16))
        if not any(len(ids) for ids in tokens):  # nothing that the student could read: a token that nobody learns
            return np.zeros(1, np.int32), np.zeros((1, 2), np.int64), np.zeros(1, np.int16)
        return np.concatenate(tokens), np.concatenate(spans), np.concatenate(numbers)

    def _placed(self, ids: Int32Array, text: bytes, begin: int) -> Int64Array:
        """Return the bytes of the student's tokens of a text, [B, 2]; of none where it does not give the text back."""
        given = self._own.spell(ids)
        extra = len(given) - len(text)
        # Some tokenizers put a space before every text: that byte is nobody's.
        if given[max(extra, 0) :] != text or given[: max(extra, 0)] not in (b"", b" "):
            return np.zeros((0, 2), dtype=np.int64)
        ends = np.cumsum(self._own.length[ids])
        bounds = np.concatenate(([0], ends)) - extra
        return np.asarray(begin + np.maximum(np.stack([bounds[:-1], bounds[1:]], axis=1), 0))

    @staticmethod
    def _spans(ids: Int32Array, tokenizer: Tokenizer, table: TokenBytes) -> Int64Array:
        """Return the bytes of tokens, [A, 2]: start and end tokens are one long."""
        length = np.where(_marks(ids, tokenizer), 1, table.length[ids])
        ends = np.cumsum(length)
        return np.stack([ends - length, ends], axis=1)


def _marks(ids: Int32Array, tokenizer: Tokenizer) -> BoolArray:
    return np.isin(ids, [mark for mark in (tokenizer.bos_id, tokenizer.eos_id) if mark is not None])


def _text_bytes(spans: Int64Array, counted: BoolArray) -> int:
    return int((spans[:, 1] - spans[:, 0])[counted].sum())


def _whole_characters(raw: bytes) -> tuple[int, str]:
    """Return the text of bytes, and how many before it belong to a character that began earlier.

    What a window's border has cut a character to is left out at both ends; text that is none at all is left out whole.
    """
    first = next((n for n in range(min(4, len(raw) + 1)) if n == len(raw) or raw[n] & 0xC0 != 0x80), 0)
    for last in range(len(raw), max(first, len(raw) - 4) - 1, -1):
        try:
            return first, raw[first:last].decode()
        except UnicodeDecodeError:
            continue
    return 0, ""


def _num_bytes(aligned: Aligned) -> int:
    arrays: Sequence[NDArray[np.generic]] = (
        aligned.sample.tokens,
        aligned.sample.supervised,
        aligned.sample.document,
        aligned.teacher_chunk,
        aligned.student_chunk,
        aligned.pairs,
    )
    return sum(array.nbytes for array in arrays)
