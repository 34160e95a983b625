"""One picture of certificates: certified accuracy over the radius."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from robustcompress.certify.report import CertificateReport
from robustcompress.errors import InputError
from robustcompress.plots import COLOURS, new_figure
from robustcompress.robust import wilson

_POINTS = 200


def plot_certificates(reports: Mapping[str, CertificateReport], path: str | Path) -> Path:
    """Draw certified accuracy over the radius, with 95 % intervals over the images.

    Args:
        reports: By the names to show; radii of one norm.
        path: The picture; its suffix says the format (.png, .pdf, .svg).

    Returns:
        The path.

    Raises:
        InputError: There are no reports, their norms differ, or the format or the directory does not exist.
    """
    norms = sorted({report.norm for report in reports.values()})
    if len(norms) != 1:
        raise InputError(f"certificates over {', '.join(norms) or 'nothing'}: give reports of one norm")
    figure, path = new_figure(path, (7, 4.2))
    axes = figure.subplots()
    furthest = max(_reach(report) for report in reports.values())
    for index, (name, report) in enumerate(reports.items()):
        colour = COLOURS[index % len(COLOURS)]
        radii = torch.linspace(0, furthest, _POINTS, dtype=torch.float64).tolist()
        counts = [int(report.certified(radius).sum()) for radius in radii]
        ends = [wilson(count, report.n) for count in counts]
        axes.plot(radii, [100 * count / report.n for count in counts], color=colour, linewidth=1.8, label=name)
        low, high = ([100 * end[side] for end in ends] for side in (0, 1))
        axes.fill_between(radii, low, high, color=colour, alpha=0.15, linewidth=0)
    images = sorted({report.n for report in reports.values()})
    axes.set(xlim=(0, furthest), ylim=(0, 102), xlabel=f"radius ({norms[0]})", ylabel="certified accuracy (%)")
    axes.set_title(f"Certified accuracy (n={', '.join(map(str, images))}; band: 95 % over images)", fontsize=11)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    return path


def _reach(report: CertificateReport) -> float:
    """How far the axis goes: past the largest radius, so that the fall to nothing is seen."""
    return 1.05 * max(float(report.radii.max()), report.settings.get("eps", report.settings.get("sigma", 0.0)))
