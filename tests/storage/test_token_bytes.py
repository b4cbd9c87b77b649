"""The bytes of tokens: joined they are the text, whatever the tokenizer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import write_sentence_piece, write_tokenizer, write_word_piece

from storage.errors import InputError
from storage.token_bytes import token_bytes
from storage.tokenizer import Tokenizer

TEXT = st.text(max_size=40) | st.text("ab c\n▁é漢<>0x", max_size=40)


@pytest.fixture(scope="module", params=[write_tokenizer, write_sentence_piece])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    write: Callable[..., Path] = request.param
    return Tokenizer.load(write(tmp_path_factory.mktemp("t"), corpus=["the red fox and the lazy dog, naïve 漢字"] * 9))


@given(text=TEXT)
def test_the_bytes_of_a_texts_tokens_are_its_own(tokenizer: Tokenizer, text: str) -> None:
    if "▁" in text and tokenizer.folder.joinpath("sentencepiece").exists():
        return  # there it is written as it writes a space: nobody can tell them apart
    table = token_bytes(tokenizer)
    ids = tokenizer.encode_batch([text])[0]
    assert table.spell(ids) in (text.encode(), b" " + text.encode())
    assert table.length[ids].sum() == len(table.spell(ids))


def test_special_tokens_stand_for_themselves(tokenizer: Tokenizer) -> None:
    table = token_bytes(tokenizer)
    assert len(table.data) == len(table.length) == tokenizer.vocab_size
    assert tokenizer.eos_id is not None
    assert table.spell(np.array([tokenizer.eos_id])) == tokenizer.special_tokens["eos_token"].encode()


def test_tokenizers_that_lose_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be laid over text byte by byte: its decoder \(WordPiece\)"):
        token_bytes(Tokenizer.load(write_word_piece(tmp_path / "word")))
    lower = write_tokenizer(tmp_path / "lower", lowercase=True)
    with pytest.raises(InputError, match="it makes 'lectern"):
        token_bytes(Tokenizer.load(lower))
