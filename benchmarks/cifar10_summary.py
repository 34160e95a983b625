"""The tables of `cifar10_cpu`, from the cells that are there. No figure is made here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import FORMAT, provenance, read_json, table, write_json, write_text
from robustcompress.budget import human
from robustcompress.errors import InputError
from robustcompress.robust import PairedTest, RobustReport, ThreatModel, compare

Cell = dict[str, Any]

PREAMBLE = (
    "The images are CIFAR-10 **re-encoded as JPEG**, and only a part of them, on a narrow network with few epochs: the "
    "rows can be compared with each other, and **not with published CIFAR-10 numbers**. Robust accuracy means "
    "AutoAttack; PGD-20 is a progress meter. Intervals are 95 % (Wilson) over the test images of one trained network; "
    "how much training itself varies is what the seeds show."
)


def read_cells(directory: Path, *, same: bool = True) -> list[Cell]:
    """Read the cells of a directory, by seed and then in the order of the strategies' cost.

    Args:
        directory: May be missing or empty.
        same: Refuse cells that differ in more than strategy and seed: they do not belong in one table.

    Raises:
        InputError: Such cells are there.
    """
    cells = [read_json(path) for path in sorted(directory.glob("*-s*.json"))]
    shared = [{k: v for k, v in cell["settings"].items() if k not in ("strategy", "seed")} for cell in cells]
    for cell, settings in zip(cells, shared, strict=True):
        if same and settings != shared[0]:
            keys = sorted(key for key in settings if settings[key] != shared[0].get(key))
            raise InputError(
                f"{cells[0]['name']} and {cell['name']} differ in {', '.join(keys)}: keep such runs in two directories"
            )
    order = ("none", "magnitude", "hydra", "grape")
    return sorted(cells, key=lambda c: (c["seed"], *(c["strategy"] != name for name in order), c["strategy"]))


def paired(cells: Sequence[Cell]) -> dict[str, dict[str, PairedTest]]:
    """Per cell name and attack, its difference from `none` at the same seed; nothing where that is not there."""
    reference = {cell["seed"]: _report(cell) for cell in cells if cell["strategy"] == "none"}
    return {
        cell["name"]: {
            attack: compare(_report(cell), reference[cell["seed"]], attack=attack) for attack in _attacks(cell)
        }
        for cell in cells
        if cell["strategy"] != "none" and cell["seed"] in reference
    }


def summarise(cells: Sequence[Cell]) -> str:
    """Both tables and what has to be read with them, as Markdown."""
    if not cells:
        return "no cells yet"
    differences = paired(cells)
    parts = [PREAMBLE, _setting(cells[0])]
    parts.append(f"Mean over the seeds (lowest to highest):\n\n{_by_strategy(cells, differences)}")
    parts.append(
        "Every cell. Differences are paired, in points, against `none` at the same seed, with 95 % intervals and the "
        f"p-value of the exact McNemar test:\n\n{_by_cell(cells, differences)}"
    )
    parts.append(_warnings(cells))
    parts.append(provenance(cells[0]))
    return "\n\n".join(part for part in parts if part)


def write_summary(directory: Path, cells: Sequence[Cell]) -> None:
    """Write README.md and summary.json beside the cells; nothing where there are none."""
    if not cells:
        return
    write_text(directory / "README.md", readme(cells))
    differences = {
        name: {attack: _test_json(test) for attack, test in tests.items()} for name, tests in paired(cells).items()
    }
    value = {"format": FORMAT, "benchmark": "cifar10_cpu", "cells": [c["name"] for c in cells]}
    write_json(directory / "summary.json", value | {"differences_from_none": differences})


def readme(cells: Sequence[Cell]) -> str:
    """The text of README.md."""
    title = "# Strategies on small JPEG images\n\nWritten by `benchmarks/cifar10_cpu.py`; change nothing by hand."
    return f"{title}\n\n{summarise(cells)}\n"


def _report(cell: Cell) -> RobustReport:
    return RobustReport.from_json(cell["results"]["report"])


def _attacks(cell: Cell) -> list[str]:
    return [result["name"] for result in cell["results"]["report"]["attacks"]]


def _setting(cell: Cell) -> str:
    s, report = cell["settings"], _report(cell)
    data, model, costs = s["data"], s["model"], cell["results"]["before"]
    kwargs = ", ".join(f"{key}={model['kwargs'][key]}" for key in ("width", "stem_stride") if key in model["kwargs"])
    suites = [f"AutoAttack {r.suite} on the first {r.n}" for r in report.attacks if r.name == "autoattack"]
    limits = ", ".join(f"{key} <= {value:g} x reference" for key, value in s["budget"].items())
    return (
        f"{model['name']} ({kwargs}; {human(costs['macs'])} MACs, {human(costs['params'])} parameters), "
        f"budget {limits}; "
        f"{data['name']}: {data['train']} training, {data['val']} validation, {data['test']} test images (sha256 "
        f"{data['sha256'][:12]}); {ThreatModel.from_json(s['threat']).label()}; {s['objective']['name']} with "
        f"{s['objective']['steps']} steps; {s['epochs']:g} epochs of batch {s['recipe']['batch_size']}, peak learning "
        f"rate {s['recipe']['lr']:g}, averaged weights; clean and PGD-20 on {report.n} test images"
        + "".join(f", {suite}" for suite in suites)
        + "."
    )


def _by_strategy(cells: Sequence[Cell], differences: Mapping[str, Mapping[str, PairedTest]]) -> str:
    attacks = _attacks(cells[0])
    head = ["strategy", "seeds", "MMACs", "k params"]
    for attack in attacks:
        head += [f"{attack} %", "against none"]
    head += ["training s", "training TMACs"]
    rows = []
    for strategy in dict.fromkeys(cell["strategy"] for cell in cells):
        mine = [cell for cell in cells if cell["strategy"] == strategy]
        after = [cell["results"]["after"] for cell in mine]
        row = [strategy, str(len(mine)), _spread([a["macs"] / 1e6 for a in after], "{:.2f}")]
        row.append(_spread([a["params"] / 1e3 for a in after], "{:.1f}"))
        for attack in attacks:
            row.append(_spread([100 * _report(cell).result(attack).accuracy for cell in mine], "{:.1f}"))
            points = [100 * differences[c["name"]][attack].difference for c in mine if c["name"] in differences]
            row.append(_spread(points, "{:+.1f}") if points else "")
        training = [cell["results"]["training"] for cell in mine]
        row.append(_spread([t["seconds"] for t in training], "{:.0f}"))
        row.append(_spread([t["macs"] / 1e12 for t in training], "{:.1f}"))
        rows.append(row)
    return table(head, rows)


def _by_cell(cells: Sequence[Cell], differences: Mapping[str, Mapping[str, PairedTest]]) -> str:
    attacks = _attacks(cells[0])
    head = ["strategy", "seed"]
    for attack in attacks:
        head += [f"{attack} %", "difference"]
    head += ["MACs ratio", "params ratio", "training s", "images/s"]
    rows = []
    for cell in cells:
        results, report = cell["results"], _report(cell)
        row = [cell["strategy"], str(cell["seed"])]
        for attack in attacks:
            found = report.result(attack)
            row.append(f"{100 * found.accuracy:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]")
            test = differences.get(cell["name"], {}).get(attack)
            row.append(
                f"{100 * test.difference:+.1f} [{100 * test.low:+.1f}, {100 * test.high:+.1f}] p={test.p_value:.2g}"
                if test
                else ""
            )
        row += [f"{results['after'][key] / results['before'][key]:.3f}" for key in ("macs", "params")]
        row += [f"{results['training']['seconds']:.0f}", f"{results['training']['images_per_s']:.0f}"]
        rows.append(row)
    return table(head, rows)


def _warnings(cells: Sequence[Cell]) -> str:
    lines = [f"- {cell['name']}: {warning}" for cell in cells for warning in cell["results"]["report"]["warnings"]]
    missed = [f"- {cell['name']}: over its budget" for cell in cells if not cell["results"]["meets_budget"]]
    return "\n".join(["To be read with care:", "", *lines, *missed]) if lines or missed else ""


def _spread(values: Sequence[float], form: str) -> str:
    mean, low, high = (form.format(f(values)) for f in (statistics.fmean, min, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def _test_json(test: PairedTest) -> dict[str, float]:
    keys = ("difference", "low", "high", "p_value", "n", "only_a", "only_b")
    return {key: getattr(test, key) for key in keys}
