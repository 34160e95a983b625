"""Do factorised layers compress: is a network of low rank more robust than a narrow one of the same cost?

Every row trains resnet8 on the digits at linf 0.1 from the same first weights, for the same epochs: `uniform`, a narrow
network from scratch; `magnitude`, trained, cut and fine-tuned; `tucker` and `cp`, trained, factorised and fine-tuned in
the same phases (`low_rank.py`: one share of energy, or of multiply-adds, for all layers, the largest that meets the
budget); `tucker-scratch` and `cp-scratch`, the ranks that those found, from the first weights on. Nothing was tuned.
Differences are paired over images and seeds; intervals cover both (see intervals.py).

The largest difference among many has to be found again: `--arms magnitude cp --budgets 0.25 --seed 3 --seeds 3
--autoattack-images 128 --out benchmarks/results/factorised_again.json` asks for the largest of them with other seeds
and more images.

Equal multiply-adds need not be equal time, since a factorised layer is three layers. "time" is onnxruntime's for one
image of the same cut of a ResNet-18 (32 x 32) with random weights, against the dense network in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.common import (
    RESULTS,
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
from benchmarks.low_rank import LowRank, layers_of
from robustcompress import Budget, ModelSpec, StructuralEditor, ThreatModel, build_model, compress, load_data
from robustcompress.budget import CostModel
from robustcompress.export.timing import Stopwatch
from robustcompress.robust import RobustReport, objective_from_name
from robustcompress.shapes import floor_widths, rounded
from robustcompress.strategies import make_strategy
from robustcompress.structure import Factorise

MODULE = "factorised"
AGAIN = "factorised_again"
ARMS = ("none", "uniform", "magnitude", "tucker", "cp", "tucker-scratch", "cp-scratch")
BASES = ("uniform", "magnitude")
BUDGETS = (0.5, 0.25)
MODEL = ModelSpec("resnet8", {"stem_stride": 4})
THREAT = ThreatModel("linf", 0.1)
STEPS = 3
ATTACKS = ("pgd-20", "autoattack")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    parents = {arm.removesuffix("-scratch") for arm in options.arms if arm.endswith("-scratch")}
    if parents - set(options.arms):
        raise SystemExit(f"--arms: the ranks of a -scratch arm are those of {', '.join(sorted(parents))}: name it too")
    if options.quick:
        options.epochs, options.seeds, options.images, options.autoattack_images = 0.2, 1, 8, 1
    settings = {key: getattr(options, key) for key in ("epochs", "images", "autoattack_images")}
    old = read_json(path)["results"] if path.exists() and not options.quick else {}
    results = old if old.get("settings") == settings else {"settings": settings, "cells": [], "times": []}
    with threads(options.threads):
        for seed in range(options.seed, options.seed + options.seeds):
            for budget in options.budgets[: 1 if options.quick else None]:
                for arm in options.arms:
                    if any(
                        (c["arm"], c["seed"]) == (arm, seed) and c["budget"] in (budget, 1) for c in results["cells"]
                    ):
                        continue
                    results["cells"].append(run(arm, budget, seed, results["cells"], settings))
                    write_json(path, record(MODULE, options, argv, results, data={"name": "digits"}))
                    print(f"{arm} {budget:g}, seed {seed}: {results['cells'][-1]['seconds']:.0f} s", file=sys.stderr)
        if not options.skip_times and set(options.arms) == set(ARMS):
            results["times"] = times("resnet8", BUDGETS[:1], 1) if options.quick else times("resnet18", BUDGETS, 8)
    write_json(path, record(MODULE, options, argv, results, data={"name": "digits"}))
    print(markdown(read_json(path)))
    return 0


def run(
    arm: str, budget: float, seed: int, cells: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Train one network, and attack it."""
    start = time.perf_counter()
    if arm.endswith("-scratch"):
        kind = arm.removesuffix("-scratch")
        (parent,) = (c for c in cells if (c["arm"], c["budget"], c["seed"]) == (kind, budget, seed))
        strategy: Any = LowRank(kind=kind, pretrain=0.0, ranks=parent["ranks"])
    else:
        strategy = LowRank(kind=arm) if arm in ("tucker", "cp") else make_strategy(arm)
    result = compress(
        MODEL,
        strategy,
        data=load_data("digits"),
        budget=Budget(macs=budget),
        threat=THREAT,
        objective=objective_from_name("pgd-at", steps=STEPS),
        epochs=settings["epochs"],
        attacks=(),
        seed=seed,
        progress=False,
    )
    report = compress_report(result.model, settings)
    ranks = next((r["ranks"] for r in result.history if "ranks" in r), {})
    return {
        "arm": arm,
        "budget": 1 if arm == "none" else budget,
        "seed": seed,
        "macs": result.after.macs,
        "params": result.after.params,
        "ranks": ranks,
        "report": report.to_json(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def compress_report(model: torch.nn.Module, settings: Mapping[str, Any]) -> RobustReport:
    """Clean, PGD-20 and AutoAttack accuracy on the same test images for every network."""
    from robustcompress import evaluate

    return evaluate(
        model,
        load_data("digits").test,
        THREAT,
        attacks=ATTACKS,
        max_images=settings["images"],
        autoattack_images=settings["autoattack_images"],
    )


def times(name: str, budgets: Sequence[float], step: int) -> list[dict[str, Any]]:
    """Time of narrow and of factorised networks of the same multiply-adds, as shares of the dense network's."""
    model, _ = build_model(name)
    example = torch.zeros(2, 3, 32, 32)
    editor = StructuralEditor(model.eval(), example)
    costs, stopwatch, floor = CostModel(editor, example), Stopwatch(editor, (3, 32, 32)), floor_widths(editor, step)
    dense = costs.predict({})[0]
    layers = layers_of(model, (3, 32, 32), "tucker")
    rows = []
    for budget in budgets:

        def narrow(ratio: float) -> dict[str, int]:
            return {g.name: rounded(ratio * g.width, step, floor[g.name], g.width) for g in editor.editable}

        def factors(share: float) -> list[Factorise]:
            """Equal shares of both ranks, in the same steps as widths."""
            found = []
            for layer in layers:
                wide, deep = layer.module.weight.shape[:2]
                ranks = tuple(rounded(share * side, step, min(step, side), side) for side in (wide, deep))
                if layer.macs("tucker", ranks) < layer.dense:
                    found.append(Factorise(layer.name, "tucker", ranks))
            return found

        def saved(share: float) -> float:
            chosen = {edit.module: edit.ranks for edit in factors(share)}
            return sum(la.dense - la.macs("tucker", chosen[la.name]) for la in layers if la.name in chosen)

        steps = [n / 64 for n in range(1, 65)]
        width = max(s for s in steps if costs.predict(narrow(s))[0] <= budget * dense)
        share = max(s for s in steps if dense - saved(s) <= budget * dense)
        twin = editor.fork()
        twin.factorise(factors(share))
        variants = {"narrow": stopwatch.resized(narrow(width)), "tucker": twin.model}
        macs = {"narrow": costs.predict(narrow(width))[0], "tucker": dense - saved(share)}
        for variant, network in variants.items():
            timing = stopwatch.time(network, seconds=5.0, precision=0.01)
            rows.append(
                {
                    "model": name,
                    "variant": variant,
                    "budget": budget,
                    "macs": round(macs[variant] / dense, 4),
                    "time": round(timing.ratio, 4),
                }
            )
    return rows


def markdown(value: Mapping[str, Any]) -> str:
    """One table of accuracies and differences, one of times."""
    groups: dict[tuple[float, str], list[RobustReport]] = {}
    sizes: dict[tuple[float, str], Mapping[str, Any]] = {}
    for cell in value["results"]["cells"]:
        key = (cell["budget"], cell["arm"])
        groups.setdefault(key, []).append(RobustReport.from_json(cell["report"]))
        sizes[key] = cell
    attacks = ("clean", *ATTACKS)
    noise = {a: pooled([[r.result(a).accuracy for r in rows] for rows in groups.values()]) for a in attacks}
    bases = [base for base in BASES if any(arm == base for _, arm in groups)]
    rows = []
    for (budget, arm), found in sorted(groups.items(), key=lambda item: (-item[0][0], ARMS.index(item[0][1]))):
        shown = [
            estimate([r.result(a).correct.double() for r in found], noise=noise[a]).points(signed=False)
            for a in attacks
        ]
        against = []
        for base in bases:
            theirs = groups.get((budget, base), [])
            if arm == base or len(theirs) != len(found):
                against += ["-"] * len(ATTACKS)
                continue
            for attack in ATTACKS:
                pairs = [
                    a.result(attack).correct.double() - b.result(attack).correct.double()
                    for a, b in zip(found, theirs, strict=True)
                ]
                against.append(estimate(pairs, low=-1).points(signed=True))
        cell = sizes[budget, arm]
        rows.append((arm, f"{cell['macs'] / 1e6:.3f}", f"{cell['params'] / 1e3:.1f}", *shown, *against))
    columns = (
        "arm",
        "M MACs",
        "k params",
        "clean %",
        "PGD-20 %",
        "AutoAttack %",
        *(f"{attack} against {b}" for b in bases for attack in ("PGD-20", "AutoAttack")),
    )
    speed = [
        (r["variant"], f"{r['budget']:g}", f"{r['macs']:.3f}", f"{r['time']:.3f}") for r in value["results"]["times"]
    ]
    timed = table(("network", "budget", "MACs", "time"), speed) + "\n\n" if speed else ""
    one = next(iter(groups.values()))
    said = f"{one[0].n} test images ({one[0].result('autoattack').n} of them under AutoAttack), {len(one)} seeds.\n\n"
    return f"{table(columns, rows)}\n\n{said}{timed}{provenance(value)}"


def markdown_again(value: Mapping[str, Any]) -> str:
    """The table of the second run, and its differences over the seeds of both runs on the images that both judged."""
    path = RESULTS / f"{MODULE}.json"
    first = read_json(path) if path.exists() else {"results": {"cells": []}}
    reports: dict[tuple[float, str], dict[int, RobustReport]] = {}
    for cell in [*first["results"]["cells"], *value["results"]["cells"]]:
        reports.setdefault((cell["budget"], cell["arm"]), {})[cell["seed"]] = RobustReport.from_json(cell["report"])
    rows = []
    for budget, arm in dict.fromkeys((cell["budget"], cell["arm"]) for cell in value["results"]["cells"]):
        theirs, found = reports.get((budget, "magnitude"), {}), reports[budget, arm]
        seeds = sorted(found.keys() & theirs.keys())
        if arm == "magnitude" or not seeds:
            continue
        for attack in ATTACKS:
            images = min(r[seed].result(attack).n for r in (found, theirs) for seed in seeds)
            pairs = [
                found[seed].result(attack).correct[:images].double()
                - theirs[seed].result(attack).correct[:images].double()
                for seed in seeds
            ]
            each = ", ".join(f"{100 * float(pair.mean()):+.1f}" for pair in pairs)
            rows.append(
                (f"{arm} at {budget:g}", attack, str(images), each, estimate(pairs, low=-1).points(signed=True))
            )
    both = table(("arm", "attack", "images", "against magnitude, by seed", "over all"), rows, words=2)
    return f"{markdown(value)}\n\nBoth runs together:\n\n{both}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.factorised --seeds 1")
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--seeds", type=positive, default=3, metavar="N", help="trainings of each (default: %(default)s)")
    add("--epochs", type=float, default=20, metavar="F", help="(default: %(default)s)")
    add("--images", type=positive, default=359, metavar="N", help="test images (default: all %(default)s)")
    add("--autoattack-images", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"(default: {' '.join(ARMS)})")
    add("--budgets", nargs="+", type=float, default=list(BUDGETS), metavar="F", help="shares of multiply-adds")
    add("--skip-times", action="store_true", help="train only; times are taken by a later run on an idle machine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
