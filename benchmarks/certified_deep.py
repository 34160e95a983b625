"""How a network with many batch norms is trained for bounds: what a slower ramp and `steady` are worth.

A resnet8 at half of its multiply-adds (strategy "uniform") is trained on the digits by five objectives, all with AdamW,
64 images a step and gradients of norm 10 at most: by "natural"; by "ibp" as it is, whose radius grows from 5 to 35 % of
the epochs; by "ibp" whose radius grows from 15 to 60 %; by the same with `steady=0.5`; and so by "crown-ibp". Of each
network the share of test images that are proven by IBP and by CROWN-IBP, and that withstand PGD-20 and AutoAttack.
The slower ramp and the weight were chosen on validation images. With --keep finished cells are kept, and a stopped run
goes on. No figure is a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.certified import BOUNDS, EPS, bounds, macs, spread
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
from robustcompress import Budget, DataSplits, ModelSpec, Recipe, ThreatModel, compress, load_data
from robustcompress.robust import IBP, CrownIBP, Natural, Objective

MODULE = "certified_deep"
SLOW: dict[str, Any] = {"warm_up": 0.15, "ramp": 0.6}
ARMS: Mapping[str, Objective] = {
    "natural": Natural(),
    "ibp": IBP(),
    "ibp, slow": IBP(**SLOW),
    "ibp, slow, steady": IBP(**SLOW, steady=0.5),
    "crown-ibp, slow, steady": CrownIBP(**SLOW, steady=0.5),
}
RECIPE = Recipe(lr=0.003, optimizer="adamw", batch_size=64, clip_norm=10.0)
EXAMPLE = "python -m benchmarks.certified_deep --keep runs/certified_deep"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.epochs, options.seeds, options.images = 0.2, 1, 4
    data = load_data("digits")
    seeds = range(options.seed, options.seed + options.seeds)
    with threads(options.threads):
        cells = [_kept(options, data, arm, seed) for seed in seeds for arm in ARMS]
    results = {"epochs": options.epochs, "eps": EPS, "recipe": RECIPE.to_json(), "cells": cells}
    value = record(MODULE, options, argv, results, data={"name": data.name, "sha256": data.sha256})
    write_json(path, value)
    print(markdown(value))
    return 0


def run(options: argparse.Namespace, data: DataSplits, arm: str, seed: int) -> dict[str, Any]:
    """Train one network and say what is proven of it."""
    result = compress(
        ModelSpec("resnet8", {"stem_stride": 4}),
        "uniform",
        data=data,
        budget=Budget(macs=0.5),
        threat=ThreatModel("linf", EPS),
        objective=ARMS[arm],
        epochs=options.epochs,
        recipe=RECIPE,
        attacks=(),
        seed=seed,
        progress=False,
    )
    found = bounds(options, result, data)
    return {"arm": arm, "objective": ARMS[arm].to_json(), "seed": seed, "macs": result.after.macs, **found}


def markdown(value: Mapping[str, Any]) -> str:
    """The table of a record: means over seeds, with the lowest and the highest."""
    cells = value["results"]["cells"]
    rows = []
    for arm in ARMS:
        mine = [cell for cell in cells if cell["arm"] == arm]
        rows.append([arm, macs(mine), *(spread([cell[key] for cell in mine]) for key in BOUNDS)])
    n, seeds = cells[0]["n"], len({cell["seed"] for cell in cells})
    about = f"linf {EPS}, {n} test images, {value['results']['epochs']:g} epochs; {seeds} seeds: mean (range)."
    heads = ["trained by", "MACs", "clean %", "IBP %", "CROWN-IBP %", "AutoAttack %", "PGD-20 %"]
    return "\n\n".join([table(heads, rows), f"{about} {provenance(value)}"])


def _kept(options: argparse.Namespace, data: DataSplits, arm: str, seed: int) -> dict[str, Any]:
    settings = {"epochs": options.epochs, "images": options.images, "eps": EPS, "recipe": RECIPE.to_json()}
    settings |= {"objective": ARMS[arm].to_json()}
    name = f"{list(ARMS).index(arm)}-{seed}"
    return kept_cell(options.keep, name, settings, lambda: run(options, data, arm, seed))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example=EXAMPLE)
    parser.add_argument("--epochs", type=float, default=60.0, help="of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="how many, from --seed (default: %(default)s)")
    parser.add_argument("--images", type=positive, default=100, help="test images (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep finished cells here, and take them from here")
    add_out(parser, MODULE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
