"""The text that comes with CPython: its language reference (`general`) and library sources (`domain`)."""

import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from storage.errors import InputError
from storage.splitting import blocks_of, group_blocks

EMBEDDED_PREFIX = "embedded:"
DOCUMENT_CHARS = 2000
SOURCE_FOLDERS = (".", "asyncio", "email")

_UNDERLINE = re.compile(r"\A.+\n([*=~^-])\1{2,}\s*$", re.MULTILINE)
_DEFINITION = re.compile(r"\A(@|def |class |async def )")


def embedded_documents(name: str) -> Iterator[str]:
    """Yield the documents of `general` or `domain`, about 2,000 characters each, always in the same order.

    `general` is the prose of `pydoc_data.topics`, cut at sections and paragraphs; `domain` is the Python source of
    the standard library's top folder, asyncio and email, cut at definitions and blank lines.

    Raises:
        InputError: unknown name, or a Python that was installed without the text.
    """
    readers = {"general": _prose, "domain": _sources}
    if name not in readers:
        raise InputError(f"no embedded corpus is called {name!r}; use embedded:general or embedded:domain")
    return readers[name]()


def embedded_version() -> str:
    """Return what the embedded text depends on: the Python implementation and its version."""
    return f"{sys.implementation.name}-{platform.python_version()}"


def _prose() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python comes without pydoc_data.topics; give files instead of embedded:general"
        ) from error
    for key in sorted(topics):
        blocks = blocks_of(topics[key].splitlines(keepends=True), DOCUMENT_CHARS)
        yield from group_blocks(blocks, DOCUMENT_CHARS, lambda block: _UNDERLINE.match(block) is not None)


def _sources() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for folder in SOURCE_FOLDERS for path in sorted((library / folder).glob("*.py"))]
    if not files:
        raise InputError(f"this Python has no sources under {library}; give files instead of embedded:domain")
    for path in files:
        with path.open(encoding="utf-8") as lines:
            yield from group_blocks(
                blocks_of(lines, DOCUMENT_CHARS), DOCUMENT_CHARS, lambda block: _DEFINITION.match(block) is not None
            )
