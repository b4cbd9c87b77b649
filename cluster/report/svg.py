"""The parts that all plots share: series, bars, number formats, round ticks, the SVG frame."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH = 480.0
"""Units; a plot scales with its column."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line: its name, a CSS colour, and its points by rising x."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    faint: bool = False
    """Drawn thin behind the others, left out of legend and tooltips."""
    area: bool = False
    """Filled down to the axis."""


@dataclass(frozen=True)
class Bar:
    """One bar of a group."""

    name: str
    colour: str
    value: float


@dataclass(frozen=True)
class Plot:
    """A finished drawing with the entries of its legend, `(name, colour, dashed)`."""

    svg: str
    legend: list[tuple[str, str, bool]] = field(default_factory=list)


def short(value: float) -> str:
    """Return a number in at most five characters: 0.031, 4.21, 153, 12k."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:.0f}k"
    if abs(value) >= 1000:
        return f"{value / 1000:.1f}k".replace(".0k", "k")
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:.0f}%"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + 1.0
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Return at each point the mean of the points up to `window // 2` before and after it."""
    reach = window // 2
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for n, (x, _) in enumerate(points):
        first, last = max(n - reach, 0), min(n + reach + 1, len(points))
        result.append((x, (sums[last] - sums[first]) / (last - first)))
    return result


def svg(body: str, height: float, label: str, kind: str) -> str:
    """Return a whole drawing; `label` is what a screen reader says, `kind` a CSS class."""
    return (
        f'<svg class="plot {kind}" viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'preserveAspectRatio="xMidYMid meet">{body}</svg>'
    )


def empty(label: str) -> str:
    """Return a drawing that says that there is nothing to draw."""
    body = f'<text class="tick" x="{WIDTH / 2:g}" y="44" text-anchor="middle">nothing was recorded</text>'
    return svg(body, 80.0, label, "lines")
