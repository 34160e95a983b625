"""Do regularisers and semantic targets make adversarial training better, milder, or only look so?

Each row trains the same resnet8 on the digits, at linf 0.1, from the same first weights and with the same images in the
same order; only the objective differs. Options are the defaults: nothing was tuned, on these images or others. "against
pgd-at" is the paired difference under PGD-20. Intervals cover seeds and test images (see intervals.py).

"distance" is the mean distance of mistakes in the digits' tree of shapes, "aimed" what an attack of 20 steps finds that
aims each image at a class farthest from its own: accuracy, and mean distance.

The columns of the second table look for masked gradients: if an objective only made gradients useless, PGD would do
clearly worse than AutoAttack on the same images, more steps would not help, Square (which sees no gradient) would break
what gradients do not, or an attack without bounds (linf 0.5, which reaches grey from everywhere) would leave images
right.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.common import (
    FORMAT,
    add_out,
    make_parser,
    out_path,
    positive,
    provenance,
    read_json,
    record,
    table,
    threads,
    write_json,
)
from benchmarks.intervals import estimate, pooled
from robustcompress import ModelSpec, ThreatModel, compress, evaluate, load_data
from robustcompress.robust import (
    RobustReport,
    SemanticAT,
    Severity,
    eval_mode,
    hierarchy_from,
    objective_from_name,
    wilson,
)

MODULE = "regularisers"
BASE = "pgd-at"
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    BASE: {},
    "pgd-at+jacobian": {},
    "pgd-at+separability": {},
    "pgd-at+boundary": {},
    "semantic-at": {"hierarchy": "digits"},
}
MODEL = ModelSpec("resnet8", {"stem_stride": 4})
THREAT = ThreatModel("linf", 0.1)
WIDE = ThreatModel("linf", 0.5)
STEPS = 3
ATTACKS = ("fgsm", "pgd-20", "pgd-100", "pgd-20-margin")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.epochs, options.seeds, options.images, options.autoattack_images = 0.2, 1, 8, 1
    settings = {key: getattr(options, key) for key in ("epochs", "images", "autoattack_images")}
    cells = _kept(path, settings) if not options.quick else []
    with threads(options.threads):
        for seed in range(options.seed, options.seed + options.seeds):
            for name in OBJECTIVES:
                if any((cell["objective"], cell["seed"]) == (name, seed) for cell in cells):
                    continue
                judged = not options.quick and seed - options.seed < options.autoattack_seeds
                cells.append(run(name, seed, autoattack=judged, **settings))
                results = {"settings": settings, "cells": cells}
                value = record(MODULE, options, argv, results, data={"name": "digits"})
                write_json(path, value)
                print(f"{name}, seed {seed}: {cells[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(markdown(read_json(path)))
    return 0


def run(
    name: str, seed: int, *, epochs: float, images: int, autoattack_images: int, autoattack: bool = True
) -> dict[str, Any]:
    """Train with an objective, attack what came of it."""
    start = time.perf_counter()
    data = load_data("digits")
    tree = hierarchy_from("digits")
    objective = objective_from_name(name, steps=STEPS, **OBJECTIVES[name])
    result = compress(
        MODEL,
        "none",
        data=data,
        threat=THREAT,
        objective=objective,
        epochs=epochs,
        attacks=(),
        seed=seed,
        progress=False,
    )
    report = evaluate(
        result.model,
        data.test,
        THREAT,
        attacks=(*ATTACKS, "autoattack") if autoattack else ATTACKS,
        max_images=images,
        autoattack_images=autoattack_images if autoattack else None,
        hierarchy=tree,
    )
    wide = evaluate(result.model, data.test, WIDE, attacks=("clean", "pgd-20"), max_images=images)
    pixels, labels = data.test.pixels[report.indices], data.test.labels[report.indices].long()
    x = pixels.float() / 255
    aim = SemanticAT(hierarchy=tree, steps=20)
    with eval_mode(result.model):
        x_adv = aim.attack(result.model, x, labels, THREAT, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            predicted = result.model(x_adv).argmax(1)
    return {
        "objective": name,
        "options": objective.to_json(),
        "seed": seed,
        "report": report.to_json(),
        "wide": wide.result("pgd-20").accuracy,
        "aimed": {
            "accuracy": float((predicted == labels).float().mean()),
            "mistakes": Severity.of(tree.distances, labels, predicted).to_json(),
        },
        "seconds": round(time.perf_counter() - start, 1),
    }


def markdown(value: Mapping[str, Any]) -> str:
    """Two tables: what each objective gives, and whether its gradients can be trusted."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for cell in value["results"]["cells"]:
        by_name.setdefault(cell["objective"], []).append(cell)
    reports = {name: [RobustReport.from_json(c["report"]) for c in cells] for name, cells in by_name.items()}
    noise = {
        a: pooled([[r.result(a).accuracy for r in rows] for rows in reports.values()]) for a in ("clean", "pgd-20")
    }
    against = pooled([[d.mean().item() for d in _differences(reports, name)] for name in reports if name != BASE])
    rows, doubts = [], []
    for name, found in reports.items():
        cells = by_name[name]
        cases = [
            estimate([r.result(a).correct.double() for r in found], noise=noise[a]).points(signed=False) for a in noise
        ]
        pairs = _differences(reports, name)
        difference = "-" if name == BASE else estimate(pairs, low=-1, noise=against).points(signed=True)
        aimed = [Severity.from_json(cell["aimed"]["mistakes"]) for cell in cells]
        rows.append(
            (
                name,
                *cases,
                _under_autoattack(found),
                difference,
                _mean([r.result("pgd-20").severity for r in found]),
                f"{100 * statistics.fmean(cell['aimed']['accuracy'] for cell in cells):.1f}, {_mean(aimed)}",
            )
        )
        doubts.append(_doubts(name, found, cells))
    first = ("objective", "clean %", "PGD-20 %", "AutoAttack %", "against pgd-at", "distance", "aimed %, distance")
    second = (
        *("objective", "FGSM %", "PGD-20 %", "PGD-100 %", "PGD-20 margin %"),
        *("PGD-20 over AutoAttack", "Square first", "linf 0.5 %", "flags"),
    )
    return f"{table(first, rows)}\n\n{table(second, doubts)}\n\n{_about(value, reports)}{provenance(value)}"


