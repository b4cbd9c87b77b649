"""Documents → context windows. Deterministic, streaming, and independent of everything but the documents' order.

A document longer than a window is cut; each further piece repeats the last token of the piece before it as
context, so that every token but a document's first is supervised (where its mask says so) exactly once. Shorter
documents are never cut: several share a window, each numbered, and attention never crosses their borders.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from storage.samples import NO_LABEL, BoolArray, Int32Array, Sample

MIN_TOKENS = 2
"""A shorter piece has nothing to predict."""
MAX_DOCUMENTS = 32_767
"""Documents in one window: their numbers are int16."""


@dataclass(frozen=True, eq=False)
class EncodedDocument:
    """Token ids of one document and which of them the student must predict; the first is never supervised."""

    tokens: Int32Array  # [n]
    supervised: BoolArray  # [n]
    label: Int32Array | None = None  # [n], the class of each token

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, end: int, supervised: BoolArray) -> "EncodedDocument":
        """Return tokens `start` to `end`, of which these are supervised."""
        label = None if self.label is None else self.label[start:end]
        return EncodedDocument(self.tokens[start:end], supervised, label)


def trim(document: EncodedDocument) -> EncodedDocument:
    """Return the document without what follows its last supervised token, which no prediction can see.

    The first token counts as unsupervised whatever the mask says. A document without supervised tokens becomes empty.
    """
    supervised = document.supervised.copy()
    supervised[:1] = False
    positions = np.flatnonzero(supervised)
    end = int(positions[-1]) + 1 if len(positions) else 0
    return document.part(0, end, supervised[:end])


def cut(document: EncodedDocument, first_tokens: int, window_tokens: int) -> Iterator[EncodedDocument]:
    """Yield the pieces of a document: at most `first_tokens` tokens, then at most `window_tokens` each.

    Successive pieces overlap by one token, unsupervised in the later one. Pieces without a supervised token are
    left out.
    """
    start, end = 0, min(first_tokens, len(document))
    while end - start >= MIN_TOKENS:
        supervised = document.supervised[start:end].copy()
        supervised[0] = False
        if supervised.any():
            yield document.part(start, end, supervised)
        start, end = end - 1, min(end - 1 + window_tokens, len(document))


class Packer:
    """Packs the documents of one source and split, in order, into windows of at most `window_tokens` tokens."""

    def __init__(self, source: str, window_tokens: int, pack: bool = True, last_only: bool = False) -> None:
        """Start with an empty window.

        With `pack` false each document or piece gets a window of its own; `last_only` supervises its last token.
        """
        self.source = source
        self.window_tokens = window_tokens
        self.pack = pack
        self.last_only = last_only
        self._pieces: list[EncodedDocument] = []
        self._room = window_tokens

    def add(self, document: EncodedDocument) -> list[Sample]:
        """Return the windows that this document completes.

        A document that fits into a window but not into the open one's room starts the next window. A longer one must
        be cut anyway: it fills the open window first where that leaves it at least a quarter of a window's context.
        """
        document = trim(document)
        room = self.window_tokens
        if self.pack and len(document) > self.window_tokens and 4 * self._room >= self.window_tokens:
            room = max(self._room, MIN_TOKENS)
        windows = []
        for piece in map(self._masked, cut(document, room, self.window_tokens)):
            if len(piece) > self._room or len(self._pieces) == MAX_DOCUMENTS:
                windows += self.flush()
            self._pieces.append(piece)
            self._room -= len(piece)
            if not self.pack or self._room < MIN_TOKENS:
                windows += self.flush()
        return windows

    def _masked(self, piece: EncodedDocument) -> EncodedDocument:
        if not self.last_only:
            return piece
        return piece.part(0, len(piece), np.arange(len(piece)) == len(piece) - 1)

    def flush(self) -> list[Sample]:
        """Return the open window, if it holds anything, and start a new one."""
        if not self._pieces:
            return []
        pieces, self._pieces, self._room = self._pieces, [], self.window_tokens
        window = Sample(
            source=self.source,
            tokens=np.concatenate([piece.tokens for piece in pieces]),
            supervised=np.concatenate([piece.supervised for piece in pieces]),
            document=np.repeat(np.arange(len(pieces), dtype=np.int16), [len(piece) for piece in pieces]),
            label=_joined_labels(pieces),
        )
        return [window]


def _joined_labels(pieces: Sequence[EncodedDocument]) -> Int32Array | None:
    if all(piece.label is None for piece in pieces):
        return None
    labels = [np.full(len(piece), NO_LABEL, np.int32) if piece.label is None else piece.label for piece in pieces]
    return np.concatenate(labels)


def pack_documents(
    documents: Iterable[EncodedDocument], source: str, window_tokens: int, pack: bool = True
) -> Iterator[Sample]:
    """Yield the windows of a whole sequence of documents; see `Packer`."""
    packer = Packer(source, window_tokens, pack)
    for document in documents:
        yield from packer.add(document)
    yield from packer.flush()
