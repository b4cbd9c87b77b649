"""The bytes that each token of a tokenizer stands for, so that the tokens of two tokenizers can be laid over one text.

Byte-level BPE spells each byte by one of 256 printable characters (Radford et al. 2019); SentencePiece writes a space
as ▁ and a byte that is no token as <0xAB>. Those that do not give text back, such as WordPiece, have no such bytes.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import InputError
from storage.samples import Int64Array
from storage.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
PROBE = "Lectern: naïve 漢字,\n\ttwo  spaces and (signs)!"
"""Text that a tokenizer must give back byte for byte."""


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The spelling of V tokens."""

    data: tuple[bytes, ...]  # V
    length: Int64Array  # [V]

    def spell(self, ids: NDArray[np.integer[Any]]) -> bytes:
        """Return the bytes of tokens, joined."""
        return b"".join([self.data[i] for i in ids.tolist()])


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """Return the bytes of every token; added ones stand for their own text.

    Raises:
        InputError: the tokenizer does not give text back byte for byte.
    """
    parsed = tokenizer.content()
    decoders = {node.get("type"): node for node in _nodes(parsed.get("decoder"))}
    entries = dict(_entries(parsed["model"]))
    if "ByteLevel" in decoders:
        spelt = {i: _byte_level(text) for text, i in entries.items()}
    elif "Metaspace" in decoders or decoders.get("Replace", {}).get("content") == " ":
        spelt = {i: _sentence_piece(text) for text, i in entries.items()}
    else:
        raise _unspelt(tokenizer, f"its decoder ({', '.join(map(str, decoders)) or 'none'}) is not known")
    spelt |= {token["id"]: token["content"].encode() for token in parsed.get("added_tokens", [])}
    data = tuple(spelt.get(i, b"") for i in range(tokenizer.vocab_size))
    table = TokenBytes(data, np.array([len(one) for one in data], dtype=np.int64))
    given = table.spell(tokenizer.encode_batch([PROBE])[0])
    if given.removeprefix(b" ") != PROBE.encode():
        raise _unspelt(tokenizer, f"of {PROBE!r} it makes {given.decode(errors='replace')!r}")
    return table


def _unspelt(tokenizer: Tokenizer, why: str) -> InputError:
    return InputError(
        f"the tokens of {tokenizer.folder} cannot be laid over text byte by byte: {why}; losses across tokenizers need "
        "byte-level BPE, or SentencePiece with byte fallback, on both sides"
    )


def _entries(model: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    vocab = model.get("vocab", {})
    return iter(vocab.items()) if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))


def _nodes(decoder: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(decoder, dict):
        yield decoder
        for node in decoder.get("decoders", []):
            yield from _nodes(node)


def _byte_level(text: str) -> bytes:
    known = [_BYTES.get(character) for character in text]
    return text.encode() if None in known else bytes(known)  # type: ignore[arg-type]


def _sentence_piece(text: str) -> bytes:
    byte = _BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()


def _alphabet() -> dict[str, int]:
    """Return the byte that each character stands for: itself where it can be seen, else one of those from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_BYTES = _alphabet()
