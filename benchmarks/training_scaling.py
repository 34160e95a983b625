"""How adversarial training scales: images a second against width, depth, attack steps and batch size.

One thing changes at a time around a base cell (--base, --attack-steps, --batch-size). In each cell the loops of
benchmarks/training_step.py take turns: ours, the bare passes, the loop most public code has, and where foolbox is
installed that loop with foolbox's PGD. Ratios are over ours, medians of --steps single steps. The networks are narrower
than the field's, as their names say ("@0.5" is half of all channels): two CPU cores would take minutes for one step of
a WideResNet-28-10. The four axes:
  width   resnet8 at 0.25 to 2       depth  resnet8 to resnet32, and wrn_28_10@0.1, resnet18@0.125
  steps   K = 1, 7, 10               batch  128 to 1,024 images
"agreement": from the same weights, on the same batches of digits, with the same optimizer, the loops make --agree
steps; their losses step by step and their PGD-20 accuracies at the end should differ by no more than two seeds of one
loop do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from benchmarks.training_step import CLOCKS, compare, library, library_is_installed
from robustcompress import ThreatModel, build_model, evaluate, load_data
from robustcompress.data import Images
from robustcompress.robust import PGDAT

MODULE = "training_scaling"
WIDTHS = ("resnet8@0.25", "resnet8@0.5", "resnet8", "resnet8@2")
DEPTHS = ("resnet8@0.5", "resnet20@0.5", "resnet32@0.5", "resnet18@0.125", "wrn_28_10@0.1")
STEPS = (1, 7, 10)
BATCHES = (128, 256, 512, 1024)
THREAT = ThreatModel("linf", 0.1)
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.base, options.batch_size, options.attack_steps, options.steps, options.agree = (
            "resnet8@0.25",
            8,
            1,
            2,
            2,
        )
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    with threads(options.threads):
        for name, batch, steps in cells(options):
            found[name, batch, steps] = row = compare(
                name, batch_size=batch, attack_steps=steps, steps=options.steps, seed=options.seed, clock=options.clock
            )
            print(f"{name}, batch {batch}, K={steps}: {row['images_per_s']} images/s", file=sys.stderr, flush=True)
        agreed = agreement(options.agree, options.seed)
    base = {"model": options.base, "batch_size": options.batch_size, "attack_steps": options.attack_steps}
    results = {"base": base, "cells": list(found.values()), "agreement": agreed}
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    if not options.quick:
        plot(value, path.with_suffix(".png"))
    print(markdown(value))
    return 0


def cells(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Network, batch and attack steps of each cell, without repeats."""
    base, batch, steps = options.base, options.batch_size, options.attack_steps
    if options.quick:
        return [(base, batch, steps), (base, 2 * batch, steps)]
    wanted = [(name, batch, steps) for name in (*WIDTHS, *DEPTHS)]
    wanted += [(base, batch, k) for k in STEPS] + [(base, count, steps) for count in BATCHES]
    return list(dict.fromkeys(wanted))


