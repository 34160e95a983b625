"""What a step of adversarial training costs over several processes: measured for two, modelled for more.

Two processes of one thread each (torchrun, gloo over the loopback) are measured at four things:
  all-reduce   seconds for tensors of 4 bytes to 64 MB; a line through them: latency, and bytes a second
  alone        a step of one process with the whole batch, the other one idle
  side by side a step of each process with half of the batch, at once, that exchange nothing
  together     a step of both, which add up gradients and statistics
The model is: side by side, plus for each tensor that is exchanged latency + bytes * 2 (W - 1) / W / bandwidth. It knows
nothing of what DistributedDataParallel hides behind the backward pass, nor of the cores that gloo takes from what
computes; "error" says by how much it misses. Memory is counted a process: parameters, gradients, optimizer (momentum),
the average (EMA), the wrapper's buckets, and a batch of images as floats; activations are in
benchmarks/training_memory.py.
"on paper" applies the same model to 8 and 64 GPUs that nobody here has, with the rates that stand beside it: assumed,
not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    ROOT,
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
from benchmarks.training_step import THREAT, build, random_images
from robustcompress.budget import measure
from robustcompress.data import Batches
from robustcompress.distributed import Parts, World, start, stop
from robustcompress.robust import PGDAT
from robustcompress.train import Recipe, averaged, make_optimizer, train

MODULE = "distributed_step"
# Network, images of both processes together, attack steps: much to compute for what is sent, and the other way round.
CELLS = (("resnet18@0.25", 64, 7), ("resnet18@0.5", 32, 2), ("resnet18", 16, 1), ("resnet18", 4, 1))
SIZES = (4, 1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
QUICK_CELLS, QUICK_SIZES = (("resnet8@0.25", 8, 1),), (4, 1 << 16, 1 << 20)

# For "on paper": nothing of this is measured here.
PAPER = {
    "images_per_s": 2500.0,  # plain training of ResNet-50 at 224x224 in bfloat16 on one GPU, forward and backward
    "attack_steps": 4,
    "images_per_gpu": 256,
    "nvlink_bytes_per_s": 200e9,  # of an all-reduce between 8 GPUs of a machine
    "network_bytes_per_s": 12.5e9,  # 100 Gb/s, one card a machine
    "latency_s": 20e-6,  # of each of the 2 (W - 1) turns
    "parameters": 25_557_032,  # ResNet-50
    "buffers": 53_120,
}
_BUCKETS = 1 << 20, 25 << 20  # of DistributedDataParallel: the first, and the others, in bytes


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.child is not None:
        with threads(options.threads):
            return child(options)
    path = out_path(options, MODULE)
    measured = launch(options)
    line = fit([(row["bytes"], row["seconds"]) for row in measured["all_reduce"]])
    results = {
        "all_reduce": measured["all_reduce"],
        "line": line,
        "cells": [modelled(row, line) for row in measured["cells"]],
        "paper": PAPER,
        "on_paper": on_paper(PAPER),
    }
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    if not options.quick:
        plot(value, path.with_suffix(".png"))
    print(markdown(value))
    return 0


def launch(options: argparse.Namespace) -> dict[str, Any]:
    """Start two processes of this file, and read what the first of them found."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words += ["-m", f"benchmarks.{MODULE}", "--threads", str(options.threads), "--seed", str(options.seed)]
    words += ["--steps", str(options.steps), *(["--quick"] if options.quick else [])]
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "found.json"
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*words, "--child", str(found)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"the two processes failed:\n{done.stderr[-2000:]}")
        measured: dict[str, Any] = json.loads(found.read_text())
    return measured


