"""Strategies compared on real images, small enough for two CPU cores: accuracy under attack at the same budget.

The images are CIFAR-10 re-encoded as JPEG, a few thousand of them, and the network is narrow: good for comparing
strategies with each other on the same data; absolute accuracies are NOT comparable with published CIFAR-10 numbers.

Every cell, one strategy at one seed, is a JSON file of its own, written when the cell is finished. A second call skips
the cells that are there with the same settings, so a killed run goes on where it was, and several processes may work
on different seeds. Within a seed all strategies start from the same reference weights. Data, validation split and test
images are the same for all cells (`--data-seed`). Selection looks at the validation split alone; the test images give
the final figures: clean, PGD-20, and AutoAttack (standard) on the same first images for every cell, with 95 % Wilson
intervals, and paired differences (exact McNemar test) from `none` at the same seed.

Training cost is also given in multiply-adds: a forward pass is the network's MACs at that moment, and so are the
gradient to the images and the gradient to the weights, each. A training step on B images with K attack steps therefore
counts B x MACs x (2 K + 3), and 1/10 for the clean look every tenth step; PGD-10 on the validation split and on the
images that grape scores are counted too. See `training_macs`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar10_summary import read_cells, summarise, write_summary
from benchmarks.common import RESULTS, make_parser, positive, record, threads, write_json
from robustcompress import Budget, CompressResult, Recipe, StructuralEditor, ThreatModel, build_model, compress
from robustcompress.data import DataSplits, load_data
from robustcompress.errors import RobustCompressError
from robustcompress.robust import PGDAT, AutoAttackConfig, evaluate
from robustcompress.strategies import Grape, Hydra, Magnitude, Reference, Strategy
from robustcompress.train.loop import CLEAN_EVERY

MODULE = "cifar10_cpu"
STRATEGIES: Mapping[str, Strategy] = {
    "none": Reference(),
    "magnitude": Magnitude(),
    "hydra": Hydra(),
    "grape": Grape(),
    "grape-uniform": Grape(order="uniform"),
    "grape-random": Grape(order="random"),
    "grape-sequential": Grape(order="sequential"),
}
DEFAULT = ("none", "magnitude", "hydra", "grape")
PROBE_STEPS = 10
"""PGD steps that `Session.validate` and `Session.attacked` take."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.quick:
        _make_quick(options)
    out = options.out or RESULTS / MODULE
    try:
        if not options.summary_only:
            with threads(options.threads):
                _run(options, argv, out)
        cells = read_cells(out)
        write_summary(out, cells)
        print(summarise(cells))
    except RobustCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, argv: Sequence[str], out: Path) -> None:
    if options.data is None and not options.quick:
        raise SystemExit("--data DIR is needed: a directory with train/ and test/, a folder per class in each")
    data = load_data(options.data, train_limit=options.train, test_limit=options.test, seed=options.data_seed)
    wanted = [(seed, name) for seed in options.seeds for name in options.strategies]
    plan = {(seed, name): settings_of(options, data, seed, name) for seed, name in wanted}
    done = {cell["name"]: cell["settings"] for cell in read_cells(out, same=False)}
    other = [f"{name}-s{seed}" for (seed, name), ours in plan.items() if done.get(f"{name}-s{seed}", ours) != ours]
    if other and not options.overwrite:
        raise SystemExit(
            f"{', '.join(other)}: results with other settings are there; choose another --out, or pass --overwrite"
        )
    for (seed, name), settings in plan.items():
        cell = f"{name}-s{seed}"
        if done.get(cell) == settings:
            print(f"{cell}: there already", file=sys.stderr, flush=True)
            continue
        start = time.perf_counter()
        results = run_cell(options, data, seed, name)
        value = record(MODULE, options, argv, results, data=settings["data"])
        write_json(out / f"{cell}.json", value | {"name": cell, "seed": seed, "strategy": name, "settings": settings})
        print(f"{cell}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def settings_of(options: argparse.Namespace, data: DataSplits, seed: int, name: str) -> dict[str, Any]:
    """All that a cell's result depends on, as plain JSON: two cells with equal settings are the same cell."""
    spec = _reference(options, data, seed)[1]
    return {
        "data": {
            # The last part only: where the directory lies is nobody's business.
            "name": Path(data.name).name,
            "sha256": data.sha256,
            "train": len(data.train),
            "val": len(data.val),
            "test": len(data.test),
        },
        "model": spec.to_json(),
        "strategy": STRATEGIES[name].to_json(),
        "budget": Budget(macs=options.macs).to_json(),
        "threat": _threat(options).to_json(),
        "objective": _objective(options).to_json(),
        "recipe": _recipe(options).to_json(),
        "epochs": options.epochs,
        "round_to": options.round_to,
        "seed": seed,
        "attacks": list(_attacks(options)),
        "autoattack_images": options.autoattack_images,
        "quick": options.quick,
    }


def run_cell(options: argparse.Namespace, data: DataSplits, seed: int, name: str) -> dict[str, Any]:
    """Compress, then attack the test images."""
    model, _ = _reference(options, data, seed)
    start = time.perf_counter()
    result = compress(
        model,
        STRATEGIES[name],
        data=data,
        budget=Budget(macs=options.macs),
        threat=_threat(options),
        objective=_objective(options),
        epochs=options.epochs,
        recipe=_recipe(options),
        round_to=options.round_to,
        attacks=(),
        seed=seed,
        device="cpu",
        progress=not options.quiet,
    )
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    report = evaluate(
        result.model,
        data.test,
        _threat(options),
        attacks=_attacks(options),
        device="cpu",
        autoattack_images=options.autoattack_images or None,
        autoattack_config=_quick_autoattack() if options.quick else None,
    )
    return {
        "before": result.before.to_json(),
        "after": result.after.to_json(),
        "meets_budget": result.meets_budget,
        "widths": StructuralEditor(result.model, torch.zeros(2, *result.image_shape)).widths,
        "training": training_cost(options, data, result) | {"seconds": round(seconds, 2)},
        "evaluation_seconds": round(time.perf_counter() - start, 2),
        "report": report.to_json(),
        "history": [dict(entry) for entry in result.history],
    }


def training_cost(options: argparse.Namespace, data: DataSplits, result: CompressResult) -> dict[str, Any]:
    """Images trained on, how many a second (attacks included, validation not), and multiply-adds of the whole run."""
    batch = min(options.batch_size, len(data.train))
    images = seconds = 0.0
    for entry, steps in _epochs(result.history):
        images += steps * batch
        seconds += steps * batch / entry["images_per_s"]
    probes = min(_recipe(options).val_images, len(data.val))
    scored = result.strategy.get("score_batches", 0) * batch
    macs = training_macs(result.history, batch=batch, attack_steps=options.attack_steps, probes=probes, scored=scored)
    return {"images": int(images), "images_per_s": round(images / seconds, 2), "macs": macs}


def training_macs(
    history: Sequence[Mapping[str, Any]], *, batch: int, attack_steps: int, probes: int, scored: int
) -> int:
    """Multiply-adds that a run spent, by the rule in this file's header.

    Args:
        history: The run's records.
        batch: Images a training step.
        attack_steps: PGD steps of the objective.
        probes: Validation images that a selecting epoch attacks with PGD-10, at two forward passes more.
        scored: Training images that a scoring growth event attacks with PGD-10, at one forward and one gradient more.
    """
    total = macs = 0.0
    steps_of = {id(entry): steps for entry, steps in _epochs(history)}
    for entry in history:
        if id(entry) in steps_of:
            macs = entry["macs"]
            total += steps_of[id(entry)] * batch * macs * (2 * attack_steps + 3 + 1 / CLEAN_EVERY)
        if "val_robust" in entry:
            total += probes * macs * (2 * PROBE_STEPS + 2)
        if entry.get("scores"):  # made before the network grew, so at the MACs of the epoch before
            total += scored * macs * (2 * PROBE_STEPS + 2)
    return round(total)


def _epochs(history: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], int]]:
    """The records of epochs with the steps of each; the history counts them from the start of a phase."""
    found, phase, before = [], None, 0
    for entry in history:
        if "steps" in entry:
            before = before if entry["phase"] == phase else 0
            found.append((entry, entry["steps"] - before))
            phase, before = entry["phase"], entry["steps"]
    return found