def agreement(steps: int, seed: int) -> dict[str, Any]:
    """Losses and the accuracy at the end of loops that do the same thing."""
    data = load_data("digits")
    rivals: dict[str, tuple[Attack, int]] = {
        "ours": (_ours, seed),
        "ours, another seed": (_ours, seed + 1),
        "public": (_public, seed),
    }
    if library_is_installed():
        rivals["library"] = (_library, seed)
    torch.manual_seed(seed)
    start, _ = build_model("resnet8", num_classes=10, stem_stride=4)
    rows = {}
    for name, (attack, draws) in rivals.items():
        torch.manual_seed(1000 + draws)  # all of them draw from torch's own generator
        model = copy.deepcopy(start)
        losses = _steps(model, attack, data.train, steps)
        report = evaluate(model, data.test, THREAT, attacks=["pgd-20"], seed=0, device="cpu")
        tail = losses[-max(1, steps // 5) :]
        rows[name] = {
            "losses": [round(loss, 5) for loss in losses],
            "last_fifth": round(statistics.mean(tail), 5),
            "clean": round(report.clean_accuracy, 5),
            "pgd_20": round(report.result("pgd-20").accuracy, 5),
        }
    return {"steps": steps, "test_images": len(data.test.labels), "rivals": rows}


def _steps(model: nn.Module, attack: Attack, images: Images, steps: int) -> list[float]:
    x, y = images.as_float(), images.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    order = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        chosen = torch.randperm(len(y), generator=order)[:64]
        model.eval()
        attacked = attack(model, x[chosen], y[chosen])
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(attacked), y[chosen])
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def _ours(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return PGDAT(steps=5, step_size=0.03).attack(model, x, y, THREAT)


def _public(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    delta = torch.clamp(torch.zeros_like(x).uniform_(-THREAT.eps, THREAT.eps), -x, 1 - x)
    for _ in range(5):
        delta.requires_grad_()
        torch.autograd.backward(F.cross_entropy(model(x + delta), y))
        assert delta.grad is not None
        delta = torch.clamp(delta.detach() + 0.03 * delta.grad.sign(), -THREAT.eps, THREAT.eps)
        delta = torch.clamp(delta, -x, 1 - x)
    return x + delta


def _library(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    foolbox = library()
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attacked: Tensor = foolbox.attacks.LinfPGD(abs_stepsize=0.03, steps=5)(wrapped, x, y, epsilons=THREAT.eps)[1]
    return attacked


def markdown(value: Mapping[str, Any]) -> str:
    """The tables, and where they come from."""
    head = ("model", "MMACs", "batch", "K", "images/s", "efficiency", "public / ours", "library / ours")
    rows = [
        (
            row["model"],
            f"{row['macs'] / 1e6:.1f}",
            *(str(row["batch_size"]), str(row["attack_steps"])),
            f"{row['images_per_s']:.1f}",
            *(f"{row['efficiency']:.3f}", f"{row['speed_up']:.2f}x"),
            "-" if row["over_library"] is None else f"{row['over_library']:.2f}x",
        )
        for row in value["results"]["cells"]
    ]
    agreed = value["results"]["agreement"]
    agree = [
        (
            name,
            f"{row['losses'][0]:.3f}",
            f"{row['last_fifth']:.3f}",
            f"{100 * row['clean']:.1f}",
            f"{100 * row['pgd_20']:.1f}",
        )
        for name, row in agreed["rivals"].items()
    ]
    equal = table(("loop", "first loss", "loss, last fifth", "clean %", "PGD-20 %"), agree)
    said = f"{agreed['steps']} steps of 64 digits from the same weights; {agreed['test_images']} test images."
    return f"{table(head, rows)}\n\n{said}\n\n{equal}\n\n{provenance(value)}"


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """Images a second along each axis, ours beside its rivals."""
    from matplotlib.figure import Figure

    results = value["results"]
    base = results["base"]
    panels = (
        ("width of resnet8", "macs", lambda row: row["model"] in WIDTHS, "multiply-adds (millions)"),
        ("depth and shape", "macs", lambda row: row["model"] in DEPTHS, "multiply-adds (millions)"),
        ("attack steps", "attack_steps", lambda row: row["model"] == base["model"], "PGD steps"),
        ("batch", "batch_size", lambda row: row["model"] == base["model"], "images a step"),
    )
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, (title, key, belongs, label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        fixed = [name for name in ("batch_size", "attack_steps") if name != key]
        rows = [row for row in results["cells"] if belongs(row) and all(row[k] == base[k] for k in fixed)]
        if not rows:  # another --base than the figures' own
            axes.set_axis_off()
            continue
        rows.sort(key=lambda row: row[key])
        at = [row[key] / (1e6 if key == "macs" else 1) for row in rows]
        for name, seconds in (("ours", "ours_s"), ("bare passes", "bare_s"), ("public", "public_s")):
            speed = [row["batch_size"] / row[seconds] for row in rows]
            axes.plot(at, speed, "o--" if seconds == "bare_s" else "o-", label=name, markersize=4)
        if all(row["library_s"] for row in rows):
            speed = [row["batch_size"] / row["library_s"] for row in rows]
            axes.plot(at, speed, "o-", label="library (foolbox)", markersize=4)
        if key == "macs":
            for x, row in zip(at, rows, strict=True):
                axes.annotate(row["model"], (x, row["images_per_s"]), xytext=(3, 5), textcoords="offset points", size=7)
        axes.set(title=title, xlabel=label, ylabel="images/s", xscale="log", yscale="log")
        axes.set_xticks(at, [f"{x:g}" if key != "macs" else f"{x:.1f}" for x in at], minor=False)
        axes.set_xticks([], minor=True)
    figure.get_axes()[0].legend(fontsize=8)
    first = f"{base['model']}, batch {base['batch_size']}, K={base['attack_steps']}"
    figure.suptitle(f"One step of adversarial training around {first}", fontsize=12)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.training_scaling --steps 2")
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--base", default="resnet8@0.5", help="network of the base cell (default: %(default)s)")
    add("--batch-size", type=positive, default=128, help="images a step in the base cell (default: %(default)s)")
    add("--attack-steps", type=positive, default=7, help="PGD steps in the base cell (default: %(default)s)")
    add("--steps", type=positive, default=3, help="steps timed of each loop in each cell (default: %(default)s)")
    add("--agree", type=positive, default=150, help="steps that are compared loss by loss (default: %(default)s)")
    add("--clock", choices=CLOCKS, default="wall", help="wall or processor time (default: wall)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
