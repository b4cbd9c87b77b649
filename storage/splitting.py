"""Splitting long text into documents of bounded size, as a stream."""

from collections.abc import Callable, Iterable, Iterator


def blocks_of(lines: Iterable[str], limit_chars: int) -> Iterator[str]:
    """Yield blocks: runs of lines up to and including the blank lines that follow them.

    Joined again, the blocks are the text. Lines keep their line ends. A block ends early, between two lines, where
    it would grow beyond `limit_chars`, so that memory stays bounded for text without blank lines.
    """
    block: list[str] = []
    size = 0
    blank_seen = False
    for line in lines:
        blank = not line.strip()
        if block and ((blank_seen and not blank) or size + len(line) > limit_chars):
            yield "".join(block)
            block, size = [], 0
        blank_seen = blank
        block.append(line)
        size += len(line)
    if block:
        yield "".join(block)


def group_blocks(
    blocks: Iterable[str], limit_chars: int, starts_section: Callable[[str], bool] | None = None
) -> Iterator[str]:
    """Join blocks into documents of at most `limit_chars` characters; a longer block is cut.

    Args:
        blocks: the text in order.
        limit_chars: most characters of a document.
        starts_section: tells whether a block opens a section; a document of half the limit or more ends before it.

    Yields documents without blank lines around them; never an empty one.
    """
    parts: list[str] = []
    size = 0
    for block in blocks:
        opens = starts_section is not None and 2 * size >= limit_chars and starts_section(block)
        if parts and (opens or size + len(block) > limit_chars):
            yield from _document(parts)
            parts, size = [], 0
        for start in range(0, len(block), limit_chars):
            piece = block[start : start + limit_chars]
            if size + len(piece) > limit_chars:
                yield from _document(parts)
                parts, size = [], 0
            parts.append(piece)
            size += len(piece)
    yield from _document(parts)


def _document(parts: list[str]) -> Iterator[str]:
    text = "".join(parts).strip("\r\n")
    if text.strip():
        yield text
