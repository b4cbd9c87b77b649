"""Which completions are kept: pure checks, each named by its key in the config."""

import importlib
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from storage.errors import InputError
from workers.api.config import FilterConfig

RUN_WORDS = 8
SCRIPT_SHARE = 0.9

Checker = Callable[[str, Any, Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Completion:
    """What the teacher wrote, reasoning and answer apart."""

    answer: str
    reasoning: str | None
    finish_reason: str | None


def split_reasoning(text: str, reasoning: str | None) -> tuple[str, str | None]:
    """Return answer and reasoning; where the endpoint does not part them, at the `</think>` in the text."""
    if reasoning is not None or "</think>" not in text:
        return text.strip(), reasoning
    thought, _, answer = text.partition("</think>")
    return answer.strip(), thought.replace("<think>", "", 1).strip()


def make_checker(name: str | None) -> Checker | None:
    """Return the checker of that name; InputError when a user's own cannot be imported."""
    if name is None:
        return None
    if name in _CHECKERS:
        return _CHECKERS[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"generate.filters.checker {name} cannot be imported: {error}; is it on PYTHONPATH?"
        ) from error
    if not callable(found):
        raise InputError(f"generate.filters.checker {name} is no function")
    checker: Checker = found
    return checker


class Filters:
    """Applies a config's filters in a fixed order; remembers what was kept, for duplicates of the same prompt."""

    def __init__(self, config: FilterConfig) -> None:
        """Build the checks; InputError when a checker cannot be imported."""
        self.config = config
        self._checker = make_checker(config.checker)
        self._seen: set[tuple[str, str]] = set()

    def next_prompt(self) -> None:
        """Forget the completions of the prompt before."""
        self._seen.clear()

    def reason(self, completion: Completion, reference: Any, row: Mapping[str, Any]) -> str | None:
        """Return the name of the first filter that a completion does not pass, or None: it is kept."""
        own, answer = self.config, completion.answer
        if own.finished and completion.finish_reason != "stop":
            return "finished"
        if not _within(own.answer_chars, answer):
            return "answer_chars"
        if not _within(own.reasoning_chars, completion.reasoning or ""):
            return "reasoning_chars"
        whole = f"{completion.reasoning or ''} {answer}"
        if own.script is not None and script_share(whole, own.script) < SCRIPT_SHARE:
            return "script"
        if own.repetition is not None and repetition(whole) > own.repetition:
            return "repetition"
        if own.format is not None and re.search(own.format, answer, re.DOTALL) is None:
            return "format"
        if self._checker is not None and not self._checker(answer, reference, row):
            return "checker"
        marks = (" ".join(answer.split()), " ".join((completion.reasoning or "").split()))
        if own.duplicate and marks in self._seen:
            return "duplicate"
        self._seen.add(marks)
        return None


def repetition(text: str) -> float:
    """Return the share of runs of eight words that occurred earlier in the text; 0 for a text shorter than that."""
    words = text.split()
    runs = [tuple(words[start : start + RUN_WORDS]) for start in range(len(words) - RUN_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def script_share(text: str, script: str) -> float:
    """Return the share of letters whose Unicode name begins with the script's; 1 without letters."""
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return 1.0
    return sum(unicodedata.name(letter, "").startswith(script.upper()) for letter in letters) / len(letters)


def exact(answer: str, reference: Any, _: Mapping[str, Any]) -> bool:
    """Tell whether the final answer is the reference, whatever the case and white space."""
    return reference is not None and _plain(final_answer(answer)) == _plain(str(reference))


def numeric(answer: str, reference: Any, _: Mapping[str, Any]) -> bool:
    """Tell whether the last number of the final answer equals the reference's to one part in a million."""
    found, wanted = last_number(final_answer(answer)), last_number(str(reference))
    if found is None or wanted is None:
        return False
    return abs(found - wanted) <= abs(wanted) * Decimal("1e-6")


def final_answer(answer: str) -> str:
    """Return what the last `\\boxed{…}` holds, else all of the answer."""
    start = answer.rfind("\\boxed{")
    if start < 0:
        return answer
    depth, first = 0, start + len("\\boxed")
    for end in range(first, len(answer)):
        depth += {"{": 1, "}": -1}.get(answer[end], 0)
        if depth == 0:
            return answer[first + 1 : end]
    return answer[first + 1 :]


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text: `1,234.5`, `-3e4`, `1/2` or `50%`; None without one."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?%?|-?\.\d+", text)
    if not found:
        return None
    last = found[-1].replace(",", "")
    top, slash, bottom = last.rstrip("%").partition("/")
    try:
        value = Decimal(top) / Decimal(bottom) if slash else Decimal(top)
    except (InvalidOperation, ZeroDivisionError):
        return None
    return value / 100 if last.endswith("%") else value


_CHECKERS: Mapping[str, Checker] = {"exact": exact, "numeric": numeric}


def _within(limits: tuple[int, int] | None, text: str) -> bool:
    return limits is None or limits[0] <= len(text) <= limits[1]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
