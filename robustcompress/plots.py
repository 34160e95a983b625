"""One picture of several results: what was kept, what it cost, and how it came about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.errors import InputError, RobustCompressError
from robustcompress.result import CompressResult
from robustcompress.robust.objectives import OBJECTIVES, Objective
from robustcompress.structure import StructuralEditor

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Told apart by colour-blind eyes too (Okabe and Ito 2008)."""

MARKERS = {"clean": "o", "autoattack": "*"}
NAMES = {"clean": "clean", "autoattack": "AutoAttack"}
GREY = "#777777"


def plot_results(results: Mapping[str, CompressResult], path: str | Path) -> Path:
    """Draw accuracies against cost, widths before and after, and the course of training, side by side.

    Args:
        results: By the names to show; all with a report over the same threat.
        path: The picture; its suffix says the format (.png, .pdf, .svg).

    Returns:
        The path.

    Raises:
        InputError: There are no results, or the format or the directory does not exist.
    """
    if not results:
        raise InputError("plot_results() needs at least one result")
    figure, path = new_figure(path, (15, 5.2))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(results)}
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.0, 1.15, 1.15))
    _accuracies(left, results, colours)
    _widths(middle, results, colours)
    _courses(right, results, colours)
    for axes in (left, middle, right):
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.3), ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    return path


def new_figure(path: str | Path, size: tuple[float, float]) -> tuple[Any, Path]:
    """An empty figure of this size in inches, and the path that it can be saved to.

    Raises:
        InputError: The format or the directory does not exist.
    """
    from matplotlib.figure import Figure

    path = check_picture(path)
    return Figure(figsize=size, layout="constrained"), path