def child(options: argparse.Namespace) -> int:
    """One of the two processes: measure, and have the first one write."""
    world = start()
    steps = 2 if options.quick else options.steps
    rows = [
        {"bytes": size, "seconds": all_reduce(world, size, repeats=3 if options.quick else 20)}
        for size in (QUICK_SIZES if options.quick else SIZES)
    ]
    cells = []
    for name, batch, attack_steps in QUICK_CELLS if options.quick else CELLS:
        cell: dict[str, Any] = {"model": name, "batch_size": batch, "attack_steps": attack_steps}
        # The other process waits in the gathering meanwhile, and takes no time of the processor.
        mine = seconds_of(name, batch, attack_steps, steps, options.seed, Parts()) if world.first else 0.0
        cell["alone_s"] = world.gather(mine)[0]
        mine = seconds_of(name, batch // 2, attack_steps, steps, options.seed, Parts())
        cell["side_by_side_s"] = max(world.gather(mine))
        mine = seconds_of(name, batch, attack_steps, steps, options.seed, Parts(world.size, world))
        cell["together_s"] = max(world.gather(mine))
        if world.first:
            print(f"{name}, batch {batch}, K={attack_steps}: {cell['together_s']:.3f} s a step", file=sys.stderr)
        cells.append(cell | sizes_of(name))
    if world.first:
        write_json(Path(options.child), {"all_reduce": rows, "cells": cells})
    stop()
    return 0


def all_reduce(world: World, size: int, *, repeats: int) -> float:
    """Median seconds to add up a tensor of so many bytes."""
    tensor, seconds = torch.zeros(max(1, size // 4)), []
    for number in range(repeats + 2):
        world.sum_(torch.zeros(1))  # both begin together
        begun = time.perf_counter()
        world.sum_(tensor)
        if number > 1:
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def seconds_of(name: str, batch: int, attack_steps: int, steps: int, seed: int, parts: Parts) -> float:
    """Median seconds of a training step; the first, in which memory is taken and wrappers are made, does not count."""
    torch.manual_seed(seed)
    model = build(name)
    recipe, stamps = Recipe(batch_size=batch), []
    optimizer = make_optimizer(recipe, list(model.parameters()), lr=0.01)
    optimizer.register_step_post_hook(lambda *_: stamps.append(time.perf_counter()))
    # The images are made before the clock starts; each batch is a pass of its own.
    batches = Batches(
        random_images(batch, seed), batch, augment="crop-flip", generator=torch.Generator().manual_seed(0)
    )
    train(
        model,
        batches,
        PGDAT(steps=attack_steps),
        THREAT,
        recipe,
        epochs=steps + 1,
        optimizer=optimizer,
        lr=0.01,
        schedule="constant",
        generator=torch.Generator().manual_seed(seed),
        ema=averaged(model, recipe.ema),
        parts=parts,
    )
    return statistics.median(late - early for early, late in itertools.pairwise(stamps))


def sizes_of(name: str) -> dict[str, int]:
    """What a network has that is sent and stored."""
    model: nn.Module = build(name)
    return {
        "macs": round(measure(model, torch.zeros(1, 3, 32, 32)).macs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "buffers": sum(b.numel() for b in model.buffers() if b.is_floating_point()),
    }


def fit(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Latency and bandwidth of an all-reduce between two.

    The latency is that of the smallest tensor; the bandwidth that of the largest ones, where the rest does not count.
    """
    (_, latency), *_ = sorted(points)
    large = sorted(points)[-2:]
    rates = [size / max(seconds - latency, 1e-9) for size, seconds in large]
    return {"latency_s": latency, "bytes_per_s": statistics.mean(rates)}


def exchanged(parameters: int, buffers: int) -> list[int]:
    """Bytes of each tensor that a step adds up: gradients bucket by bucket, statistics at once, the meters."""
    first, other = _BUCKETS
    left, sent = 4 * parameters, []
    while left > 0:
        sent.append(min(left, other if sent else first))
        left -= sent[-1]
    return [*sent, *([4 * buffers] if buffers else []), 12]


def communication(sent: Sequence[int], world: int, *, latency: float, rate: float) -> float:
    """Seconds that a ring of `world` takes to add up tensors of so many bytes, one after the other."""
    share = 2 * (world - 1) / world
    return sum(latency + size * share / rate for size in sent)


def modelled(row: Mapping[str, Any], line: Mapping[str, float]) -> dict[str, Any]:
    """A measured cell, and what the model says of it."""
    sent = exchanged(row["parameters"], row["buffers"])
    added = communication(sent, 2, latency=line["latency_s"], rate=line["bytes_per_s"])
    predicted = row["side_by_side_s"] + added
    return {
        **row,
        "sent_bytes": sum(sent),
        "communication_s": added,
        "predicted_s": predicted,
        "error": predicted / row["together_s"] - 1,
        "images_per_s": {
            "alone": row["batch_size"] / row["alone_s"],
            "together": row["batch_size"] / row["together_s"],
        },
        "memory": memory(row["parameters"], row["buffers"], row["batch_size"] // 2, pixels=32 * 32),
    }


def memory(parameters: int, buffers: int, images: int, *, pixels: int, moments: int = 1) -> dict[str, int]:
    """Bytes a process, beside activations."""
    found = {
        "parameters": 4 * (parameters + buffers),
        "gradients": 4 * parameters,
        "optimizer": 4 * moments * parameters,
        "average": 4 * (parameters + buffers),
        "buckets": 4 * parameters,
        "images": 2 * images * 3 * pixels * 4,  # as they are, and attacked
    }
    return found | {"together": sum(found.values())}


def on_paper(paper: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The model for ResNet-50 on ImageNet, with as many images a GPU, over 1, 8 and 64 GPUs in machines of 8."""
    images, passes = paper["images_per_gpu"], paper["attack_steps"] + 1
    compute = images * passes / paper["images_per_s"]
    sent = exchanged(paper["parameters"], paper["buffers"])
    rows = []
    for gpus in (1, 8, 64):
        within = min(gpus, 8)
        added = 0.0
        if gpus > 1:  # each ring takes 2 (W - 1) turns
            turns = 2 * (within - 1) * paper["latency_s"]
            added = communication(sent, within, latency=turns, rate=paper["nvlink_bytes_per_s"])
        if gpus > 8:
            machines = gpus // 8
            turns = 2 * (machines - 1) * paper["latency_s"]
            added += communication(sent, machines, latency=turns, rate=paper["network_bytes_per_s"])
        rows.append(
            {
                "gpus": gpus,
                "batch_size": gpus * images,
                "compute_s": compute,
                "communication_s": added,
                "step_s": compute + added,
                "efficiency": compute / (compute + added),
                "images_per_s": gpus * images / (compute + added),
                "epoch_minutes": 1_281_167 / (gpus * images / (compute + added)) / 60,
                "memory": memory(paper["parameters"], paper["buffers"], images, pixels=224 * 224, moments=2),
            }
        )
    return rows


def markdown(value: Mapping[str, Any]) -> str:
    """The tables, and where they come from."""
    results = value["results"]
    head = (
        "model",
        "batch",
        "K",
        "alone s",
        "side by side s",
        "together s",
        "sent MB",
        "model s",
        "error %",
        "memory MB",
    )
    rows = [
        (
            row["model"],
            *(str(row[key]) for key in ("batch_size", "attack_steps")),
            *(f"{row[key]:.3f}" for key in ("alone_s", "side_by_side_s", "together_s")),
            f"{row['sent_bytes'] / 1e6:.1f}",
            f"{row['predicted_s']:.3f}",
            f"{100 * row['error']:+.1f}",
            f"{row['memory']['together'] / 1e6:.0f}",
        )
        for row in results["cells"]
    ]
    line = results["line"]
    said = f"All-reduce between two: {1e3 * line['latency_s']:.2f} ms, and {line['bytes_per_s'] / 1e9:.2f} GB/s."
    paper = results["paper"]
    paper_head = (
        "GPUs",
        "batch",
        "step s",
        "of it exchange s",
        "efficiency %",
        "images/s",
        "minutes an epoch",
        "memory GB",
    )
    paper_rows = [
        (
            *(str(row[key]) for key in ("gpus", "batch_size")),
            *(f"{row[key]:.3f}" for key in ("step_s", "communication_s")),
            f"{100 * row['efficiency']:.1f}",
            f"{row['images_per_s']:.0f}",
            f"{row['epoch_minutes']:.1f}",
            f"{row['memory']['together'] / 1e9:.2f}",
        )
        for row in results["on_paper"]
    ]
    assumed = (
        f"On paper, not run: ResNet-50 at 224x224, PGD-{paper['attack_steps']}, LAMB, {paper['images_per_gpu']} images "
        f"a GPU that makes {paper['images_per_s']:.0f} plain training passes a second, "
        f"{paper['nvlink_bytes_per_s'] / 1e9:.0f} GB/s within a machine of 8, "
        f"{8 * paper['network_bytes_per_s'] / 1e9:.0f} Gb/s between machines, nothing hidden behind the backward pass."
    )
    tables = (table(head, rows), said, assumed, table(paper_head, paper_rows), provenance(value))
    return "\n\n".join(tables)


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """The all-reduce and its line; steps measured and modelled."""
    from matplotlib.figure import Figure

    results, line = value["results"], value["results"]["line"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [row["bytes"] for row in results["all_reduce"]]
    left.plot(sizes, [1e3 * row["seconds"] for row in results["all_reduce"]], "o", label="measured")
    modelled_ms = [1e3 * (line["latency_s"] + size / line["bytes_per_s"]) for size in sizes]
    left.plot(sizes, modelled_ms, "-", label="latency + bytes / bandwidth")
    left.set(xscale="log", yscale="log", xlabel="bytes", ylabel="ms", title="all-reduce between two processes")
    left.legend(fontsize=8)
    names = [f"{row['model']}\nbatch {row['batch_size']}, K={row['attack_steps']}" for row in results["cells"]]
    places = range(len(names))
    right.bar([p - 0.2 for p in places], [row["together_s"] for row in results["cells"]], 0.4, label="measured")
    below = [row["side_by_side_s"] for row in results["cells"]]
    right.bar([p + 0.2 for p in places], below, 0.4, label="model: compute")
    added = [row["communication_s"] for row in results["cells"]]
    right.bar([p + 0.2 for p in places], added, 0.4, bottom=below, label="model: exchange")
    right.set_xticks(list(places), names, fontsize=8)
    most = max(row["together_s"] for row in results["cells"])
    right.set(ylabel="seconds a step", title="a step of two processes", ylim=(0, 1.3 * most))  # room for the legend
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.distributed_step")
    add_out(parser, MODULE)
    parser.add_argument("--steps", type=positive, default=5, help="steps timed of each kind (default: %(default)s)")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
