"""Do regularisers and semantic targets make adversarial training better, milder, or only look so?

Each row trains the same resnet8 on the digits, at linf 0.1, from the same first weights and with the same images in the
same order; only the objective differs. Options are the defaults: nothing was tuned, on these images or others. "against
pgd-at" is the paired difference. Intervals cover seeds and test images (see intervals.py).

"distance" is the mean distance of mistakes in the digits' tree of shapes, "aimed" what an attack of 20 steps finds that
aims each image at a class farthest from its own: accuracy, and mean distance.

Shapes are no semantics, so `--root` asks the same of `semantic-at` on 8,000 photos of CIFAR-10 at linf 8/255, with the
tree of animals and vehicles that the package ships, and of `semantic-at` with a target for every other image only
("share=0.5"), the others being attacked as by `pgd-at`. It writes a file of its own.

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
from dataclasses import dataclass
from pathlib import Path
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
from robustcompress import DataSplits, ModelSpec, Recipe, ThreatModel, compress, evaluate, load_data
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
PHOTOS = "regularisers_cifar10"
BASE = "pgd-at"
Options = Mapping[str, Any]
OBJECTIVES: Mapping[str, Options] = {
    BASE: {},
    "pgd-at+jacobian": {},
    "pgd-at+separability": {},
    "pgd-at+boundary": {},
    "semantic-at": {"hierarchy": "digits"},
}
ON_PHOTOS: Mapping[str, Options] = {
    BASE: {},
    "semantic-at": {"hierarchy": "cifar10"},
    "semantic-at, share=0.5": {"hierarchy": "cifar10", "share": 0.5},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is trained on, and how.

    Attributes:
        name: The data's; the hierarchy's too.
        data: The images.
        model: The network.
        threat: In training, and in the attacks.
        objectives: Options by the row's name, which begins with the objective's.
        training: What all objectives of training share.
        epochs: Passes over the training images, unless asked for otherwise.
        recipe: How it is trained.
    """

    name: str
    data: DataSplits
    model: ModelSpec
    threat: ThreatModel
    objectives: Mapping[str, Options]
    training: Options
    epochs: float
    recipe: Recipe | None = None


def digits() -> Task:
    """Drawn digits of 8 x 8."""
    return Task(
        name="digits",
        data=load_data("digits"),
        model=ModelSpec("resnet8", {"stem_stride": 4}),
        threat=ThreatModel("linf", 0.1),
        objectives=OBJECTIVES,
        training={"steps": 3},
        epochs=20,
    )


def photos(root: Path, *, quick: bool = False) -> Task:
    """A part of CIFAR-10, from a directory of images."""
    train, test = (200, 20) if quick else (8000, 1000)
    return Task(
        name="cifar10",
        data=load_data(str(root), train_limit=train, test_limit=test),
        model=ModelSpec("resnet8", {"stem_stride": 2}),
        threat=ThreatModel("linf", 8 / 255),
        objectives=ON_PHOTOS,
        training={"steps": 2, "step_size": 5 / 255},
        epochs=15,
        recipe=Recipe(batch_size=64),
    )


