"""What can be proven of compressed networks: certified accuracy of HYDRA at half of the multiply-adds, and of no cut.

A small convolutional network without batch norms is trained on the digits for certificates, by HYDRA and without a cut:
by "smoothing" (sigma 1.0: 16 x 3 equal values stand for one pixel of the scan, and noise averages out over them), by
"ibp" and "crown-ibp" (linf 0.1), and by "natural" as the control. Of the smoothed networks the majority vote is
certified in l2; of the others the network itself in linf, by IBP and by CROWN-IBP, beside PGD-20 and AutoAttack on
the same images. With --keep finished cells are kept, and a stopped run goes on. No figure is a time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    add_out,
    kept_cell,
    make_parser,
    out_path,
    positive,
    provenance,
    record,
    table,
    threads,
    write_json,
)
from robustcompress import Budget, CompressResult, DataSplits, Recipe, ThreatModel, certify, compress, load_data
from robustcompress.robust import IBP, AutoAttackConfig, CrownIBP, Natural, Objective, Smoothing, evaluate

MODULE = "certified"
EPS, SIGMA = 0.1, 1.0
RADII = (0.0, 1.0, 2.0)
STRATEGIES = ("none", "hydra")
BOUNDS = ("clean", "ibp", "crown-ibp", "autoattack", "pgd-20")
QUICK = AutoAttackConfig(apgd_iterations=2, fab_iterations=1, square_queries=2, target_classes=1)
EXAMPLE = "python -m benchmarks.certified --keep runs/certified"


class Small(nn.Module):
    """Two convolutions and two linear layers, for the digits' 8x8 pixels shown at 32x32: images to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 4, stride=4)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(512, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, 3, 32, 32]` to logits `[N, 10]`."""
        x = torch.relu(self.conv2(torch.relu(self.conv1(x)))).flatten(1)
        logits: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return logits


def objectives() -> dict[str, Objective]:
    """What is trained for, by name."""
    made: tuple[Objective, ...] = (Smoothing(sigma=SIGMA), IBP(), CrownIBP(), Natural())
    return {objective.name: objective for objective in made}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.epochs, options.seeds, options.draws, options.images = 0.2, 1, 20, 4
    data = load_data("digits")
    cells = []
    with threads(options.threads):
        for seed in range(options.seed, options.seed + options.seeds):
            for name in objectives():
                cells += [_kept(options, data, name, strategy, seed) for strategy in STRATEGIES]
    results = {"epochs": options.epochs, "draws": options.draws, "eps": EPS, "sigma": SIGMA, "cells": cells}
    value = record(MODULE, options, argv, results, data={"name": data.name, "sha256": data.sha256})
    write_json(path, value)
    print(markdown(value))
    return 0


def run(options: argparse.Namespace, data: DataSplits, objective: str, strategy: str, seed: int) -> dict[str, Any]:
    """Train one network and say what is proven of it."""
    torch.manual_seed(seed)
    result = compress(
        Small(),
        strategy,
        data=data,
        budget=Budget(macs=0.5),
        threat=ThreatModel("linf", EPS),
        objective=objectives()[objective],
        epochs=options.epochs,
        recipe=Recipe(lr=0.003, optimizer="adamw", batch_size=64),
        attacks=(),
        seed=seed,
        progress=False,
    )
    cell: dict[str, Any] = {"objective": objective, "strategy": strategy, "seed": seed}
    cell |= {"macs": result.after.macs, "params": result.after.params}
    return cell | (_votes(options, result, data) if objective == "smoothing" else bounds(options, result, data))


def _votes(options: argparse.Namespace, result: CompressResult, data: DataSplits) -> dict[str, Any]:
    report = certify(result, data, sigma=SIGMA, n=options.draws, max_images=options.images, device="cpu")
    shares = {f"l2 {radius:g}": report.certified_accuracy(radius) for radius in RADII}
    return {"n": report.n, "smoothing": shares, "abstained": report.abstained, "mean_radius": report.mean_radius}


