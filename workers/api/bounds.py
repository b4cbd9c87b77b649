"""How many tokens a request can have: the bounds that its reservation and the check of its usage rest on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workers.api.reply import CountTokens

MESSAGE_TOKENS = 16
"""Most tokens that a chat template puts around one message."""
CHAT_TOKENS = 64
"""Most tokens that it puts around the whole."""


@dataclass(frozen=True)
class InputBounds:
    """Least and most tokens of a prompt."""

    least: int
    most: int


def chat_bounds(messages: Sequence[Mapping[str, Any]], count: CountTokens | None) -> InputBounds:
    """Return the bounds of a chat prompt.

    With the teacher's tokenizer the text is counted, and the template adds up to a known allowance. Without it a text
    has at most as many tokens as bytes, which holds for every byte-level tokenizer, and at least one.
    """
    texts = [str(message.get("content") or "") for message in messages]
    around = CHAT_TOKENS + MESSAGE_TOKENS * len(texts)
    if count is None:
        return InputBounds(1, sum(len(text.encode(errors="surrogatepass")) for text in texts) + around)
    tokens = sum(count(text) for text in texts)
    return InputBounds(max(1, tokens - 2 * len(texts)), tokens + around)
