"""The picture of a grid: robust accuracy against the costs of a network and of its training, and against the radius."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import read_cells
from benchmarks.compare_report import ROBUST, Row, attacks_of, counts_zeros, mask_of, rows_of
from benchmarks.grid import EPOCHS, MACS, Grid

# Told apart by colour-blind eyes too (Okabe and Ito 2008); the marker says the rest.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8c8c00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
RADIUS = "PGD-20 accuracy (%)"
WIDE = 8
"""From this ratio of the largest to the smallest cost on, costs stand on a logarithmic axis."""
ZEROS = "weights that are not zero (thousands)"
ZEROS_PLAIN = "weights that are not zero"


def plot_grid(grid: Grid, out: Path, path: Path) -> Path | None:
    """Draw the four panels of a grid from its finished cells.

    Args:
        grid: The grid.
        out: Directory of the cells.
        path: The picture, .png or .svg.

    Returns:
        The path; None where no cell is finished.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = read_cells(out, [cell.name for cell in grid.cells])
    if not cells:
        return None
    rows = rows_of(grid, cells)
    attack = ROBUST if ROBUST in attacks_of(cells.values()) else attacks_of(cells.values())[-1]
    figure = Figure(figsize=(13.5, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2).flatten()
    style = {
        arm: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}
        for i, arm in enumerate(grid.arms)
    }
    if counts_zeros(rows):
        _against(panels[0], rows, attack, style, ("after", "nonzeros"), 1e3, ZEROS)
        _against(panels[1], rows, "pgd-20", style, ("after", "nonzeros"), 1e3, ZEROS)
        panels[1].set_title("The same under PGD-20, on more images: an upper bound")
    else:
        _against(panels[0], rows, attack, style, ("after", "macs"), 1e6, "multiply-adds of one image (millions)")
        _against(panels[1], rows, attack, style, ("after", "params"), 1e3, "parameters (thousands)")
        panels[1].set_title("... against its size")
    _against(panels[2], rows, attack, style, ("training", "macs"), 1e12, "multiply-adds of the training (10$^{12}$)")
    panels[0].set_title("Robust accuracy against the network's cost")
    panels[2].set_title("... against the cost of training it (hollow: matched training)")
    if any(cell["results"]["curve"] for cell in cells.values()):
        _curves(panels[3], rows, style)
    else:
        _masks(panels[3], rows, style)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(8, len(labels)), frameon=False)
    seeds = max(len(row.cells) for row in rows)
    figure.suptitle(
        f"{grid.about}\n{seeds} seeds: points are means, bars reach from the lowest seed to the highest; "
        "arms of equal cost stand side by side",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    return path


def _against(
    axes: Any,
    rows: Sequence[Row],
    attack: str,
    style: Mapping[str, Mapping[str, str]],
    keys: tuple[str, str],
    unit: float,
    label: str,
) -> None:
    matched = keys[0] == "training"
    costs = [row.mean(*keys) / unit for row in rows]
    wide = max(costs) > WIDE * min(costs)  # equal steps then are equal ratios
    if wide:
        axes.set_xscale("log")
    for number, (arm, look) in enumerate(style.items()):
        # Arms of equal cost stand side by side.
        place = 0.0 if matched else number - len(style) / 2
        aside, factor = (0.0, 1 + place / 60) if wide else (place * max(costs) / 200, 1.0)
        for account in (EPOCHS, MACS) if matched else (EPOCHS,):
            mine = [row for row in rows if row.arm == arm and row.account == account]
            points = sorted((row.mean(*keys) / unit * factor + aside, *_spread(row, attack)) for row in mine)
            if not points:
                continue
            x, mean, low, high = zip(*points, strict=True)
            below, above = (
                [m - v for m, v in zip(mean, low, strict=True)],
                [h - m for m, h in zip(mean, high, strict=True)],
            )
            axes.errorbar(
                x,
                mean,
                yerr=[below, above],
                label=arm if account == EPOCHS else None,
                linestyle="-" if account == EPOCHS else ":",
                linewidth=0.8,
                markersize=8,
                capsize=2,
                elinewidth=0.8,
                markerfacecolor=look["color"] if account == EPOCHS else "white",
                **look,
            )
    name = "AutoAttack" if attack == ROBUST else attack
    axes.set(xlabel=label, ylabel=f"{name} accuracy (%)")
    axes.grid(alpha=0.3)


def _spread(row: Row, attack: str) -> tuple[float, float, float]:
    """Mean, lowest and highest seed, in per cent."""
    values = [100 * value for value in row.accuracy(attack).values]
    return statistics.fmean(values), min(values), max(values)


def _masks(axes: Any, rows: Sequence[Row], style: Mapping[str, Mapping[str, str]]) -> None:
    """What the masks are good for before fine-tuning, by budget."""
    keys = ("after", "nonzeros") if counts_zeros(rows) else ("after", "macs")
    for arm, look in style.items():
        points = []
        for row in rows:
            masks = [mask for cell in row.cells.values() if (mask := mask_of(cell)) is not None]
            if row.arm == arm and row.account == EPOCHS and masks:
                points.append((row.mean(*keys), 100 * statistics.fmean(mask["val_robust"] for mask in masks)))
        if points:
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, linewidth=0.8, markersize=8, **look)
    axes.set(xlabel=ZEROS_PLAIN if counts_zeros(rows) else "multiply-adds of one image", ylabel="PGD-10 accuracy (%)")
    axes.set_xscale("log")
    axes.set_title("Masks before fine-tuning, on validation images")
    axes.grid(alpha=0.3)


def _curves(axes: Any, rows: Sequence[Row], style: Mapping[str, Mapping[str, str]]) -> None:
    """The security curve at the smallest budget, where differences should show most."""
    costs = {row.labels["budget"]: row.mean("after", "macs") for row in rows if "budget" in row.labels}
    budgets = sorted(costs, key=lambda budget: costs[budget])
    for row in rows:
        if row.account != EPOCHS or row.labels.get("budget") not in (None, *budgets[:1]):
            continue
        curves = [cell["results"]["curve"] for cell in row.cells.values()]
        if not curves or not curves[0]:
            continue
        n = int(curves[0][0]["n"])
        clean = 100 * statistics.fmean(float(flags[:n].double().mean()) for flags in row.flags("clean"))
        radii = [0.0, *(point["eps"] for point in curves[0])]
        means = [
            clean,
            *(100 * statistics.fmean(p["accuracy"] for p in points) for points in zip(*curves, strict=True)),
        ]
        axes.plot(radii, means, linewidth=1.2, markersize=5, **style[row.arm])
    smallest = f" at {budgets[0]} of the MACs" if budgets else ""
    axes.set(xlabel="radius of the attack", ylabel=RADIUS, ylim=(0, None))
    axes.set_title(f"Security curve{smallest} (PGD-20: an upper bound)")
    axes.grid(alpha=0.3)
