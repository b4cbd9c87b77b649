"""Progress of the stages: bars with rate and time left on a terminal, plain lines every few seconds elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from cluster.figures import count, duration

PLAIN_EVERY_S = 5.0
"""Seconds between lines of one task where there is no terminal."""

_RATE_WINDOW_S = 30.0


class Task:
    """One bar: a description, how much of how much is done, and a note such as the current loss."""

    def __init__(self, title: str, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.title = title
        self.unit = unit
        self.done = 0.0
        self.total: float | None = None
        self.note = ""
        self._clock = clock
        self.started = clock()
        self._moving = False
        self._seen: list[tuple[float, float]] = [(self.started, 0.0)]

    def advance_to(self, done: float, total: float | None = None, note: str | None = None) -> None:
        """Set how much is done; what is not given stays."""
        now = self._clock()
        if not self._moving and done > self.done:
            # What came before the first report was getting ready, not work at this rate.
            self._moving = True
            self._seen = [(now, done)]
        self.done = done
        self.total = total if total is not None else self.total
        self.note = note if note is not None else self.note
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > _RATE_WINDOW_S:
            self._seen.pop(0)

    def start_from(self, done: float, total: float) -> None:
        """Say how much was done by an earlier run, so that it does not count in the rate."""
        self.done, self.total = done, total
        self._seen = [(self._clock(), done)]

    @property
    def rate(self) -> float:
        """Return units per second over the last half minute."""
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return (after - before) / (last - first) if last > first else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Return the time left at the present rate, or None when it cannot be told."""
        if self.total is None or self.rate <= 0:
            return None
        return max(self.total - self.done, 0.0) / self.rate

    @property
    def elapsed_s(self) -> float:
        """Return the seconds since the task began."""
        return self._clock() - self.started

    def line(self) -> str:
        """Return the state as one line of text."""
        parts = [f"{self.title}:"]
        if self.total:
            parts.append(f"{self.done / self.total:4.0%}")
            parts.append(f"{count(self.done)}/{count(self.total)} {self.unit}")
        elif self.done:
            parts.append(f"{count(self.done)} {self.unit}")
        if self.rate > 0:
            parts.append(f"{count(self.rate)}/s")
        if (left := self.seconds_left) is not None:
            parts.append(f"{duration(left)} left")
        return " ".join(parts) + (f"  {self.note}" if self.note else "")


class Progress:
    """Shows tasks and messages on one stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stdout
        self._is_terminal = self.stream.isatty()

    def say(self, text: str) -> None:
        """Print one line."""
        self.stream.write(text + "\n")
        self.stream.flush()

    @contextlib.contextmanager
    def task(self, title: str, unit: str) -> Iterator["Shown"]:
        """Show a task until the context ends; its last line tells how long it took."""
        task = Task(title, unit)
        shown = _Bar(task, self.stream) if self._is_terminal else Shown(task, self.stream)
        with shown:
            yield shown


class Shown:
    """A task on a stream that is no terminal: one line every few seconds."""

    def __init__(self, task: Task, stream: TextIO) -> None:
        self.task = task
        self.stream = stream
        self._last = time.monotonic()

    def __enter__(self) -> "Shown":
        self._show(f"{self.task.title} …")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        outcome = "done in" if kind is None else "stopped after"
        self._show(f"{self.task.title}: {outcome} {duration(self.task.elapsed_s)}{self._tail()}")

    def update(self, done: float, total: float | None = None, note: str | None = None) -> None:
        """Report how much is done."""
        self.task.advance_to(done, total, note)
        self._refresh()

    def note(self, text: str) -> None:
        """Set the remark at the end of the line."""
        self.task.note = text

    def start_from(self, done: float, total: float) -> None:
        """Say how much an earlier run had done."""
        self.task.start_from(done, total)

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        self._show(text)

    def _refresh(self) -> None:
        if time.monotonic() - self._last >= PLAIN_EVERY_S:
            self._show(self.task.line())

    def _show(self, text: str) -> None:
        self._last = time.monotonic()
        self.stream.write(text + "\n")
        self.stream.flush()

    def _tail(self) -> str:
        done = f", {count(self.task.done)} {self.task.unit}" if self.task.done else ""
        return done + (f"  {self.task.note}" if self.task.note else "")


class _Bar(Shown):
    """A task on a terminal: one live line with a bar."""

    def __enter__(self) -> "Shown":
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=self.stream, highlight=False)
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._live.stop()
        mark = "[green]✓[/green]" if kind is None else "[red]✗[/red]"
        from rich.markup import escape

        took = f"[dim]{duration(self.task.elapsed_s)}{escape(self._tail())}[/dim]"
        self._console.print(f"{mark} {escape(self.task.title)}  {took}", soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False)

    def _refresh(self) -> None:
        """The live display draws by itself."""

    def _render(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        task = self.task
        row = Table.grid(padding=(0, 1))
        cells: list[Any] = [Text(f"  {task.title}", no_wrap=True)]
        if task.total:
            cells.append(ProgressBar(total=task.total, completed=min(task.done, task.total), width=24))
            cells.append(Text(f"{task.done / task.total:4.0%}", style="bold"))
        else:
            cells.append(ProgressBar(total=None, pulse=True, width=24, animation_time=time.monotonic()))
        facts = [f"{count(task.done)} {task.unit}"] if task.done else []
        facts += [f"{count(task.rate)}/s"] if task.rate > 0 else []
        facts += [f"{duration(task.seconds_left)} left"] if task.seconds_left is not None else []
        facts += [duration(task.elapsed_s)] if not facts else []
        cells.append(Text(" · ".join(facts + ([task.note] if task.note else [])), style="dim", no_wrap=True))
        row.add_row(*cells)
        return row
