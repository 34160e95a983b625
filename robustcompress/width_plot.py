"""A picture of one network: how wide each channel group is, how wide it was, and where the multiply-adds go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.budget import Cost, human
from robustcompress.plots import GREY, check_picture, new_figure
from robustcompress.result import CompressResult
from robustcompress.widths import GroupWidth, Widths, widths_of

KINDS = {
    "residual": ("#0072B2", "residual: several writers"),
    "hidden": ("#009E73", "hidden: one writer"),
    "concat": ("#E69F00", "concat: read beside others"),
    "split": ("#CC79A7", "split: one writer, equal parts"),
    "heads": ("#D55E00", "attention heads"),
}
"""Colour of each kind of group that can be edited, and what the key says; colours as in `plots.COLOURS`."""

FIXED: dict[str, Any] = {"facecolor": "#e4e4e4", "edgecolor": "#9a9a9a", "hatch": "////", "linewidth": 0}
COLUMN = 72
"""Groups that stand below each other, before a second column begins."""


def plot_widths(
    model_or_result: nn.Module | CompressResult,
    path: str | Path,
    *,
    example: torch.Tensor | None = None,
    title: str = "",
) -> Path:
    """Draw the width of every channel group, in the model's order, beside its share of the multiply-adds.

    A bar is coloured by what holds the group together; one that cannot be edited is grey. For a result the width in the
    reference is an outline around the bar. The share is that of the layers that write the group.

    Args:
        model_or_result: A network, or a result.
        path: The picture; its suffix says the format (.png, .pdf, .svg).
        example: An image batch `[N, 3, H, W]`. By default images as the result was trained on, or of the size that the
            network was made for.
        title: What the network is called; its class or the strategy by default.

    Returns:
        The path.

    Raises:
        InputError: The format or the directory does not exist.
        UnsupportedModelError: The network holds layers that cannot be edited.
    """
    check_picture(path)  # before the network is traced
    if not title and isinstance(model_or_result, CompressResult):
        title = str(model_or_result.strategy["name"])
    return draw_widths(widths_of(model_or_result, example), path, title=title or type(model_or_result).__name__)


def draw_widths(widths: Widths, path: str | Path, *, title: str) -> Path:
    """Draw what `widths_of` found; for arguments, return value and errors see `plot_widths`."""
    columns = -(-len(widths.groups) // COLUMN)
    rows = -(-len(widths.groups) // columns)
    labels = _labels([group.name for group in widths.groups])
    size = 8 if rows <= 40 else 7
    # In inches, so that a row, a letter and a bar have one size in every picture.
    margin = 0.3 + 0.0085 * size * max(len(label) for label in labels)
    figure, path = new_figure(path, (columns * (margin + 5.4), 1.5 + rows * 0.0265 * size))
    figure.get_layout_engine().set(w_pad=0.08)
    ratios = [ratio for _ in range(columns) for ratio in (3.6, 1.4)]
    panels = list(figure.subplots(1, 2 * columns, width_ratios=ratios, squeeze=False).flat)
    limit = max([_longest(group) for group in widths.groups if group.kind != "output"] or [1])
    most = max(group.share for group in widths.groups)
    for column in range(columns):
        part = slice(column * rows, (column + 1) * rows)
        left, right = panels[2 * column : 2 * column + 2]
        _bars(left, widths.groups[part], limit, size)
        _shares(right, widths.groups[part], most, size)
        left.set_yticks(range(len(labels[part])), labels[part], fontsize=size)
        for axes in (left, right):
            axes.set_ylim(rows - 0.4, -0.6)  # the first layer on top; columns of one height
            axes.grid(axis="x", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="x", labelsize=size)
            axes.tick_params(axis="y", length=0)
    figure.suptitle(_headline(widths, title), fontsize=11)
    figure.legend(handles=_key(widths), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def _longest(group: GroupWidth) -> int:
    return max(group.width, group.before or 0) * group.head_dim


def _look(group: GroupWidth) -> dict[str, Any]:
    return {"color": KINDS[group.kind][0]} if group.editable and group.kind in KINDS else FIXED


def _bars(axes: Any, groups: Sequence[GroupWidth], limit: int, size: int) -> None:
    for place, group in enumerate(groups):
        axes.barh(place, min(group.width * group.head_dim, limit), 0.72, **_look(group))
        if _longest(group) > limit:  # a thousand classes would leave no room for the rest: their bar is broken
            axes.barh(place, 0.015 * limit, 0.9, left=0.92 * limit, color="white")
        changed = group.before is not None and group.before != group.width
        if changed:
            axes.barh(place, (group.before or 0) * group.head_dim, 0.72, fill=False, edgecolor=GREY, linewidth=0.9)
        text = (
            (f"{group.before} → " if changed else "")
            + str(group.width)
            + (f" heads of {group.head_dim}" if group.kind == "heads" else "")
        )
        axes.text(min(_longest(group), limit), place, f" {text}", va="center", fontsize=size - 1, color="#333333")
    axes.set_xlim(0, limit * (1.22 if any(group.before is not None for group in groups) else 1.13))
    axes.set_xlabel("channels", fontsize=size + 1)


def _shares(axes: Any, groups: Sequence[GroupWidth], most: float, size: int) -> None:
    for place, group in enumerate(groups):
        axes.barh(place, 100 * group.share, 0.72, **_look(group))
        axes.text(
            100 * group.share, place, f" {100 * group.share:.1f}", va="center", fontsize=size - 1, color="#333333"
        )
    axes.set_yticks([])
    axes.set_xlim(0, 100 * most * 1.35)
    axes.set_xlabel("% of MACs", fontsize=size + 1)


def _headline(widths: Widths, title: str) -> str:
    _, height, width = widths.image_shape
    now, before = widths.cost, widths.before
    if before is None:
        said = f"{human(now.macs)} MACs, {human(now.params)} parameters"
    else:
        said = f"MACs {_change(before, now, 'macs')}, parameters {_change(before, now, 'params')}"
    return f"{title}, images {height}x{width}\n{said}"


def _change(before: Cost, now: Cost, what: str) -> str:
    old, new = getattr(before, what), getattr(now, what)
    return f"{human(old)} → {human(new)} ({100 * new / old:.0f} %)"


def _key(widths: Widths) -> list[Any]:
    from matplotlib.patches import Patch

    shown = {group.kind for group in widths.groups if group.editable}
    handles = [Patch(color=colour, label=label) for kind, (colour, label) in KINDS.items() if kind in shown]
    if not all(group.editable for group in widths.groups):
        handles.append(Patch(**FIXED, label="keeps its width"))
    if any(group.before not in (None, group.width) for group in widths.groups):
        handles.append(Patch(fill=False, edgecolor=GREY, label="reference"))
    return handles


def _labels(names: Sequence[str], most: int = 34) -> list[str]:
    """Module names of at most so many letters: without their first parts, or their middles where those are needed."""
    ends = [_end(name, most) for name in names]
    if len(set(ends)) == len(set(names)):
        return ends
    return [name if len(name) <= most else f"{name[:12]}…{name[13 - most :]}" for name in names]


def _end(name: str, most: int) -> str:
    """The last parts of a dotted name, as many as there is room for."""
    if len(name) <= most:
        return name
    tail = name[1 - most :]
    return "…" + (tail.partition(".")[2] or tail)
