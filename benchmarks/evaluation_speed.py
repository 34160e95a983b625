"""What a strong evaluation costs: AutoAttack here against the reference implementation as its users call it.

A small robust network (one of benchmarks/strong_nets.py) is evaluated on the first test images, in --rounds slices by
turns, so that drift and load hit all alike:
  reference     pyautoattack's `AutoAttack(model, norm, eps, version="standard").run_standard_evaluation(x, y)`, batches
                of 250, weights that require gradients as they do in a fresh network
  ours          `evaluate(attacks=["autoattack"])` as it comes on a CPU: in chunks of 64 images
  ours, 250     the same in chunks as large as the reference's batches
  ours, timed   as it comes under a time limit that is never reached: each 16 images through all attacks before the next
  apgd-fast, pgd-20   the cheaper attacks, on the same images
"seconds" are sums over the slices, "speed-up" is the reference's over them. "forward" and "backward" are passes over
images; "a batch" is how many images a forward pass held on average: broken images are dropped within and between the
attacks, and what is left joins into full chunks, but not under a time limit. "right %" is what stands.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    add_out,
    make_parser,
    out_path,
    positive,
    provenance,
    record,
    table,
    threads,
    write_json,
)
from benchmarks.strong_attack import Passes
from benchmarks.strong_nets import CIFAR_TEST, NETS, images_of, trained
from robustcompress import ThreatModel, evaluate
from robustcompress.robust import AutoAttackConfig
from robustcompress.robust.evaluate import chosen_images
from robustcompress.robust.judge import hash_of

MODULE = "evaluation_speed"
REFERENCE = "reference"
QUICK = AutoAttackConfig(apgd_iterations=2, fab_iterations=1, square_queries=2, target_classes=1)
Rival = Callable[[Tensor, Tensor], int]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.images, options.rounds = 12, 2
    net = next(net for net in NETS if net.name == options.network)
    data = images_of(net, options.root, test_limit=max(options.images, CIFAR_TEST))
    with threads(options.threads):
        model = trained(net, options.nets, data, seed=options.seed, epochs=1 if options.quick else None)
        chosen = chosen_images(len(data.test.labels), options.images)
        x, y = data.test.as_float()[chosen], data.test.labels[chosen]
        rivals = rivals_of(model, net.threat, options.seed, quick=options.quick)
        results = compare(model, rivals, x, y, rounds=options.rounds)
    found = {"net": net.name, "threat": net.threat.to_json(), "images": len(y), "rounds": options.rounds}
    data_of = {"name": "cifar10" if net.photos else "digits", "sha256": hash_of(x, y)}
    value = record(MODULE, options, argv, found | {"rivals": results}, data=data_of)
    write_json(path, value)
    if not options.quick:
        plot(value, path.with_suffix(".png"))
    print(markdown(value))
    return 0


def rivals_of(model: nn.Module, threat: ThreatModel, seed: int, *, quick: bool) -> dict[str, Rival]:
    """How each of them counts the images that stand. `quick` cuts AutoAttack short, here and in the reference."""

    def ours(name: str, chunk: int | None = None, *, limit: float | None = None) -> Rival:
        config = None
        if name == "autoattack":
            config = QUICK if quick else AutoAttackConfig(chunk_size=chunk)

        def run(x: Tensor, y: Tensor) -> int:
            found = evaluate(
                model,
                (x, y),
                threat,
                attacks=[name],
                seed=seed,
                device="cpu",
                batch_size=250,
                autoattack_config=config,
                time_limit_s=limit,
            )
            return int(found.result(name).correct.sum())

        return run

    def reference(x: Tensor, y: Tensor) -> int:
        from pyautoattack import AutoAttack

        norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
        logging.getLogger("auto-attack").setLevel(logging.ERROR)
        adversary = AutoAttack(model, norm=norm, eps=threat.eps, seed=seed, version="standard")
        if quick:
            adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = 2
            adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = adversary.fab.n_iter = 1
            adversary.square.n_queries = 2
        with torch.random.fork_rng(devices=[]):
            attacked, _ = adversary.run_standard_evaluation(x, y, batch_size=250)
        with torch.no_grad():
            return int((model(attacked).argmax(1) == y).sum())

    return {
        REFERENCE: reference,
        "ours": ours("autoattack"),
        "ours, 250": ours("autoattack", 250),
        "ours, timed": ours("autoattack", limit=1e6),
        "apgd-fast": ours("apgd-fast"),
        "pgd-20": ours("pgd-20"),
    }


def compare(
    model: nn.Module, rivals: Mapping[str, Rival], x: Tensor, y: Tensor, *, rounds: int
) -> dict[str, dict[str, Any]]:
    """Give each rival each slice of the images, every slice beginning with another one."""
    results: dict[str, dict[str, Any]] = {
        name: {"seconds": 0.0, "right": 0, "forward": 0, "backward": 0, "calls": 0} for name in rivals
    }
    names = list(rivals)
    model.requires_grad_(True)
    for number, (images, labels) in enumerate(zip(torch.chunk(x, rounds), torch.chunk(y, rounds), strict=True)):
        for offset in range(len(names)):
            name = names[(number + offset) % len(names)]
            row, spent = results[name], Passes()
            with spent.counting(model):
                began = time.perf_counter()
                row["right"] += rivals[name](images, labels)
                row["seconds"] += time.perf_counter() - began
            model.zero_grad(set_to_none=True)
            for key in ("forward", "backward", "calls"):
                row[key] += getattr(spent, key)
            print(f"slice {number + 1} of {rounds}, {name}: {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    for row in results.values():
        row["a_batch"] = round(row["forward"] / row["calls"], 2)
        row["seconds"] = round(row["seconds"], 3)
        row["speed_up"] = round(results[REFERENCE]["seconds"] / row["seconds"], 3)
    return results


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    found = value["results"]
    head = ("attack", "seconds", "speed-up", "right %", "forward an image", "backward", "a batch")
    rows = [
        (
            name,
            f"{row['seconds']:.1f}",
            f"{row['speed_up']:.2f}x",
            f"{100 * row['right'] / found['images']:.1f}",
            *(f"{row[key] / found['images']:.0f}" for key in ("forward", "backward")),
            f"{row['a_batch']:.1f}",
        )
        for name, row in found["rivals"].items()
    ]
    said = f"{found['net']}, {found['images']} images in {found['rounds']} slices; {provenance(value)}"
    return f"{table(head, rows)}\n\n{said}"


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """Seconds an image against the robust accuracy that is left."""
    from matplotlib.figure import Figure

    found = value["results"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (name, row) in enumerate(found["rivals"].items()):
        axes.plot(
            row["seconds"] / found["images"],
            100 * row["right"] / found["images"],
            "*" if name.startswith((REFERENCE, "ours")) else "o",
            color=f"C{number}",
            markersize=11,
            label=name,
        )
    axes.set(xscale="log", xlabel="seconds an image", ylabel="images that stand (%)")
    axes.set_title(f"Cost of an evaluation against what it finds ({found['net']})", fontsize=11)
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        MODULE,
        __doc__,
        example="python -m benchmarks.evaluation_speed --network 'CIFAR-10, PGD-AT' --images 1000 --rounds 2",
    )
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--network", choices=[net.name for net in NETS], default=NETS[0].name, help="(default: %(default)s)")
    add("--root", type=Path, default=Path("data/cifar10"), help="CIFAR-10 as folders of images (default: %(default)s)")
    add("--images", type=positive, default=96, metavar="N", help="test images (default: %(default)s)")
    add("--rounds", type=positive, default=1, help="slices, for turns (default: %(default)s)")
    add("--nets", type=Path, default=Path("runs/strong_attack"), help="where the trained network is kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