def _reference(options: argparse.Namespace, data: DataSplits, seed: int) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(seed)  # before the weights are drawn, so that all strategies of a seed begin alike
    return build_model(
        options.model, num_classes=data.num_classes, width=options.width, stem_stride=options.stem_stride
    )


def _threat(options: argparse.Namespace) -> ThreatModel:
    return ThreatModel("linf", options.eps / 255)


def _objective(options: argparse.Namespace) -> PGDAT:
    step_size = None if options.step_size is None else options.step_size / 255
    return PGDAT(steps=options.attack_steps, step_size=step_size)


def _recipe(options: argparse.Namespace) -> Recipe:
    return Recipe(batch_size=options.batch_size, lr=options.lr)


def _attacks(options: argparse.Namespace) -> tuple[str, ...]:
    return ("clean", "pgd-20", "autoattack") if options.autoattack_images else ("clean", "pgd-20")


def _quick_autoattack() -> AutoAttackConfig:
    return AutoAttackConfig(apgd_iterations=2, fab_iterations=2, square_queries=5, target_classes=2)


def _make_quick(options: argparse.Namespace) -> None:
    if options.out is None:
        raise SystemExit("--quick gives no figure worth keeping: say --out DIR, so that no committed result is lost")
    options.model, options.width, options.epochs, options.attack_steps = "vgg16_bn", 0.125, 1.0, 1
    options.train, options.test, options.autoattack_images, options.batch_size = 80, 16, 4, 32
    options.quiet = True


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        MODULE, __doc__, example="python -m benchmarks.cifar10_cpu --data data/cifar10 --seeds 0 1 2 --epochs 20"
    )
    add = parser.add_argument
    add("--data", help="directory with train/ and test/, a folder of images per class in each")
    add("--out", type=Path, help=f"directory of the cells (default: benchmarks/results/{MODULE})")
    add("--strategies", nargs="+", choices=STRATEGIES, default=list(DEFAULT), help=f"default: {' '.join(DEFAULT)}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2 (--seed is not used here)")
    add("--data-seed", type=int, default=0, help="draws the subsets and the validation split (default: %(default)s)")
    add("--model", default="resnet8", help="a built-in network (default: %(default)s)")
    add("--width", type=float, default=1.0, help="multiplier of its channels (default: %(default)s)")
    add("--stem-stride", type=positive, default=1, help="2 makes it four times as cheap (default: %(default)s)")
    add("--macs", type=float, default=0.5, help="budget, as a fraction of the reference (default: %(default)s)")
    add("--round-to", type=positive, help="multiple of which widths are (default: compress()'s own)")
    add("--epochs", type=float, default=20.0, help="passes over the training images (default: %(default)s)")
    add("--attack-steps", type=positive, default=4, help="PGD steps of training (default: %(default)s)")
    add("--step-size", type=float, help="of PGD in training, in 1/255 (default: a quarter of eps)")
    add("--eps", type=float, default=8.0, help="linf radius in 1/255 (default: %(default)s)")
    add("--batch-size", type=positive, default=128, help="default: %(default)s")
    add("--lr", type=float, default=0.1, help="peak learning rate (default: %(default)s)")
    add("--train", type=positive, default=4000, help="training images, a tenth for validation (default: %(default)s)")
    add("--test", type=positive, default=1000, help="test images for clean and PGD-20 (default: %(default)s)")
    add(
        "--autoattack-images", type=int, default=200, help="how many of those for AutoAttack, 0 for none (default: 200)"
    )
    add("--overwrite", action="store_true", help="replace cells that were made with other settings")
    add("--summary-only", action="store_true", help="only write the tables anew from the cells that are there")
    add("--quiet", action="store_true", help="no progress")
    return parser


if __name__ == "__main__":
    sys.exit(main())