def bounds(options: argparse.Namespace, result: CompressResult, data: DataSplits) -> dict[str, Any]:
    """What is proven of a network, and what attacks leave of it."""
    found: dict[str, Any] = {}
    for method in ("ibp", "crown-ibp"):
        report = certify(result, data, method=method, eps=EPS, max_images=options.images, device="cpu")
        found[method] = report.certified_accuracy(EPS)
    attacked = evaluate(
        result.model,
        data.test,
        ThreatModel("linf", EPS),
        attacks=("pgd-20", "autoattack"),
        max_images=options.images,
        device="cpu",
        autoattack_config=QUICK if options.quick else None,
    )
    held = report.certified(EPS)
    for attack in attacked.attacks:
        assert not bool((held[: attack.n] & ~attack.correct).any()), "what is proven was broken"
    found |= {name: attacked.result(name).accuracy for name in ("clean", "pgd-20", "autoattack")}
    return {"n": attacked.n, **found}


def markdown(value: Mapping[str, Any]) -> str:
    """The tables of a record: means over seeds, with the lowest and the highest."""
    cells = value["results"]["cells"]
    rows, votes = [], []
    for objective in ("ibp", "crown-ibp", "natural"):
        for strategy in STRATEGIES:
            mine = [cell for cell in cells if (cell["objective"], cell["strategy"]) == (objective, strategy)]
            shown = [spread([cell[key] for cell in mine]) for key in BOUNDS]
            rows.append([f"{objective}, {strategy}", macs(mine), *shown])
    for strategy in STRATEGIES:
        mine = [cell for cell in cells if (cell["objective"], cell["strategy"]) == ("smoothing", strategy)]
        shown = [spread([cell["smoothing"][f"l2 {radius:g}"] for cell in mine]) for radius in RADII]
        votes.append([f"smoothing, {strategy}", macs(mine), *shown, spread([cell["abstained"] for cell in mine])])
    heads = [f"certified at l2 {radius:g} %" for radius in RADII]
    first = table(["trained by", "MACs", "clean %", "IBP %", "CROWN-IBP %", "AutoAttack %", "PGD-20 %"], rows)
    second = table(["trained by", "MACs", *heads, "abstains %"], votes)
    n, seeds = cells[0]["n"], len({cell["seed"] for cell in cells})
    about = (
        f"linf {EPS}, sigma {SIGMA}, {n} test images, {value['results']['draws']:,} draws; {seeds} seeds: mean (range)."
    )
    return "\n\n".join([first, second, f"{about} {provenance(value)}"])


def spread(shares: Sequence[float]) -> str:
    """Mean and range, in percent."""
    low, high = 100 * min(shares), 100 * max(shares)
    return f"{100 * statistics.mean(shares):.1f} ({low:.0f} to {high:.0f})"


def macs(cells: Sequence[Mapping[str, Any]]) -> str:
    """Their mean multiply-adds."""
    return f"{statistics.mean(cell['macs'] for cell in cells) / 1e3:.0f} k"


def _kept(options: argparse.Namespace, data: DataSplits, objective: str, strategy: str, seed: int) -> dict[str, Any]:
    settings = {key: getattr(options, key) for key in ("epochs", "draws", "images")}
    settings |= {"eps": EPS, "sigma": SIGMA, "objective": objectives()[objective].to_json()}
    name = f"{objective}-{strategy}-{seed}"
    return kept_cell(options.keep, name, settings, lambda: run(options, data, objective, strategy, seed))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example=EXAMPLE)
    parser.add_argument("--epochs", type=float, default=40.0, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="how many, from --seed (default: %(default)s)")
    parser.add_argument("--draws", type=positive, default=2000, help="of smoothing, an image (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=100, help="test images (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep finished cells here, and take them from here")
    add_out(parser, MODULE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
