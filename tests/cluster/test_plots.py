"""Plots: round ticks, escaped text, nothing drawn outside, every value in a tooltip."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.report.bars import bar_plot, row_plot
from cluster.report.plots import HEIGHT, line_plot
from cluster.report.svg import WIDTH, Bar, Series, percent, short, smooth, ticks


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_data_with_round_steps(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert found[0] <= low + 1e-6 * span and found[-1] >= low + span - 1e-6 * span
    assert 2 <= len(found) <= 8
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert any(math.isclose(mantissa, m, rel_tol=1e-3) for m in (1, 2, 5, 10))


def test_ticks_of_a_single_value_have_a_range() -> None:
    assert len(ticks(3.0, 3.0)) >= 2


def test_smoothing_is_the_mean_of_the_neighbours() -> None:
    points = [(0.0, 0.0), (1.0, 3.0), (2.0, 0.0), (3.0, 6.0)]
    assert smooth(points, 3) == [(0, 1.5), (1, 1), (2, 3), (3, 3)]
    assert smooth(points, 1) == points


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.0312, "0.0312"), (4.2133, "4.21"), (153.4, "153"), (5000, "5k"), (12345, "12k")]
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def drawn(svg: str) -> ElementTree.Element:
    """Parse a drawing, which must be well-formed XML."""
    return ElementTree.fromstring(svg)


def test_a_line_stays_inside_the_drawing_and_tells_its_values() -> None:
    points = [(float(n), math.sin(n / 5)) for n in range(500)]
    plot = line_plot([Series("student", "var(--student)", points)], "step")
    root = drawn(plot.svg)
    line = root.find("polyline")
    assert line is not None
    at = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(at) <= 240
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in at)
    titles = [title.text or "" for title in root.iter("title")]
    assert 20 <= len(titles) <= 60
    assert all(re.fullmatch(r"step \d+\nstudent: -?[\d.e-]+", title) for title in titles)
    assert plot.legend == [("student", "var(--student)", False)]


def test_higher_values_are_drawn_higher() -> None:
    plot = line_plot([Series("a", "red", [(0.0, 1.0), (1.0, 2.0)])], "step")
    line = drawn(plot.svg).find("polyline")
    assert line is not None
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in line.attrib["points"].split())
    assert x1 > x0 and y1 < y0


def test_values_that_are_not_finite_are_left_out() -> None:
    plot = line_plot([Series("a", "red", [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)])], "step")
    assert "nan" not in plot.svg and "inf" not in plot.svg
    assert "nothing was recorded" in line_plot([Series("a", "red", [(0.0, math.nan)])], "step").svg


def test_faint_lines_have_no_legend() -> None:
    points = [(0.0, 1.0), (1.0, 2.0)]
    plot = line_plot([Series("a", "red", points, faint=True), Series("a", "red", points, dashed=True)], "step")
    assert plot.legend == [("a", "red", True)]


def test_bars_are_as_long_as_their_values() -> None:
    plot = bar_plot([("general", [Bar("teacher", "red", 2.0), Bar("student", "blue", 4.0)])])
    widths = [float(rect.attrib["width"]) for rect in drawn(plot.svg).iter("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-3)
    assert [name for name, _, _ in plot.legend] == ["teacher", "student"]


def test_bars_of_zero_are_still_seen() -> None:
    for plot in (bar_plot([("x", [Bar("a", "red", 0.0)])]), row_plot([Bar("a", "red", 0.0)])):
        assert all(float(rect.attrib["width"]) > 0 for rect in drawn(plot.svg).iter("rect"))


def test_names_are_escaped() -> None:
    evil = '<script>alert("1")</script>'
    plots = [
        line_plot([Series(evil, evil, [(0.0, 1.0), (1.0, 2.0)])], evil, label=evil),
        bar_plot([(evil, [Bar(evil, evil, 1.0)])], label=evil),
        row_plot([Bar(evil, evil, 1.0)], label=evil),
    ]
    for plot in plots:
        assert "<script" not in plot.svg
        drawn(plot.svg)


def test_percent() -> None:
    assert percent(0.125) == "12%"
