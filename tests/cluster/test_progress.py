"""Progress: rates over the last half minute, time left, plain lines where there is no terminal."""

import io

import pytest

from cluster.figures import count, duration, size
from cluster.progress import Progress, Task


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left() -> None:
    clock = Clock()
    task = Task("Capture", "tokens", clock)
    for n in range(1, 6):
        clock.now += 2
        task.advance_to(n * 100, 1000)
    assert task.rate == pytest.approx(50)
    assert task.seconds_left == pytest.approx(10)
    assert task.line() == "Capture:  50% 500/1000 tokens 50/s 10 s left"


def test_the_rate_forgets_what_is_long_ago() -> None:
    clock = Clock()
    task = Task("Capture", "tokens", clock)
    clock.now += 1
    task.advance_to(10_000, 50_000)
    for n in range(1, 40):
        clock.now += 2
        task.advance_to(10_000 + n * 10)
    assert task.rate == pytest.approx(5)


def test_what_an_earlier_run_did_is_not_in_the_rate() -> None:
    clock = Clock()
    task = Task("Training", "steps", clock)
    clock.now += 5
    task.start_from(80, 100)
    for done in (85, 90):
        clock.now += 5
        task.advance_to(done)
    assert task.rate == pytest.approx(1)
    assert task.seconds_left == pytest.approx(10)


def test_getting_ready_is_not_in_the_rate() -> None:
    clock = Clock()
    task = Task("Training", "steps", clock)
    for seconds, done in ((60, 1), (2, 3), (2, 5)):
        clock.now += seconds
        task.advance_to(done, 100)
    assert task.rate == pytest.approx(1)


def test_without_a_total_no_time_left_is_made_up() -> None:
    clock = Clock()
    task = Task("Preparing", "samples", clock)
    clock.now += 1
    task.advance_to(5)
    assert task.seconds_left is None and "left" not in task.line()


def test_plain_lines_have_no_control_characters() -> None:
    stream = io.StringIO()
    with Progress(stream).task("Capture", "tokens") as task:
        task.update(5, 10, "loss [1.5]")
        task.say("a remark")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Capture …" and lines[1] == "a remark"
    assert lines[2].startswith("Capture: done in 0.0 s, 5 tokens") and "loss [1.5]" in lines[2]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_a_task_that_fails_says_so() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="x"), Progress(stream).task("Capture", "tokens"):
        raise ValueError("x")
    assert "stopped after" in stream.getvalue()


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_at_the_end() -> None:
    stream = Terminal()
    with Progress(stream).task("Capture [x]", "tokens") as task:
        task.update(5, 10, "[note]")
        task.say("a remark [y]")
    text = stream.getvalue()
    assert "✓" in text and "Capture [x]" in text and "a remark [y]" in text and "[note]" in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (count(950), "950"),
        (count(12_345), "12.3k"),
        (count(4_560_000), "4.56M"),
        (count(0.123456), "0.123"),
        (count(999_960_000), "1000M"),
        (size(812), "812 B"),
        (size(4_200_000), "4.2 MB"),
        (duration(8.24), "8.2 s"),
        (duration(95), "95 s"),
        (duration(185), "3 min 05 s"),
        (duration(7800), "2 h 10 min"),
    ],
)
def test_numbers_for_people(text: str, wanted: str) -> None:
    assert text == wanted