def _doubts(name: str, found: Sequence[RobustReport], cells: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    shares = [f"{100 * statistics.fmean(r.result(attack).accuracy for r in found):.1f}" for attack in ATTACKS]
    judged = [r for r in found if r.robust_accuracy is not None]
    gap = square = "-"
    if judged:
        n = sum(r.result("autoattack").n for r in judged)
        standing = sum(int(r.result("pgd-20").correct[: r.result("autoattack").n].sum()) for r in judged)
        withstood = sum(int(r.result("autoattack").correct.sum()) for r in judged)
        gap = f"{100 * (standing - withstood) / n:+.1f}"
        square = f"{sum(r.result('autoattack').broken_by['square'] for r in judged)} of {n}"
    wide = f"{100 * statistics.fmean(cell['wide'] for cell in cells):.1f}"
    return (name, *shares, gap, square, wide, str(sum(len(r.warnings) for r in found)))


def _about(value: Mapping[str, Any], reports: Mapping[str, Sequence[RobustReport]]) -> str:
    """What the figures are of, and each reason to doubt them."""
    one = next(iter(reports.values()))[0]
    everything = [r for rows in reports.values() for r in rows]
    judged = [r.result("autoattack").n for r in everything if r.robust_accuracy is not None]
    first = sum(r.robust_accuracy is not None for r in next(iter(reports.values())))
    counted = f"AutoAttack: {max(judged)} images, {first} of the seeds" if judged else "no AutoAttack"
    seeds = max(len(rows) for rows in reports.values())
    assert one.hierarchy is not None
    said = f"{one.n} test images, {seeds} seeds ({counted}), {value['results']['settings']['epochs']:g} epochs, "
    said += f"{STEPS} attack steps in training; a mistake at random is {one.hierarchy.chance:.2f} away.\n\n"
    flags = [f"- {name}: {w}" for name, rows in reports.items() for r in rows for w in r.warnings]
    return said + ("\n".join(flags) + "\n\n" if flags else "")


def _under_autoattack(found: Sequence[RobustReport]) -> str:
    """Accuracy with an interval: of a single network Wilson's, which knows nothing of training."""
    flags = [r.result("autoattack").correct for r in found if r.robust_accuracy is not None]
    if not flags:
        return "-"
    if len(flags) > 1:
        return estimate([f.double() for f in flags]).points(signed=False)
    right, n = int(flags[0].sum()), len(flags[0])
    low, high = wilson(right, n)
    return f"{100 * right / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _differences(reports: Mapping[str, Sequence[RobustReport]], name: str) -> list[torch.Tensor]:
    """For each seed, by image: right under PGD-20 with this objective minus right with the base."""
    pairs = zip(reports[name], reports[BASE], strict=False)
    return [a.result("pgd-20").correct.double() - b.result("pgd-20").correct.double() for a, b in pairs]


def _mean(found: Sequence[Severity | None]) -> str:
    """The mean distance of all mistakes, and twice its standard error over the seeds."""
    means = [severity.mean for severity in found if severity is not None and severity.errors]
    if not means:
        return "-"
    spread = f" +- {2 * statistics.stdev(means) / len(means) ** 0.5:.2f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):.2f}{spread}"


def _kept(path: Any, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Cells of an earlier, stopped run with the same settings."""
    if not path.exists():
        return []
    value = read_json(path)
    assert value["format"] == FORMAT
    return list(value["results"]["cells"]) if value["results"]["settings"] == settings else []


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.regularisers --seeds 1")
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--seeds", type=positive, default=3, metavar="N", help="trainings of each (default: %(default)s)")
    add("--epochs", type=float, default=20, metavar="F", help="(default: %(default)s)")
    add("--images", type=positive, default=359, metavar="N", help="test images (default: all %(default)s)")
    add("--autoattack-seeds", type=positive, default=3, metavar="N", help="how many of them AutoAttack judges")
    add("--autoattack-images", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
