"""What an endpoint's failure means: policy as data. Whether to try again, and whether it may have been billed."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

_SHOWN_CHARS = 300
_LOOKS_LIKE_A_KEY = re.compile(r"\b(sk|pk|rk|key|gsk|hf)[-_][\w*.-]{4,}|(?<=Bearer )\S+", re.IGNORECASE)


class Action(StrEnum):
    """What is done about a failed attempt."""

    RETRY = "retry"
    """try the request again, later"""
    SET_ASIDE = "set_aside"
    """this request can never succeed: keep the reason in place of an answer"""
    NO_BALANCE = "no_balance"
    """stop as at a cap: the provider wants money first"""
    STOP = "stop"
    """stop: every other request would fail alike"""
    UNKNOWN_MODEL = "unknown_model"
    """stop, and say which models there are"""


@dataclass(frozen=True)
class Verdict:
    """What a failure means."""

    action: Action
    billed: bool
    """Whether it may have been billed: then the whole reservation is kept."""
    reason: str
    retry_after_s: float = 0.0
    throttled: bool = False


_BY_STATUS: dict[int, tuple[Action, bool]] = {
    400: (Action.STOP, False),
    401: (Action.STOP, False),
    402: (Action.NO_BALANCE, False),
    403: (Action.STOP, False),
    404: (Action.STOP, False),
    405: (Action.STOP, False),
    408: (Action.RETRY, True),
    409: (Action.RETRY, False),
    413: (Action.SET_ASIDE, False),
    422: (Action.STOP, False),
    425: (Action.RETRY, False),
    429: (Action.RETRY, False),
}
"""Status → (action, may have been billed). A 5xx may come from a gateway whose back end went on working."""

_BY_TEXT: list[tuple[set[int], re.Pattern[str], Action]] = [
    ({400, 413, 422}, re.compile(r"context.{0,20}length|maximum.{0,20}(context|tokens)|too many tokens|too long"),
     Action.SET_ASIDE),
    ({400, 403, 422}, re.compile(r"content.{0,3}(filter|policy|exists.{0,3}risk)|flagged|safety|inappropriate"),
     Action.SET_ASIDE),
    ({400, 404}, re.compile(r"model.{0,80}(not.{0,3}(found|exist)|does not exist|unknown)|model_not_found"),
     Action.UNKNOWN_MODEL),
    ({403, 429}, re.compile(r"insufficient.{0,3}(quota|balance|funds)|billing|exceeded your current quota"),
     Action.NO_BALANCE),
]  # fmt: skip


def judge_status(status: int, body: Any, headers: Any, key: str | None) -> Verdict:
    """Return what an answer with an error status means; `key` is kept out of the reason."""
    text = error_text(body, key)
    action, billed = _BY_STATUS.get(status, (Action.RETRY, True) if status >= 500 else (Action.STOP, False))
    lowered = f"{_code(body)} {text}".lower()
    for statuses, pattern, other in _BY_TEXT:
        if status in statuses and pattern.search(lowered):
            action = other
            break
    return Verdict(action, billed, f"{status}: {text}", retry_after(headers), throttled=status in {429, 503})


def retry_after(headers: Any, now: datetime | None = None) -> float:
    """Return the seconds that `Retry-After` asks to wait, as a number or an HTTP date; 0 without one."""
    milliseconds = headers.get("retry-after-ms")
    value = headers.get("retry-after")
    try:
        if milliseconds:
            return max(0.0, float(milliseconds) / 1000)
        if not value:
            return 0.0
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            return float(value)
        moment = parsedate_to_datetime(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def error_text(body: Any, key: str | None) -> str:
    """Return an endpoint's error message, short and without anything that looks like a key."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return scrub(str(message or "no message"), key)[:_SHOWN_CHARS]


def scrub(text: str, key: str | None) -> str:
    """Return a text without the key, nor anything that looks like one."""
    if key:
        text = text.replace(key, "***")
    return " ".join(_LOOKS_LIKE_A_KEY.sub("***", text).split())


def _code(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, dict) else {}
    return " ".join(str(error.get(name) or "") for name in ("code", "type")) if isinstance(error, dict) else ""
