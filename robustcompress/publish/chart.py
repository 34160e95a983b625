"""Charts as inline SVG: they follow the page's colours, dark or light, need no script, and say in words what they show.

matplotlib is not used here, because its pictures have the colours of one background and are ten times as large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from robustcompress.publish.markup import Html, Part, plain, tag

WIDTH = 720
POINTS = 400
"""Points of one line that are drawn; of more, every so many-th."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 44
_STYLES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """What is drawn in one colour.

    Attributes:
        name: Stands in the key.
        points: (x, y), finite.
        look: A line with dots, a dashed line, dots alone, or steps.
        low: Lower end of an interval at each point, where there is one.
        high: Upper end.
        colour: 0 to 3; by its place where None.
    """

    name: str
    points: Sequence[tuple[float, float]]
    look: Literal["line", "dashed", "dots", "steps"] = "line"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int | None = None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    series: Sequence[Series],
    *,
    alt: str,
    x: str,
    y: str,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    x_from: float | None = None,
    height: int = 300,
) -> Html:
    """Curves over one axis.

    Args:
        series: At least one, with at least one point in all.
        alt: What a person who cannot see the picture is told.
        x: What the horizontal axis is.
        y: What the vertical axis is.
        y_range: Its ends; those of the points, and zero, where None.
        marks: Vertical lines, each with its word.
        x_from: Where the horizontal axis begins; at the first point where None.
        height: In units of the drawing.
    """
    series = [_thinned(one) for one in series if one.points]
    xs = [point[0] for one in series for point in one.points] + [mark[0] for mark in marks]
    ys = [point[1] for one in series for point in one.points]
    ys += [end for one in series for end in (*one.low, *one.high)]
    left, right = min(xs) if x_from is None else min(x_from, *xs), max(xs)
    if left == right:
        left, right = left - 0.5, right + 0.5
    bottom, top = y_range or _padded(ys)
    key = 22 * (1 + sum(8 * len(plain(one.name, 60)) + 46 for one in series) // (WIDTH - _LEFT))
    plot = height - _BOTTOM

    def place(px: float, py: float) -> tuple[float, float]:
        across = _LEFT + (px - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        down = plot - (min(max(py, bottom), top) - bottom) / (top - bottom) * (plot - _TOP)
        return round(across, 1), round(down, 1)

    drawn: list[Html] = []
    for value in ticks(bottom, top):
        _, down = place(left, value)
        drawn.append(_line(_LEFT, down, WIDTH - _RIGHT, down, "grid"))
        drawn.append(_text(_LEFT - 8, down + 4, _number(value), "end", "soft"))
    for value in ticks(left, right, 8):
        across, _ = place(value, bottom)
        drawn.append(_text(across, plot + 16, _number(value), "middle", "soft"))
    drawn.append(_line(_LEFT, plot, WIDTH - _RIGHT, plot, "axis"))
    drawn.append(_text((_LEFT + WIDTH) / 2, plot + 35, x, "middle", "soft"))
    middle = (plot + _TOP) / 2
    turned = f"rotate(-90 14 {middle})"
    drawn.append(tag("text", y, x=14, y=middle, text_anchor="middle", class_="soft", transform=turned))
    for value, word in marks:
        across, _ = place(value, bottom)
        drawn.append(_line(across, _TOP, across, plot, "mark"))
        drawn.append(_text(across + 5, _TOP + 10, word, "start", "soft"))
    for number, one in enumerate(series):
        drawn.append(tag("g", _course(one, place), class_=_colour(one, number)))
    drawn += _key(series, height + 14)
    return _svg(drawn, WIDTH, height + key, alt)


def intervals(rows: Sequence[tuple[str, float, float, float, int]], *, alt: str, x: str) -> Html:
    """One dot with its interval in a row: name, value, low, high in [0, 100], and the colour, 0 to 3."""
    left, step = 150, 30
    height = _TOP + step * len(rows) + _BOTTOM

    def across(value: float) -> float:
        return round(left + min(max(value, 0.0), 100.0) / 100 * (WIDTH - left - 70), 1)

    foot = height - _BOTTOM
    drawn = []
    for value in ticks(0, 100):
        drawn.append(_line(across(value), _TOP, across(value), foot, "grid"))
        drawn.append(_text(across(value), foot + 16, _number(value), "middle", "soft"))
    drawn.append(_text((left + WIDTH - 70) / 2, foot + 35, x, "middle", "soft"))
    for number, (name, value, low, high, colour) in enumerate(rows):
        down = _TOP + step * (number + 0.5)
        drawn.append(_text(left - 12, down + 4, plain(name, 20), "end"))
        shown = [_line(across(low), down, across(high), down, "err")]
        shown += [_line(across(end), down - 5, across(end), down + 5, "err") for end in (low, high)]
        shown.append(tag("circle", cx=across(value), cy=down, r=6, class_="dot"))
        drawn.append(tag("g", shown, class_=f"s{colour % _STYLES}"))
        drawn.append(_text(across(high) + 10, down + 4, f"{value:.1f}", "start"))
    return _svg(drawn, WIDTH, height, alt)


def bars(rows: Sequence[tuple[str, float, float | None, str, int]], *, alt: str, x: str) -> Html:
    """Bars below each other: name, length, length of the outline around it or None, what is written, colour."""
    left, step, right = 190, 20, 90
    height = _TOP + step * len(rows) + _BOTTOM
    most = max([max(length, outline or 0.0) for _, length, outline, _, _ in rows] or [1.0]) or 1.0
    foot = height - _BOTTOM

    def across(value: float) -> float:
        return round(left + value / most * (WIDTH - left - right), 1)

    drawn = []
    for value in ticks(0, most):
        drawn.append(_line(across(value), _TOP, across(value), foot, "grid"))
        drawn.append(_text(across(value), foot + 16, _number(value), "middle", "soft"))
    drawn.append(_text((left + WIDTH - right) / 2, foot + 35, x, "middle", "soft"))
    for number, (name, length, outline, written, colour) in enumerate(rows):
        down = _TOP + step * number
        drawn.append(_text(left - 8, down + 14, name if len(name) <= 26 else "…" + name[-25:], "end"))
        bar = tag("rect", x=left, y=down + 3, width=round(across(length) - left, 1), height=step - 6, class_="bar")
        drawn.append(tag("g", bar, class_=f"s{colour % _STYLES}"))
        if outline is not None:
            width = round(across(outline) - left, 1)
            drawn.append(tag("rect", x=left, y=down + 3, width=width, height=step - 6, class_="ref"))
        drawn.append(_text(across(max(length, outline or 0.0)) + 6, down + 14, written, "start", "soft"))
    return _svg(drawn, WIDTH, height, alt)


def _svg(drawn: Sequence[Html], width: int, height: float, alt: str) -> Html:
    return tag("svg", tag("title", alt), drawn, viewBox=f"0 0 {width} {height:g}", role="img", aria_label=alt)


def _line(x1: float, y1: float, x2: float, y2: float, look: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=look)


def _text(x: float, y: float, text: Part, anchor: str, look: str | None = None) -> Html:
    return tag("text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor, class_=look)


def _course(one: Series, place: object) -> list[Html]:
    """The line of one series, its intervals and its dots."""
    assert callable(place)
    found: list[tuple[float, float]] = [place(*point) for point in one.points]
    drawn = []
    path = found
    if one.look == "steps":
        corners = [(b[0], a[1]) for a, b in pairwise(found)]
        path = [point for pair in zip(found, corners, strict=False) for point in pair] + found[-1:]
    if one.look != "dots" and len(found) > 1:
        points = " ".join(f"{px:g},{py:g}" for px, py in path)
        drawn.append(tag("polyline", points=points, class_="line dash" if one.look == "dashed" else "line"))
    for (px, _), low, high in zip(one.points, one.low, one.high, strict=False):
        (across, down), (_, up) = place(px, low), place(px, high)
        drawn.append(_line(across, down, across, up, "err"))
    if one.look == "dots" or (one.look != "steps" and len(found) <= 60):
        radius = 4 if one.look == "dots" or one.low else 3
        drawn += [tag("circle", cx=px, cy=py, r=radius, class_="dot") for px, py in found]
    return drawn


def _key(series: Sequence[Series], down: float) -> list[Html]:
    drawn, across = [], float(_LEFT)
    for number, one in enumerate(series):
        name = plain(one.name, 60)
        needed = 8 * len(name) + 46
        if across > _LEFT and across + needed > WIDTH:
            across, down = float(_LEFT), down + 22
        look = "line dash" if one.look == "dashed" else "line"
        if one.look == "dots":
            sample = tag("circle", cx=across + 12, cy=down - 4, r=4, class_="dot")
        else:
            sample = _line(across, down - 4, across + 24, down - 4, look)
        drawn += [tag("g", sample, class_=_colour(one, number)), _text(across + 32, down, name, "start")]
        across += needed
    return drawn


def _colour(one: Series, number: int) -> str:
    return f"s{(number if one.colour is None else one.colour) % _STYLES}"


def _thinned(one: Series) -> Series:
    every = -(-len(one.points) // POINTS)
    if every == 1:
        return one
    keep = slice(None, None, every)
    return Series(
        name=one.name,
        points=one.points[keep],
        look=one.look,
        low=one.low[keep],
        high=one.high[keep],
        colour=one.colour,
    )


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(0.0, *values)
    if low == high:
        return low, low + 1.0
    margin = 0.06 * (high - low)
    return (low - margin if low < 0 else low), (high + margin if high > 0 else high)


def _number(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.6g}"
