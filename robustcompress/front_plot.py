"""A picture of a front: robust accuracy, with its intervals, against what a network costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from robustcompress.errors import InputError
from robustcompress.front import Front
from robustcompress.plots import COLOURS, GREY, NAMES, new_figure

PANELS = {
    "macs": (1e6, "multiply-adds for one image (millions)"),
    "size": (1e3, "parameters and buffers (kB)"),
    "onnx_ms": (1.0, "onnxruntime, one image, one thread (ms)"),
}
"""Unit and label of each axis."""

MARKERS = ("o", "s", "^", "v", "P", "X", "*", "h")
WIDE = 8
"""From this ratio of the largest to the smallest cost on, a panel's axis is logarithmic."""


def plot_front(front: Front, path: str | Path) -> Path:
    """Draw robust accuracy against multiply-adds, size and latency; what no other network beats is ringed and joined.

    Args:
        front: What `pareto` found.
        path: The picture; its suffix says the format (.png, .pdf, .svg).

    Returns:
        The path.

    Raises:
        InputError: No network was made, or the format or the directory does not exist.
    """
    if not front.made:
        raise InputError("there is nothing to draw: no network was made")
    figure, path = new_figure(path, (14, 4.9))
    labels = list(dict.fromkeys(point.label for point in front.made if not point.is_reference))
    looks: dict[str, dict[str, Any]] = {
        label: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, label in enumerate(labels)
    }
    looks |= {point.label: {"color": "black", "marker": "D"} for point in front.made if point.is_reference}
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, cost in zip(panels, PANELS, strict=True):
        _panel(axes, front, cost, looks)
    attack = NAMES.get(front.attack, front.attack.upper())
    panels[0].set_ylabel(f"accuracy under {attack} (%), 95 % intervals")
    figure.suptitle(
        f"{front.data}, {front.threat.label()}, seed {front.seed}: {attack} accuracy against cost "
        "(points of equal cost stand side by side)",
        fontsize=11,
    )
    figure.legend(handles=_key(front, looks), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    return path


def _panel(axes: Any, front: Front, cost: str, looks: dict[str, dict[str, Any]]) -> None:
    unit, label = PANELS[cost]
    shown = [point for point in front.made if getattr(point, cost) is not None]
    costs = {point.name: getattr(point, cost) / unit for point in shown}
    wide = bool(costs) and max(costs.values()) > WIDE * min(costs.values())
    places = _side_by_side(costs, wide)
    for point in shown:
        found = point.accuracies[front.attack]
        y = 100 * found["accuracy"]
        axes.errorbar(
            places[point.name],
            y,
            yerr=[[max(0.0, y - 100 * found["low"])], [max(0.0, 100 * found["high"] - y)]],
            markersize=7,
            capsize=2.5,
            elinewidth=1.1,
            linestyle="",
            zorder=3,
            **looks[point.label],
        )
    best = front.front(cost)
    if best:
        across = [places[point.name] for point in best]
        up = [100 * point.accuracies[front.attack]["accuracy"] for point in best]
        axes.step(across, up, where="post", color=GREY, linewidth=1.2, linestyle="--", zorder=1)
        axes.scatter(across, up, s=150, facecolors="none", edgecolors=GREY, linewidths=1.2, zorder=2)
    if wide:
        _plain_logarithm(axes, places.values())
    elif costs:
        axes.set_xlim(0, 1.08 * max(places.values()))
    axes.set(xlabel=label, ylim=(0, 102))
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _side_by_side(costs: Mapping[str, float], wide: bool) -> dict[str, float]:
    """Where points stand: those of equal cost beside each other, a little aside of it, so that both are seen."""
    most, least = max(costs.values(), default=1.0), min(costs.values(), default=1.0)
    step = math.log(most / least) / 70 if wide else most / 70

    def along(value: float) -> float:
        return math.log(value) if wide else value

    places: dict[str, float] = {}
    for name, cost in costs.items():
        near = [
            other for other in sorted(costs, key=costs.__getitem__) if abs(along(costs[other]) - along(cost)) < step
        ]
        aside = step * (near.index(name) - (len(near) - 1) / 2)
        places[name] = cost * math.exp(aside) if wide else cost + aside
    return places


def _plain_logarithm(axes: Any, places: Iterable[float]) -> None:
    """A logarithmic axis whose labels are plain numbers: powers of ten alone would often be one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    places = list(places)
    axes.set_xscale("log")
    axes.set_xlim(min(places) / 1.15, max(places) * 1.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _key(front: Front, looks: dict[str, dict[str, Any]]) -> list[Any]:
    from matplotlib.lines import Line2D

    references = {point.label for point in front.made if point.is_reference}
    handles = [
        Line2D(
            [], [], linestyle="", markersize=7, label=f"{label} (reference)" if label in references else label, **look
        )
        for label, look in looks.items()
    ]
    ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": GREY}
    return [*handles, Line2D([], [], color=GREY, linestyle="--", label="no other is cheaper and as accurate", **ring)]
