"""Bar plots as inline SVG: horizontal bars from zero, alone in rows or in groups."""

import math
from collections.abc import Sequence
from html import escape

from cluster.report.svg import WIDTH, Bar, Format, Plot, empty, short, svg

_ROW, _BAR, _GAP = 25.0, 18.0, 14.0
_GROUP_HEAD = 20.0
_LABEL_WIDTH, _VALUE_WIDTH = 124.0, 72.0


def bar_plot(groups: Sequence[tuple[str, Sequence[Bar]]], value_format: Format = short, label: str = "") -> Plot:
    """Draw groups of bars below their names, each bar with its value at its end.

    Bars of one name share a colour and one entry of the legend. Bars that are not finite are left out.
    """
    kept = [(name, [bar for bar in bars if math.isfinite(bar.value)]) for name, bars in groups]
    bars = [bar for _, group in kept for bar in group]
    if not bars:
        return Plot(empty(label))
    top = max(bar.value for bar in bars)
    y, body = 0.0, []
    for name, group in kept:
        body.append(f'<text class="group" x="0" y="{y + 13:g}">{escape(name)}</text>')
        y += _GROUP_HEAD
        for bar in group:
            body.append(_bar(bar, name, 0.0, y, top, value_format))
            y += _ROW
        y += _GAP
    legend = list({bar.name: (bar.name, bar.colour, False) for bar in bars}.values())
    return Plot(svg("".join(body), y - _GAP, label, "bars"), legend)


def row_plot(bars: Sequence[Bar], value_format: Format = short, label: str = "") -> Plot:
    """Draw bars in rows with their names to the left."""
    kept = [bar for bar in bars if math.isfinite(bar.value)]
    if not kept:
        return Plot(empty(label))
    top = max(bar.value for bar in kept)
    body = []
    for n, bar in enumerate(kept):
        y = n * (_ROW + 3)
        body.append(f'<text x="0" y="{y + 13.5:g}">{escape(bar.name)}</text>')
        body.append(_bar(bar, "", _LABEL_WIDTH, y, top, value_format))
    return Plot(svg("".join(body), len(kept) * (_ROW + 3), label, "bars"))


def _bar(bar: Bar, group: str, x: float, y: float, top: float, value_format: Format) -> str:
    length = max(bar.value / max(top, 1e-12) * (WIDTH - x - _VALUE_WIDTH), 1.5)
    value = escape(value_format(bar.value))
    title = escape(f"{bar.name}{f', {group}' if group else ''}")
    return (
        f'<g><title>{title}: {value}</title><rect x="{x:g}" y="{y:g}" width="{length:.1f}" height="{_BAR:g}" rx="3" '
        f'style="fill:{escape(bar.colour)}"/>'
        f'<text class="value" x="{x + length + 7:.1f}" y="{y + 13.5:g}">{value}</text></g>'
    )
