"""Cleaning of documents: HTML, Unicode, terms, and the digest that finds duplicates."""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import blake2b
from html.parser import HTMLParser

from storage.config import CleaningConfig
from storage.corpus import Document, Message
from storage.errors import InputError

DIGEST_BYTES = 16

_CLEANED_FIELDS = ("content", "reasoning_content")
# Scripts written without spaces: a Latin term beside them stands by itself.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = rf"[^\W{_UNSPACED}]"


def cleaner_of(config: CleaningConfig) -> Callable[[str], str]:
    """Return the function that cleans one string: HTML, then NFKC, then terms, as the config asks.

    Raises:
        InputError: the term map has an empty term.
    """
    steps: list[Callable[[str], str]] = []
    if config.strip_html:
        steps.append(strip_html)
    if config.nfkc:
        steps.append(normalise)
    if config.term_map:
        steps.append(term_mapper(config.term_map))

    def clean(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return clean


def clean_document(document: Document, clean: Callable[[str], str]) -> Document:
    """Return the document with each of its strings cleaned; a message's role and tool fields stay as they are."""

    def each(text: str | None) -> str | None:
        return None if text is None else clean(text)

    def message(fields: Message) -> Message:
        return {k: clean(v) if k in _CLEANED_FIELDS and isinstance(v, str) else v for k, v in fields.items()}

    messages = None if document.messages is None else tuple(message(fields) for fields in document.messages)
    return replace(
        document,
        text=each(document.text),
        messages=messages,
        prompt=each(document.prompt),
        completion=each(document.completion),
    )


def document_digest(document: Document) -> bytes:
    """Return 16 bytes of BLAKE2b over the cleaned content, not over where it came from."""
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"lectern.document")
    if document.tokens is not None:
        digest.update(b"k" + json.dumps([document.tokens, document.supervised]).encode("ascii"))
    elif document.text is not None:
        digest.update(b"t" + document.text.encode("utf-8"))
    else:
        content = [document.messages, document.prompt, document.completion]
        digest.update(b"j" + json.dumps(content, sort_keys=True, default=str).encode("utf-8"))
    return digest.digest()


def is_heldout(digest: bytes, fraction: float) -> bool:
    """Tell whether a document belongs to the held-out share: its digest, read as a number in [0, 1), is below it."""
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def normalise(text: str) -> str:
    """Return the text in Unicode normal form KC: ligatures, full-width letters and the like become plain ones."""
    return unicodedata.normalize("NFKC", text)


def term_mapper(terms: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that replaces whole terms, the longest that matches at a place, each place once.

    A term's end that is a letter, digit or underscore of ASCII must lie on a word border; other ends match anywhere.
    A replacement is never replaced again. Case matters.

    Raises:
        InputError: a term is empty.
    """
    if "" in terms:
        raise InputError("clean.term_map holds an empty term; it would match everywhere")
    longest_first = sorted(terms, key=lambda term: (-len(term), term))
    pattern = re.compile("|".join(_bordered(term) for term in longest_first))
    return lambda text: pattern.sub(lambda match: terms[match.group()], text)


def _bordered(term: str) -> str:
    before = rf"(?<!{_WORD})" if re.match(r"\w", term, re.ASCII) else ""
    after = rf"(?!{_WORD})" if re.search(r"\w\Z", term, re.ASCII) else ""
    return before + re.escape(term) + after


def strip_html(text: str) -> str:
    """Return the visible text of an HTML page or fragment.

    Scripts, styles, comments and tags are dropped, entities decoded, runs of white space become one space (kept
    within `<pre>`), block elements begin and end on lines of their own.
    """
    parser = _VisibleText()
    parser.feed(text)
    parser.close()
    return parser.result()


_HIDDEN = {"script", "style"}
_CELLS = {"td", "th"}
_BLOCKS = {"address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "details", "dialog"}
_BLOCKS |= {"div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5"}
_BLOCKS |= {"h6", "head", "header", "hr", "html", "legend", "li", "main", "menu", "nav", "ol", "option", "p", "pre"}
_BLOCKS |= {"section", "select", "summary", "table", "tbody", "tfoot", "thead", "title", "tr", "ul"}


class _VisibleText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden = 0
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._border(tag)
        self._hidden += tag in _HIDDEN
        self._verbatim += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._border(tag)

    def handle_endtag(self, tag: str) -> None:
        self._border(tag)
        if tag in _HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        if tag == "pre":
            self._verbatim = max(0, self._verbatim - 1)

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self._parts or self._parts[-1][-1] in " \n":
                data = data.lstrip(" ")
        if data:
            self._parts.append(data)

    def _border(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._parts.append("\n")
        elif tag in _CELLS:
            self.handle_data(" ")

    def result(self) -> str:
        joined = "".join(self._parts)
        joined = re.sub(r"[ \t\r\f\v]+\n", "\n", joined)
        return re.sub(r"\n{3,}", "\n\n", joined).strip("\n ")
