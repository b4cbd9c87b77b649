"""Line plots as inline SVG, written here so that the report needs no plotting library and no network.

Colours come from the page's CSS variables, so one drawing serves light and dark. Everything that is shown as text is
escaped.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from cluster.report.svg import WIDTH, Format, Plot, Series, empty, short, svg, ticks

HEIGHT = 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 10.0, 10.0, 28.0
_MAX_POINTS = 240
_MAX_HOVERS = 60


def line_plot(
    series: Sequence[Series],
    x_label: str,
    y_format: Format = short,
    low: float | None = None,
    high: float | None = None,
    label: str = "",
) -> Plot:
    """Draw lines over a common x axis. `low` and `high` fix the ends of the y axis; otherwise the data do.

    Points that are not finite are left out. Hovering over a column tells all values there.
    """
    kept = [_finite(line) for line in series]
    kept = [line for line in kept if line.points]
    if not kept:
        return Plot(empty(label))
    xs = [x for line in kept for x, _ in line.points]
    # Single outliers among the faint lines are cut off rather than press all else flat.
    ys = [y for line in kept for _, y in line.points if not line.faint] or [0.0]
    y_ticks = ticks(min(ys) if low is None else low, max(ys) if high is None else high)
    x_ticks = [t for t in ticks(min(xs), max(xs), 6) if min(xs) - 1e-9 <= t <= max(xs) + 1e-9]
    frame = _Frame((min(xs), max(xs)), (y_ticks[0], y_ticks[-1]))
    body = [_grid(frame, x_ticks, y_ticks, y_format, x_label)]
    body += [_line(frame, line) for line in sorted(kept, key=lambda line: not line.faint)]
    named = [line for line in kept if not line.faint]
    body.append(_hovers(frame, named, x_label, y_format))
    return Plot(svg("".join(body), HEIGHT, label, "lines"), [(line.name, line.colour, line.dashed) for line in named])


class _Frame:
    """Maps data to the drawing."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x_low, self.x_high = x if x[1] > x[0] else (x[0] - 0.5, x[0] + 0.5)
        self.y_low, self.y_high = y

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        inside = min(max(value, self.y_low), self.y_high)
        return HEIGHT - _BOTTOM - (inside - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - _TOP - _BOTTOM)


def _finite(line: Series) -> Series:
    points = [(float(x), float(y)) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    return Series(line.name, line.colour, points, line.dashed, line.faint, line.area)


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep at most `_MAX_POINTS`: the mean of each run of neighbours."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    run = math.ceil(len(points) / _MAX_POINTS)
    runs = [points[n : n + run] for n in range(0, len(points), run)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in runs]


def _grid(frame: _Frame, x_ticks: list[float], y_ticks: list[float], y_format: Format, x_label: str) -> str:
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{escape(y_format(value))}</text>'
        )
    bottom = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{bottom:g}" y2="{bottom:g}"/>')
    for value in x_ticks:
        x = frame.x(value)
        text = short(value)
        last = value == x_ticks[-1]
        anchor = "end" if x > WIDTH - 40 else "middle"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:g}" y2="{bottom + 4:g}"/>')
        shown = f"{x_label} {text}" if last else text
        x = min(x + (0 if not last or anchor == "middle" else 6), WIDTH - 2)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 19:g}" text-anchor="{anchor}">{escape(shown)}</text>'
        )
    return "".join(parts)


def _line(frame: _Frame, line: Series) -> str:
    points = _thin(line.points)
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    classes = "line" + (" faint" if line.faint else "") + (" dashed" if line.dashed else "")
    drawn = f'<polyline class="{classes}" points="{path}" style="stroke:{escape(line.colour)}"/>'
    if len(points) == 1:
        x, y = points[0]
        drawn = f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5" style="fill:{escape(line.colour)}"/>'
    if line.area and len(points) > 1:
        bottom = HEIGHT - _BOTTOM
        left, right = frame.x(points[0][0]), frame.x(points[-1][0])
        shape = f"{left:.1f},{bottom:g} {path} {right:.1f},{bottom:g}"
        drawn = f'<polygon class="area" points="{shape}" style="fill:{escape(line.colour)}"/>{drawn}'
    return drawn


def _hovers(frame: _Frame, lines: Sequence[Series], x_label: str, y_format: Format) -> str:
    """Transparent columns whose native tooltip tells the value of every line nearest to the column's middle."""
    xs = sorted({x for line in lines for x, _ in line.points})
    if not xs:
        return ""
    stride = math.ceil(len(xs) / _MAX_HOVERS)
    picked = xs[stride // 2 :: stride]
    parts = []
    edges = [_LEFT, *((frame.x(a) + frame.x(b)) / 2 for a, b in pairwise(picked)), WIDTH - _RIGHT]
    for x, (start, end) in zip(picked, pairwise(edges), strict=True):
        told = [f"{x_label} {short(x) if x != int(x) else int(x)}"]
        for line in lines:
            near = min(line.points, key=lambda point: abs(point[0] - x))
            told.append(f"{line.name}: {y_format(near[1])}")
        parts.append(
            f'<rect class="hit" x="{start:.1f}" y="{_TOP:g}" width="{max(end - start, 0.5):.1f}" '
            f'height="{HEIGHT - _TOP - _BOTTOM:g}"><title>{escape(chr(10).join(told))}</title></rect>'
        )
    return "".join(parts)
