"""What it is worth, and costs, that work on the CPU keeps the memory its tensors leave (robustcompress/allocator.py).

Each figure in a fresh process (Linux, glibc); processes that keep memory and such that give it back as glibc does take
turns. Per way and cell:
  seconds   of a training step: the median after the first two of `robustcompress.train.train` (PGD, batch and attack
            steps as the cell says); or of an evaluation of four batches under PGD-10 ("evaluate")
  peak MB   the most that the process ever held
  system    share of its time that the system took, nearly all of it to hand out pages
Pixels are random bytes, weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.common import (
    add_out,
    in_fresh_process,
    make_parser,
    out_path,
    positive,
    provenance,
    record,
    table,
    write_json,
)
from benchmarks.training_step import THREAT, build, cells, random_images, step_seconds
from robustcompress import allocator, evaluate

MODULE = "kept_memory"
WAYS = ("given back", "kept")
CELLS = ("resnet8:128:7", "resnet18@0.5:128:7", "resnet18:128:7", "resnet18@0.5:256:1", "resnet18@0.5:1024:1")
EVALUATED = "resnet18@0.5:256"
BATCHES = 4


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.child:
        print(json.dumps(measured(*options.child, options)))
        return 0
    path = out_path(options, MODULE)
    wanted = [("train", cell) for cell in CELLS] + [("evaluate", EVALUATED)]
    if options.quick:
        options.steps, options.rounds = 2, 1
        wanted = [("train", "resnet8@0.25:8:1"), ("evaluate", "resnet8@0.25:8")]
    results = []
    for what, cell in wanted:
        found: dict[str, list[Any]] = {way: [] for way in WAYS}
        for turn in range(options.rounds):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                found[way].append(child(what, cell, way, options))
        ((name, batch, steps),) = cells([cell], 0, 10)
        row: dict[str, Any] = {"what": what, "model": name, "batch_size": batch, "attack_steps": steps}
        for way, runs in found.items():
            middle = {
                key: round(statistics.median(run[key] for run in runs), 4) for key in ("seconds", "peak", "system")
            }
            row[way] = middle | {"runs": runs}
        row["speed_up"] = round(row["given back"]["seconds"] / row["kept"]["seconds"], 4)
        results.append(row)
        print(f"{what} {cell}: {row['speed_up']:.2f}x", file=sys.stderr, flush=True)
        value = record(MODULE, options, argv, results)
        write_json(path, value)
    print(markdown(value))
    return 0


def child(what: str, cell: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one way in a fresh process."""
    words = ["--child", what, cell, way, "--threads", str(options.threads), "--steps", str(options.steps)]
    words += ["--seed", str(options.seed)]
    surroundings = {name: value for name, value in os.environ.items() if name not in allocator.SETTINGS}
    found: dict[str, Any] = in_fresh_process(MODULE, words, what=cell, environment=surroundings)
    return found


def measured(what: str, cell: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, bytes and the system's share of this process, which should be a fresh one."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if way == "given back":
        allocator.c_library = lambda: None
    elif allocator.c_library() is None:
        raise SystemExit("nothing is kept on this system: glibc is needed")
    ((name, batch, steps),) = cells([cell], 0, 10)
    model = build(name)
    if what == "train":
        model = model.to(memory_format=torch.channels_last)
        seconds = statistics.median(step_seconds(model, batch, steps, options.steps + 1, options.seed)[1:])
    else:
        images, start = random_images(BATCHES * batch, options.seed), time.perf_counter()
        evaluate(
            model, (images.pixels, images.labels), THREAT, attacks=(f"pgd-{steps}",), batch_size=batch, device="cpu"
        )
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": round(seconds, 4),
        "peak": 1024 * used.ru_maxrss,
        "system": round(used.ru_stime / (used.ru_stime + used.ru_utime), 4),
    }


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    head = (
        "work",
        "model",
        "batch",
        "K",
        *(f"{key}, {way}" for key in ("s", "MB", "system %") for way in WAYS),
        "faster",
    )
    rows = [
        (
            row["what"],
            row["model"],
            *(str(row[key]) for key in ("batch_size", "attack_steps")),
            *(f"{row[way]['seconds']:.3f}" for way in WAYS),
            *(f"{row[way]['peak'] / 1e6:.0f}" for way in WAYS),
            *(f"{100 * row[way]['system']:.0f}" for way in WAYS),
            f"{row['speed_up']:.2f}x",
        )
        for row in value["results"]
    ]
    return f"{table(head, rows)}\n\n{provenance(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.kept_memory --threads 2")
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--steps", type=positive, default=4, help="steps timed in each process (default: %(default)s)")
    add("--rounds", type=positive, default=3, help="processes of each way (default: %(default)s)")
    add("--child", nargs=3, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