WIDE = ThreatModel("linf", 0.5)
ATTACKS = ("fgsm", "pgd-20", "pgd-100", "pgd-20-margin")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    module = MODULE if options.root is None else PHOTOS
    path = out_path(options, module)
    task = digits() if options.root is None else photos(options.root, quick=options.quick)
    if options.quick:
        options.epochs, options.seeds, options.images, options.autoattack_images = 0.2, 1, 8, 1
    settings = {
        "epochs": task.epochs if options.epochs is None else options.epochs,
        "images": min(options.images or len(task.data.test.labels), len(task.data.test.labels)),
        "autoattack_images": options.autoattack_images,
    }
    cells = _kept(path, settings) if not options.quick else []
    with threads(options.threads):
        for seed in range(options.seed, options.seed + options.seeds):
            for name in task.objectives:
                if any((cell["objective"], cell["seed"]) == (name, seed) for cell in cells):
                    continue
                judged = not options.quick and seed - options.seed < options.autoattack_seeds
                cells.append(run(task, name, seed, autoattack=judged, **settings))
                _write(path, module, options, argv, {"settings": settings, "cells": cells}, task)
                print(f"{name}, seed {seed}: {cells[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    _write(path, module, options, argv, {"settings": settings, "cells": cells}, task)
    print(markdown(read_json(path)))
    return 0


def _write(
    path: Path,
    module: str,
    options: argparse.Namespace,
    argv: Sequence[str],
    results: Mapping[str, Any],
    task: Task,
) -> None:
    data = {"name": task.name, "train": len(task.data.train.labels), "sha256": task.data.sha256}
    told = {**results, "training": dict(task.training)}
    write_json(path, record(MODULE, options, argv, told, data=data) | {"benchmark": module})


def run(
    task: Task, name: str, seed: int, *, epochs: float, images: int, autoattack_images: int, autoattack: bool = True
) -> dict[str, Any]:
    """Train with an objective, attack what came of it."""
    start = time.perf_counter()
    data = task.data
    tree = hierarchy_from(task.name).ordered(data.classes)
    objective = objective_from_name(name.split(",")[0], **task.training, **task.objectives[name])
    result = compress(
        task.model,
        "none",
        data=data,
        threat=task.threat,
        objective=objective,
        epochs=epochs,
        recipe=task.recipe,
        attacks=(),
        seed=seed,
        progress=False,
    )
    report = evaluate(
        result.model,
        data.test,
        task.threat,
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
        x_adv = aim.attack(result.model, x, labels, task.threat, generator=torch.Generator().manual_seed(0))
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
    judged = [r.robust_accuracy is not None for rows in reports.values() for r in rows]
    compared = ("pgd-20", "autoattack") if all(judged) else ("pgd-20",)
    against = {
        attack: pooled(
            [[d.mean().item() for d in _differences(reports, name, attack)] for name in reports if name != BASE]
        )
        for attack in compared
    }
    rows, doubts = [], []
    for name, found in reports.items():
        cells = by_name[name]
        cases = [
            estimate([r.result(a).correct.double() for r in found], noise=noise[a]).points(signed=False) for a in noise
        ]
        differences = [
            "-"
            if name == BASE
            else estimate(_differences(reports, name, attack), low=-1, noise=noise_of).points(signed=True)
            for attack, noise_of in against.items()
        ]
        aimed = [Severity.from_json(cell["aimed"]["mistakes"]) for cell in cells]
        rows.append(
            (
                name,
                *cases,
                _under_autoattack(found),
                *differences,
                _mean([r.result("pgd-20").severity for r in found]),
                f"{100 * statistics.fmean(cell['aimed']['accuracy'] for cell in cells):.1f}, {_mean(aimed)}",
            )
        )
        doubts.append(_doubts(name, found, cells))
    beside = {"pgd-20": "PGD-20 against pgd-at", "autoattack": "AutoAttack against pgd-at"}
    first = (
        *("objective", "clean %", "PGD-20 %", "AutoAttack %"),
        *(beside[attack] for attack in compared),
        *("distance", "aimed %, distance"),
    )
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
    said += f"{value['results']['training']['steps']} attack steps in training; "
    said += f"a mistake at random is {one.hierarchy.chance:.2f} away.\n\n"
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


def _differences(reports: Mapping[str, Sequence[RobustReport]], name: str, attack: str) -> list[torch.Tensor]:
    """For each seed, by image: right under an attack with this objective minus right with the base."""
    pairs = zip(reports[name], reports[BASE], strict=False)
    return [a.result(attack).correct.double() - b.result(attack).correct.double() for a, b in pairs]


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
    add("--root", type=Path, metavar="DIR", help="CIFAR-10 as train/ and test/ with a folder of images per class")
    add("--epochs", type=float, metavar="F", help="(default: 20 on digits, 15 on photos)")
    add("--images", type=positive, metavar="N", help="test images (default: all, 359 digits or 1000 photos)")
    add("--autoattack-seeds", type=positive, default=3, metavar="N", help="how many of them AutoAttack judges")
    add("--autoattack-images", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
