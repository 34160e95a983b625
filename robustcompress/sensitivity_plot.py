"""A heat map of sensitivities: what each group and block costs under attack, and without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustcompress.cuts import Cut, Sensitivity
from robustcompress.errors import InputError
from robustcompress.plots import check_picture, new_figure

ROW = 0.21
"""Height of a row, in inches."""


def plot_sensitivity(found: Sensitivity, path: str | Path) -> Path:
    """Draw the accuracy lost, under attack beside clean: a row a group or block, in the network's order.

    Args:
        found: What `sensitivity` found.
        path: The picture; its suffix says the format (.png, .pdf, .svg).

    Returns:
        The path.

    Raises:
        InputError: Nothing was cut, or the format or the directory does not exist.
    """
    check_picture(path)
    if not found.cuts:
        raise InputError("there is nothing to draw: no group can be pruned, and no block can leave")
    groups, blocks, shares = found.groups, found.blocks, found.shares
    kinds = [kind for kind in (groups, blocks) if kind]
    longest = max(len(name) for name in (*groups, *blocks))
    figure, path = new_figure(
        path, (2.4 + 0.075 * longest + 1.5 * max(2, len(shares)), 1.9 + ROW * (len(groups) + len(blocks) + 1))
    )
    panels = figure.subplots(
        len(kinds), 2, squeeze=False, height_ratios=[len(kind) for kind in kinds], width_ratios=(1, 1)
    )
    limits = {"loss": max(0.01, found.robust), "clean_loss": max(0.01, found.clean)}
    titles = {"loss": f"under {found.attack.upper()}", "clean_loss": "clean"}
    for number, (row, parts) in enumerate(zip(panels, kinds, strict=True)):
        columns: tuple[float | None, ...] = shares if parts is groups else (None,)
        for axes, (value, limit) in zip(row, limits.items(), strict=True):
            picture = _map(axes, [[found.cut(part, share) for share in columns] for part in parts], value, limit)
            axes.set_yticks(range(len(parts)), parts if value == "loss" else [], fontsize=8)
            said = [f"keeps {share:g}" if share is not None else "block left out" for share in columns]
            axes.set_xticks(range(len(columns)), said, fontsize=8)
            if number == 0:
                whole = found.robust if value == "loss" else found.clean
                axes.set_title(f"lost {titles[value]} (of {100 * whole:.1f} %)", fontsize=10)
            if number == len(kinds) - 1:
                figure.colorbar(
                    picture,
                    ax=list(panels[:, list(limits).index(value)]),
                    location="bottom",
                    shrink=0.9,
                    label="percentage points",
                    aspect=30,
                )
    figure.suptitle(
        "Accuracy lost when one part alone is cut\n"
        f"{found.n} {found.split} images of {found.data}, {found.threat.label()}",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)
    return path


def _map(axes: Any, cuts: list[list[Cut | None]], value: str, limit: float) -> Any:
    from matplotlib import colormaps

    numbers = [[float("nan") if cut is None else 100 * getattr(cut, value) for cut in row] for row in cuts]
    colours = colormaps["YlOrRd"].with_extremes(bad="#eeeeee")
    picture = axes.imshow(numbers, cmap=colours, vmin=0, vmax=100 * limit, aspect="auto")
    for i, row in enumerate(numbers):
        for j, number in enumerate(row):
            missing = number != number
            dark = not missing and number > 60 * limit
            axes.text(
                j,
                i,
                "-" if missing else f"{number:.0f}" if abs(number) >= 0.5 else "0",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "#222222",
            )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return picture
