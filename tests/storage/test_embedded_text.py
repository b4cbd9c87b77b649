"""The corpora that come with Python, and the splitting of long text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.embedded_text import DOCUMENT_CHARS, embedded_documents
from storage.errors import InputError
from storage.splitting import blocks_of, group_blocks


@pytest.mark.parametrize(
    ("name", "least_chars", "phrase"), [("general", 300_000, "statement"), ("domain", 3_000_000, "def ")]
)
def test_embedded_documents_are_many_bounded_and_stable(name: str, least_chars: int, phrase: str) -> None:
    documents = list(embedded_documents(name))
    assert sum(map(len, documents)) > least_chars
    assert max(map(len, documents)) <= DOCUMENT_CHARS
    assert sum(map(len, documents)) / len(documents) > DOCUMENT_CHARS / 2, "documents should be near their limit"
    assert sum(phrase in document for document in documents) > len(documents) / 5
    assert documents == list(embedded_documents(name))


def test_unknown_embedded_corpus_is_refused() -> None:
    with pytest.raises(InputError, match="'poetry'; use embedded:general or embedded:domain"):
        embedded_documents("poetry")


TEXTS = st.text(alphabet="ab \n", max_size=300)


@given(text=TEXTS, limit=st.integers(1, 60))
def test_blocks_are_the_text(text: str, limit: int) -> None:
    lines = text.splitlines(keepends=True)
    blocks = list(blocks_of(lines, limit))
    assert "".join(blocks) == text
    assert all(len(block) <= max([limit, *map(len, lines)]) for block in blocks)


@given(text=TEXTS, limit=st.integers(1, 60), sections=st.booleans())
def test_documents_keep_every_line_and_the_limit(text: str, limit: int, sections: bool) -> None:
    blocks = blocks_of(text.splitlines(keepends=True), limit)
    starts = (lambda block: block.startswith("a")) if sections else None
    documents = list(group_blocks(blocks, limit, starts))
    assert all(document.strip() and len(document) <= limit for document in documents)
    assert "".join("".join(documents).split()) == "".join(text.split())


def test_documents_end_at_blank_lines_and_before_sections() -> None:
    text = "aaaa\n\nbbbb\n\n# c\ncccc\n\ndddd\n"
    whole = list(group_blocks(blocks_of(text.splitlines(keepends=True), 100), 14))
    assert whole == ["aaaa\n\nbbbb", "# c\ncccc", "dddd"]
    cut = list(group_blocks(blocks_of(text.splitlines(keepends=True), 100), 24, lambda block: block.startswith("#")))
    assert cut == ["aaaa\n\nbbbb", "# c\ncccc\n\ndddd"]
