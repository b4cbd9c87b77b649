"""Answers of an endpoint, read with care: nothing is trusted before it is checked. No pydantic: it would cost most."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workers.api.prices import Usage

CountTokens = Callable[[str], int]
"""Tokens of a text by the teacher's tokenizer."""

_SLACK_TOKENS = 2
"""Tokens by which an endpoint's count of a text may differ from one's own: marks that the text does not show."""


class BrokenReplyError(Exception):
    """An answer with status 200 that cannot be used; `usage` is what it says of its cost, if that can be believed."""

    def __init__(self, reason: str, usage: Usage | None = None) -> None:
        super().__init__(reason)
        self.usage = usage


@dataclass(frozen=True)
class Request:
    """One request, and the bounds within which its usage must lie."""

    path: str
    """`/chat/completions` or `/completions`."""
    body: dict[str, Any]
    most_input: int
    """Upper bound of the prompt's tokens; what is reserved."""
    most_output: int
    """`max_tokens`."""
    least_input: int = 0
    """Lower bound of the prompt's tokens."""
    wants_logprobs: bool = False
    """Whether an answer without log-probabilities is broken."""
    check: Callable[["Reply"], None] | None = None
    """Raises BrokenReplyError for an answer that does not fit the request."""


@dataclass(frozen=True)
class Reply:
    """What is kept of an answer."""

    text: str
    reasoning: str | None
    finish_reason: str | None
    usage: Usage | None
    """None where the endpoint's count is missing or cannot be right."""
    logprobs: Any = None
    """The endpoint's own structure for generated (or echoed) tokens."""
    prompt_logprobs: Any = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; what is absent is left out."""
        usage = self.usage
        values = {
            "text": self.text,
            "reasoning": self.reasoning,
            "finish_reason": self.finish_reason,
            "usage": None if usage is None else [usage.input, usage.output, usage.cached, usage.reasoning],
            "logprobs": self.logprobs,
            "prompt_logprobs": self.prompt_logprobs,
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Reply":
        """Read back what `to_json` gave."""
        usage = values.get("usage")
        return cls(
            text=values["text"],
            reasoning=values.get("reasoning"),
            finish_reason=values.get("finish_reason"),
            usage=Usage(*usage) if usage else None,
            logprobs=values.get("logprobs"),
            prompt_logprobs=values.get("prompt_logprobs"),
        )


def read_reply(data: bytes | dict[str, Any], request: Request, count: CountTokens | None = None) -> Reply:
    """Return the first choice of an answer.

    Raises BrokenReplyError for what is no JSON, holds no choice or no text, or lacks the log-probabilities asked for.
    """
    values = _parse(data)
    choices = values.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    if choice is None:
        raise BrokenReplyError("no choice in the answer", read_usage(values.get("usage"), request, 0))
    found = choice.get("message")
    message: dict[str, Any] = found if isinstance(found, dict) else {}
    text = message.get("content", choice.get("text"))
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    logprobs, prompt_logprobs = choice.get("logprobs"), choice.get("prompt_logprobs") or values.get("prompt_logprobs")
    usage = read_usage(values.get("usage"), request, _least_output(logprobs, (text, reasoning), count))
    refused = choice.get("finish_reason") == "content_filter"
    if not isinstance(text, str):
        if reasoning is None and not refused:
            raise BrokenReplyError("the answer holds no text", usage)
        text = ""
    if request.wants_logprobs and logprobs is None and prompt_logprobs is None and not refused:
        raise BrokenReplyError("the answer holds no log-probabilities, though they were asked for", usage)
    reply = Reply(
        text=text,
        reasoning=reasoning if isinstance(reasoning, str) else None,
        finish_reason=choice.get("finish_reason"),
        usage=usage,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    if request.check is not None and not refused:
        request.check(reply)
    return reply


def read_usage(raw: Any, request: Request, least_output: int) -> Usage | None:
    """Return the endpoint's count of tokens, or None where it is missing or cannot be right.

    It is believed within what is known anyway: the prompt's tokens, `max_tokens`, and what was plainly received.
    """
    if not isinstance(raw, dict):
        return None
    input_, output = raw.get("prompt_tokens"), raw.get("completion_tokens", 0)
    cached = _detail(raw, "prompt_tokens_details", "cached_tokens") or raw.get("prompt_cache_hit_tokens") or 0
    reasoning = _detail(raw, "completion_tokens_details", "reasoning_tokens") or 0
    counts = (input_, output, cached, reasoning)
    if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in counts):
        return None
    assert isinstance(input_, int)
    if not (request.least_input <= input_ <= request.most_input and least_output <= output <= request.most_output):
        return None
    if cached > input_ or reasoning > output:
        return None
    return Usage(input_, output, cached, reasoning)


def request_body(request: Request, extra: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON body with the config's further fields."""
    return {**request.body, **extra} if extra else request.body


def _parse(data: bytes | dict[str, Any]) -> dict[str, Any]:
    if isinstance(data, dict):
        return data
    try:
        values = json.loads(data)
    except ValueError as error:
        raise BrokenReplyError(f"the answer is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise BrokenReplyError(f"the answer is a JSON {type(values).__name__}, not an object")
    return values


def _detail(raw: dict[str, Any], section: str, name: str) -> Any:
    details = raw.get(section)
    return details.get(name) if isinstance(details, dict) else None


def _least_output(logprobs: Any, texts: tuple[Any, Any], count: CountTokens | None) -> int:
    """Tokens that plainly were generated: as many as have log-probabilities, else as the text received has."""
    if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
        return len(logprobs["content"])
    received = [text for text in texts if isinstance(text, str) and text]
    if count is None:
        return int(bool(received))
    return max(int(bool(received)), sum(count(text) for text in received) - _SLACK_TOKENS)
