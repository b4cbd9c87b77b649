"""Filters of completions, each by its own name."""

from typing import Any

import pytest

from storage.errors import InputError
from workers.api.config import FilterConfig
from workers.api.filters import Completion, Filters, exact, last_number, make_checker, numeric, split_reasoning


def reason(
    answer: str, reasoning: str | None = None, finish: str = "stop", reference: Any = None, **own: Any
) -> str | None:
    return Filters(FilterConfig(**own)).reason(Completion(answer, reasoning, finish), reference, {})


def test_each_filter_by_its_name() -> None:
    assert reason("fine") is None
    assert reason("cut", finish="length") == "finished"
    assert reason("cut", finish="length", finished=False) is None
    assert reason("ab", answer_chars=(3, 9)) == "answer_chars"
    assert reason("abc", "x" * 10, reasoning_chars=(0, 9)) == "reasoning_chars"
    assert reason("слово", script="latin") == "script"
    assert reason("word 12 !", script="latin") is None
    assert reason("漢字", script="cjk") is None
    loop = "a b c d e f g h " * 5
    assert reason(loop, repetition=0.2) == "repetition"
    assert reason(" ".join(map(str, range(60))), repetition=0.2) is None
    assert reason("no box", format=r"\\boxed\{.+\}") == "format"
    assert reason(r"so \boxed{4}", format=r"\\boxed\{.+\}") is None
    assert reason("5", reference="4", checker="numeric") == "checker"


def test_duplicates_are_those_of_one_prompt() -> None:
    filters = Filters(FilterConfig())
    first = Completion("same  answer", "why", "stop")
    assert filters.reason(first, None, {}) is None
    assert filters.reason(Completion("same answer", "why", "stop"), None, {}) == "duplicate"
    assert filters.reason(Completion("same answer", "other", "stop"), None, {}) is None
    filters.next_prompt()
    assert filters.reason(first, None, {}) is None


def test_checkers() -> None:
    assert exact(r"I say \boxed{\frac{1}{2}}", r"\frac{1}{2}", {})
    assert exact(" Paris. ", "paris", {})
    assert not exact("Paris", None, {})
    for answer, reference in [("it is 1,234.50", 1234.5), (r"\boxed{1/4}", "0.25"), ("50%", 0.5), ("-3e2", "-300")]:
        assert numeric(answer, reference, {}), answer
    assert not numeric("12", "13", {})
    assert not numeric("none", "13", {})
    assert last_number("1/0") is None


def test_a_checker_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "own_checks.py").write_text(
        "def ends(answer, reference, row):\n    return answer.endswith(row['end'])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    checker = make_checker("own_checks:ends")
    assert checker is not None and checker("the end", None, {"end": "end"})
    with pytest.raises(InputError, match="cannot be imported"):
        make_checker("own_checks:missing")


def test_reasoning_is_split_where_the_endpoint_does_not() -> None:
    assert split_reasoning("<think>\nhm\n</think>\n\nyes", None) == ("yes", "hm")
    assert split_reasoning("hm</think>yes", None) == ("yes", "hm")
    assert split_reasoning("yes", "hm") == ("yes", "hm")
    assert split_reasoning(" yes ", None) == ("yes", None)
