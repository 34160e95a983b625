"""Charts stay within their frame, say in words what they show, and put points where their numbers are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustcompress.publish import chart
from robustcompress.publish.markup import Html, plain, tag

FINITE = st.floats(-1e12, 1e12, allow_nan=False).map(lambda value: round(value, 6))
POINTS = st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=500)


def drawing(svg: Html) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def circles(svg: Html) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in drawing(svg).iter("circle")]


@settings(max_examples=60, deadline=None)
@given(POINTS, POINTS, st.sampled_from(["line", "dashed", "dots", "steps"]))
def test_everything_is_drawn_within_the_frame(
    first: list[tuple[float, float]], second: list[tuple[float, float]], look: str
) -> None:
    series = [chart.Series(name="a", points=first, look=look), chart.Series(name="b<c", points=second)]  # type: ignore[arg-type]
    svg = chart.lines(series, alt="what it shows", x="x", y="y")
    root = drawing(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    numbers = [
        (float(e.attrib[key]), height if "y" in key else width)
        for e in root.iter()
        for key in e.attrib
        if key in ("x1", "x2", "y1", "y2", "cx", "cy")
    ]
    corners = [tuple(map(float, pair.split(","))) for e in root.iter("polyline") for pair in e.attrib["points"].split()]
    numbers += [(place, (width, height)[axis]) for corner in corners for axis, place in enumerate(corner)]
    assert all(0 <= value <= most for value, most in numbers)
    assert root.attrib["aria-label"] == "what it shows" and "nan" not in svg and "inf" not in svg


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 10))
def test_ticks_are_round_and_within(low: float, span: float, count: int) -> None:
    found = chart.ticks(low, low + span, count)
    margin = 1e-6 * (abs(low) + span)
    assert 1 <= len(found) <= 2 * count + 1 and found == sorted(found)
    assert all(low - margin <= value <= low + span + margin for value in found)


def test_points_are_where_their_numbers_are() -> None:
    svg = chart.lines(
        [chart.Series(name="a", points=[(0, 0), (5, 50), (10, 100)], look="dots")],
        alt="a",
        x="",
        y="",
        y_range=(0, 100),
    )
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)[:3]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1) and y2 < y0


def test_bars_and_intervals() -> None:
    svg = chart.bars([("a", 5.0, 10.0, "10 → 5", 0), ("b", 0.0, None, "0", 1)], alt="two bars", x="channels")
    widths = [float(r.attrib["width"]) for r in drawing(svg).iter("rect")]
    assert widths[0] == pytest.approx(widths[1] / 2, abs=0.2) and widths[2] == 0
    (left, _), (right, _) = circles(chart.intervals([("a", 0.0, 0, 5, 0), ("b", 100.0, 95, 100, 1)], alt="x", x="%"))
    assert left == 150 and right == chart.WIDTH - 70


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_is_no_markup_is_text(inside: str, attribute: str) -> None:
    written = tag("p", inside, class_=attribute)
    assert len(re.findall(r"<", written)) == 2 and re.fullmatch(r'<p class="[^"<>]*">[^<>]*</p>', written, re.DOTALL)


def test_text_is_made_visible_and_short() -> None:
    assert plain("a\u202eb\x00c\ud800") == "a�b�c�" and len(plain("x" * 10_000)) == 400