def check_picture(path: str | Path) -> Path:
    """The path of a picture, which could be saved there.

    Raises:
        InputError: The format or the directory does not exist.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent}; create it first")
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in formats:
        raise InputError(f"{path}: name one of the formats {', '.join(sorted(formats))} by its suffix, such as .png")
    return path


def _accuracies(axes: Any, results: Mapping[str, CompressResult], colours: Mapping[str, str]) -> None:
    """Accuracy with its 95 % interval against MACs; points of equal cost stand side by side."""
    from matplotlib.lines import Line2D

    costs = [result.after.macs / 1e6 for result in results.values()]
    most = max([*costs, *(result.before.macs / 1e6 for result in results.values())])
    step = most / 40
    attacks: dict[str, int] = {}
    for index, (name, result) in enumerate(results.items()):
        nearby = [i for i, cost in enumerate(costs) if abs(cost - costs[index]) < 3 * step]
        centre = costs[index] + (nearby.index(index) - (len(nearby) - 1) / 2) * 3.2 * step
        attacked = result.report.attacks if result.report is not None else ()
        shown = [attack for attack in attacked if attack.name != "fgsm"]  # beside PGD it says nothing more
        for place, attack in enumerate(shown):
            attacks.setdefault(attack.name, attack.n)
            accuracy = 100 * attack.accuracy
            axes.errorbar(
                centre + (place - (len(shown) - 1) / 2) * 0.7 * step,
                accuracy,
                yerr=[[max(0.0, accuracy - 100 * attack.low)], [max(0.0, 100 * attack.high - accuracy)]],
                fmt=MARKERS.get(attack.name, "s"),
                color=colours[name],
                markersize=10 if attack.name == "autoattack" else 6,
                capsize=2.5,
                elinewidth=1.2,
            )
    handles = [Line2D([], [], color=colours[name], linewidth=5, label=name) for name in results]
    handles += [
        Line2D(
            [],
            [],
            color=GREY,
            linestyle="",
            marker=MARKERS.get(attack, "s"),
            markersize=10 if attack == "autoattack" else 6,
            label=f"{NAMES.get(attack, attack.upper())} (n={n})",
        )
        for attack, n in attacks.items()
    ]
    axes.set(
        xlim=(0, most * 1.1), ylim=(0, 102), xlabel="multiply-adds for one image (millions)", ylabel="accuracy (%)"
    )
    threat = next(iter(results.values())).threat
    axes.set_title(f"Test accuracy, 95 % intervals ({threat.label()})", fontsize=11)
    axes.legend(handles=handles)
    _keep_handles(axes, handles)


def _keep_handles(axes: Any, handles: Sequence[Any]) -> None:
    """Have the common legend call show these handles."""
    place = axes.legend
    axes.legend = lambda **options: place(handles=handles, **options)


def _widths(axes: Any, results: Mapping[str, CompressResult], colours: Mapping[str, str]) -> None:
    """Channels of every group: the reference as an outline, each result as a bar."""
    reference = _reference_widths(results)
    found = {name: _editable_widths(result.model, result.image_shape) for name, result in results.items()}
    groups = list(reference or next(iter(found.values())))
    narrowed = {name: widths for name, widths in found.items() if widths != reference} or found
    thickness = 0.8 / len(narrowed)
    for index, (name, widths) in enumerate(narrowed.items()):
        places = [i - 0.4 + (index + 0.5) * thickness for i in range(len(groups))]
        heights = [widths.get(group, 0) for group in groups]
        axes.bar(places, heights, thickness * 0.92, color=colours[name], label=name)
    if reference:
        axes.bar(range(len(groups)), list(reference.values()), 0.9, fill=False, edgecolor=GREY, label="reference")
    every = max(1, len(groups) // 16)
    axes.set_xticks(range(0, len(groups), every), [_short(group) for group in groups[::every]])
    axes.tick_params(axis="x", labelrotation=40, labelsize=8)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    axes.set_ylabel("channels")
    axes.set_title("Width of each channel group", fontsize=11)


def _courses(axes: Any, results: Mapping[str, CompressResult], colours: Mapping[str, str]) -> None:
    """Robust accuracy over epochs: training as a line, validation as dots; edits as triangles at the foot."""
    from matplotlib.lines import Line2D

    edited = validated = False
    for row, (name, result) in enumerate(results.items()):
        training, validation, events = _course(result)
        axes.plot(
            *zip(*training, strict=True), ".-", color=colours[name], linewidth=1.6, markersize=3
        ) if training else None
        if validation:
            validated = True
            axes.plot(*zip(*validation, strict=True), "o", color=colours[name], markersize=5, markeredgecolor="white")
        if events:
            edited = True
            foot = [-5.0 * (row + 1)] * len(events)  # below every curve, a row for each result
            axes.plot(events, foot, "^", color=colours[name], markersize=7, markeredgecolor="white")
    handles = [Line2D([], [], color=colours[name], linewidth=2, label=name) for name in results]
    if validated:
        by_pgd = all(_validated_by_pgd(result) for result in results.values())
        label = "validation (PGD-10)" if by_pgd else "validation"
        handles.append(Line2D([], [], color=GREY, linestyle="", marker="o", markersize=5, label=label))
    if edited:
        handles.append(Line2D([], [], color=GREY, linestyle="", marker="^", markersize=7, label="grown or pruned"))
    axes.set(
        xlim=(0, None),
        ylim=(-5.0 * (len(results) + 1) if edited else 0, 102),
        xlabel="epochs",
        ylabel="robust accuracy (%)",
    )
    axes.set_yticks(range(0, 101, 20))
    axes.set_title("Training (lines) and validation (dots)", fontsize=11)
    _keep_handles(axes, handles)


def _validated_by_pgd(result: CompressResult) -> bool:
    kind = OBJECTIVES.get(str(result.settings.get("objective", {}).get("name")), Objective)
    return kind.withstood is Objective.withstood


def _course(result: CompressResult) -> tuple[list[tuple[float, float]], list[tuple[float, float]], list[float]]:
    """Training and validation points as (epoch, %), and the epochs at which the network was edited."""
    training: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    events: list[float] = []
    for epoch, record in timed(result):
        if record.get("event") in ("grow", "prune"):
            events.append(epoch)
        if "robust" in record:
            training.append((epoch, 100 * record["robust"]))
        if "val_robust" in record:
            validation.append((epoch, 100 * record["val_robust"]))
    return training, validation, events


def timed(result: CompressResult) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Each record of the history with the epochs that had passed; a record counts steps within its own phase."""
    train, batch = int(result.data["train"]), int(result.settings["recipe"]["batch_size"])
    steps_per_epoch = max(1, train // min(batch, train))
    before, phase, within = 0, None, 0
    for record in result.history:
        if "steps" in record:
            if record["phase"] != phase:
                before, phase = before + within, record["phase"]
            within = int(record["steps"])
        yield (before + within) / steps_per_epoch, record


def _reference_widths(results: Mapping[str, CompressResult]) -> dict[str, int]:
    """Widths of the reference; empty where it cannot be built, or where the results began with different ones."""
    specs = [result.spec for result in results.values()]
    spec = specs[0]
    if spec is None or spec.imports_code or any(other != spec for other in specs):
        return {}
    try:
        with torch.random.fork_rng(devices=[]):
            return _editable_widths(spec.build(), next(iter(results.values())).image_shape)
    except RobustCompressError:
        return {}


def _editable_widths(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, int]:
    editor = StructuralEditor(model, torch.zeros(2, *image_shape))
    return {group.name: group.width for group in editor.editable}


def _short(group: str) -> str:
    """The end of a long module name, which tells groups apart."""
    return group if len(group) <= 16 else "…" + group[-15:]
