"""Does the guard cure catastrophic overfitting, and does it leave alone what needs no cure?

The same small network is trained on a part of the embedded digits, unaugmented, by FGSM-RS at a small constant rate.
"provoked": a radius of 0.25 and steps three times as long, where single-step training collapses.
"mild": a radius of 0.15 and the usual steps, where it does not. Each is run
  off     without the guard
  on      with it, as by default
  pgd-2   on two steps of half the radius from the beginning, which is what the guard goes on with
for several seeds of weights and images. Accuracies are those of the last epoch's own weights (no average, no choice of
an epoch) on the test images, clean and under PGD-20. "epochs lost" are those that the guard undid.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.common import add_out, make_parser, out_path, positive, provenance, record, table, threads, write_json
from robustcompress import Budget, DataSplits, Recipe, StructuralEditor, ThreatModel, build_model, load_data, measure
from robustcompress.data import Batches
from robustcompress.goal import Goal
from robustcompress.robust import FGSMRS, PGDAT, Objective
from robustcompress.robust.probe import accuracies
from robustcompress.session import Session

MODULE = "overfitting"
SIZE = 16
SETTINGS: Mapping[str, tuple[float, float]] = {"provoked": (0.25, 3.0), "mild": (0.15, 1.25)}
"""Radius, and length of a single step in units of it."""
ARMS = ("off", "on", "pgd-2")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.seeds, options.epochs, options.images, options.test_images = 1, 1, 64, 20
    data = load_data("digits", image_size=SIZE, train_limit=options.images, test_limit=options.test_images)
    results = []
    with threads(options.threads):
        for setting in SETTINGS:
            for seed in range(options.seed, options.seed + options.seeds):
                for arm in ARMS:
                    row = run(data, setting, arm, epochs=options.epochs, seed=seed)
                    results.append(row)
                    print(f"{setting}, seed {seed}, {arm}: PGD-20 {row['pgd']:.3f}", file=sys.stderr, flush=True)
    value = record(MODULE, options, argv, results, data={"name": data.name, "sha256": data.sha256})
    write_json(path, value)
    print(markdown(value))
    return 0


def run(data: DataSplits, setting: str, arm: str, *, epochs: float, seed: int) -> dict[str, Any]:
    """Train one network, and attack it."""
    eps, scale = SETTINGS[setting]
    threat = ThreatModel("linf", eps)
    objective: Objective = PGDAT(steps=2, step_size=eps / 2) if arm == "pgd-2" else FGSMRS(step_scale=scale)
    torch.manual_seed(seed)
    model, _ = build_model("resnet8", num_classes=10)
    guard = {} if arm == "on" else {"guard": 0}
    recipe = Recipe(lr=0.02, batch_size=64, augment="none", weight_decay=0.0, ema=0.0, **guard)
    example = torch.zeros(2, *data.image_shape)
    goal = Goal(
        data=data,
        threat=threat,
        objective=objective,
        budget=Budget(macs=1.0),
        reference=measure(model, example),
        epochs=epochs,
        recipe=recipe,
        seed=seed,
        pretrained=False,
        round_to=1,
    )
    session = Session(model, StructuralEditor(model, example), example, goal)
    session.train("train", share=1.0, schedule="constant")
    batches = Batches(data.test, 256)
    clean, pgd = accuracies(model, batches, threat, steps=20, generator=torch.Generator().manual_seed(seed))
    return {
        "setting": setting,
        "arm": arm,
        "seed": seed,
        "eps": eps,
        "step_scale": scale,
        "epochs": epochs,
        "images": len(data.train),
        "test_images": len(data.test),
        "clean": clean,
        "pgd": pgd,
        "lost": [entry["epoch"] for entry in session.history if entry.get("collapsed")],
        "history": [
            {key: entry[key] for key in ("guard_single", "guard_pgd", "attack_steps")}
            for entry in session.history
            if arm == "on"
        ],
    }


def markdown(value: Mapping[str, Any]) -> str:
    """The table: PGD accuracies of every seed, since they are either something or nothing."""
    head = ("setting", "eps", "guard", "clean %", "PGD-20 %, seed by seed", "mean", "epochs lost")
    rows = []
    for setting in dict.fromkeys(row["setting"] for row in value["results"]):
        for arm in ARMS:
            cells = [row for row in value["results"] if (row["setting"], row["arm"]) == (setting, arm)]
            if not cells:
                continue
            rows.append(
                (
                    setting,
                    f"{cells[0]['eps']:g}",
                    arm,
                    f"{100 * statistics.mean(cell['clean'] for cell in cells):.0f}",
                    " ".join(f"{100 * cell['pgd']:.0f}" for cell in cells),
                    f"{100 * statistics.mean(cell['pgd'] for cell in cells):.1f}",
                    f"{statistics.mean(len(cell['lost']) for cell in cells):.1f}" if arm == "on" else "",
                )
            )
    first = value["results"][0]
    note = f"{first['images']} training images, {first['test_images']} test images, {first['epochs']:g} epochs."
    return f"{table(head, rows)}\n\n{note}\n\n{provenance(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.overfitting --seeds 2")
    add_out(parser, MODULE)
    parser.add_argument("--seeds", type=positive, default=2, help="how many, from --seed on (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=30, help="of each run (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=512, help="to train on (default: %(default)s)")
    parser.add_argument("--test-images", type=positive, default=400, help="to attack (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
