"""The security curve: accuracy over radii, which must fall, and to nothing in the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from robustcompress.artefact.jury import Jury
from robustcompress.artefact.report import ArtefactReport, CurvePoint
from robustcompress.artefact.rounding import LEVELS
from robustcompress.errors import InputError
from robustcompress.plots import COLOURS, GREY, new_figure
from robustcompress.robust import AttackResult, ThreatModel

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the threat's own radius."""


def security_curve(jury: Jury, clean: Tensor, attack: Callable[[Jury, Tensor], AttackResult]) -> tuple[CurvePoint, ...]:
    """Measure the accuracy at 0, at multiples of the threat's radius, and where every image can become plain grey.

    Args:
        jury: Of the report.
        clean: Flags of the first images without an attack; the curve is about those.
        attack: Attacks the images with these flags under the threat of the jury that it is given.
    """
    points = [CurvePoint(eps=0.0, result=AttackResult(name="clean", correct=clean, seconds=0.0))]
    limit = unbounded(jury.threat, jury.images.shape[1:])
    for eps in [*(m * jury.threat.eps for m in MULTIPLES if m * jury.threat.eps < limit), limit]:
        if jury.file.input_type == "uint8" and eps * (1 + 1e-5) < 1 / LEVELS:
            continue  # a file that reads bytes sees nothing so small
        at = replace(jury, threat=replace(jury.threat, eps=eps))
        points.append(CurvePoint(eps=eps, result=attack(at, clean), unbounded=eps == limit))
    return tuple(points)


def unbounded(threat: ThreatModel, shape: torch.Size) -> float:
    """The radius that reaches plain grey from every image: beyond it no image says what it shows.

    Args:
        threat: Its norm and bounds count.
        shape: Of an image.
    """
    low, high = threat.bounds
    half = (high - low) / 2
    return half if threat.norm == "linf" else half * math.sqrt(shape.numel())


def plot_curve(report: ArtefactReport, path: str | Path) -> Path:
    """Draw the security curve of a report, with 95 % intervals.

    Args:
        report: With a curve.
        path: The picture; its suffix says the format.

    Raises:
        InputError: The report has no curve, or the format or the directory does not exist.
    """
    if not report.curve:
        raise InputError("this report holds no security curve: ask for one with curve=True")
    figure, path = new_figure(path, (7, 4.2))
    axes = figure.subplots()
    threat = report.robust.threat
    places = range(len(report.curve))
    accuracies = [100 * point.result.accuracy for point in report.curve]
    below = [max(0.0, 100 * (p.result.accuracy - p.result.low)) for p in report.curve]
    above = [max(0.0, 100 * (p.result.high - p.result.accuracy)) for p in report.curve]
    axes.errorbar(places, accuracies, yerr=[below, above], marker="o", color=COLOURS[0], capsize=3)
    own = next((i for i, point in enumerate(report.curve) if math.isclose(point.eps, threat.eps)), None)
    if own is not None:
        axes.axvline(own, color=GREY, linestyle=":", linewidth=1)
        axes.annotate(threat.label(), (own, 100), xytext=(4, -4), textcoords="offset points", color=GREY, va="top")
    axes.set_xticks(places, [_named(point, threat) for point in report.curve])
    axes.set(ylim=(0, 102), xlabel=f"radius ({threat.norm})", ylabel="accuracy of the file (%)")
    axes.set_title(f"{report.path.name}: accuracy over the radius (n={report.curve[0].result.n})", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _named(point: CurvePoint, threat: ThreatModel) -> str:
    if point.eps == 0:
        return "0"
    label = replace(threat, eps=point.eps).label().removeprefix(f"{threat.norm} ")
    return f"{label}\n(plain grey)" if point.unbounded else label
