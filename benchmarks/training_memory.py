"""Peak memory of one step of adversarial training against the batch, and what accumulation and checkpointing save.

Each figure in a process of its own (Linux): the network is built, one step of two images is made so that what a process
takes once is taken, memory that nobody uses is given back, and the peak of the resident set begins anew. Then, at its
peak, what one step of `robustcompress.train.train` (PGD with --attack-steps) takes on top of the resident set:
  plain          the recipe as it is                 accumulate     in parts of --part images
  checkpointing  blocks are computed again           both
Pixels are random bytes, weights are random: the figures depend on neither. Seconds are not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from benchmarks.model_names import build_named
from benchmarks.trace_memory import begin_peak, status
from robustcompress import Images, Recipe, ThreatModel
from robustcompress.data import Batches
from robustcompress.robust import PGDAT
from robustcompress.train import make_optimizer, train

MODULE = "training_memory"
WAYS = ("plain", "accumulate", "checkpointing", "both")
CASES = (
    *(("resnet18", 32, count) for count in (64, 128, 256)),
    *(("torchvision:resnet18", 224, count) for count in (8, 16, 32)),
)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.child:
        name, size, count, way = options.child
        print(json.dumps(peak(name, int(size), int(count), way, options)))
        return 0
    path = out_path(options, MODULE)
    cases = (("resnet8", 32, 32),) if options.quick else CASES
    results = []
    for name, size, count in cases:
        row: dict[str, Any] = {"model": name, "image_size": size, "batch_size": count, "part": options.part}
        for way in WAYS:
            row[way] = child(name, size, count, way, options)
            print(f"{name}, batch {count}, {way}: {row[way] / 1e6:.0f} MB", file=sys.stderr, flush=True)
        results.append(row)
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    if not options.quick:
        plot(value, path.with_suffix(".png"))
    print(markdown(value))
    return 0


def child(name: str, size: int, count: int, way: str, options: argparse.Namespace) -> int:
    """Measure one figure in a fresh process, in bytes."""
    words = ["--child", name, str(size), str(count), way, "--part", str(options.part)]
    words += ["--attack-steps", str(options.attack_steps), "--threads", str(options.threads)]
    words += ["--seed", str(options.seed)]
    return int(in_fresh_process(MODULE, words, what=name))


def peak(name: str, size: int, count: int, way: str, options: argparse.Namespace) -> int:
    """Bytes that one step takes at its peak, in this process, which should be a fresh one."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = build_named(name).to(memory_format=torch.channels_last)
    parts = -(-count // options.part) if way in ("accumulate", "both") else 1
    recipe = Recipe(batch_size=count, accumulate=parts, checkpointing=way in ("checkpointing", "both"))
    optimizer = make_optimizer(recipe, list(model.parameters()), lr=0.01)

    def step(images: int, settings: Recipe) -> None:
        pixels = torch.randint(256, (images, 3, size, size), dtype=torch.uint8)
        train(
            model,
            Batches(Images(pixels, torch.arange(images) % 10), images, generator=torch.Generator().manual_seed(0)),
            PGDAT(steps=options.attack_steps),
            ThreatModel(),
            settings,
            epochs=1,
            optimizer=optimizer,
            lr=0.01,
            schedule="constant",
            generator=torch.Generator().manual_seed(0),
        )

    step(2, Recipe(batch_size=2))
    before = begin_peak()
    step(count, recipe)
    return status("VmHWM") - before


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    head = ("model", "image", "batch", "plain MB", "accumulate MB", "checkpointing MB", "both MB", "both / plain")
    rows = [
        (
            row["model"],
            *(str(row[key]) for key in ("image_size", "batch_size")),
            *(f"{row[way] / 1e6:.0f}" for way in WAYS),
            f"{row['both'] / row['plain']:.2f}",
        )
        for row in value["results"]
    ]
    return f"{table(head, rows)}\n\n{provenance(value)}"


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """Peak memory against the batch, one panel a network."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in value["results"]))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        rows = [row for row in value["results"] if row["model"] == name]
        for way in WAYS:
            axes.plot([row["batch_size"] for row in rows], [row[way] / 1e6 for row in rows], "o-", label=way)
        axes.set(title=f"{name}, {rows[0]['image_size']} pixels", xlabel="images a step", ylabel="peak of a step (MB)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    return path


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.training_memory --part 16")
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--part", type=positive, default=8, metavar="N", help="images of a part (default: %(default)s)")
    add("--attack-steps", type=positive, default=1, help="PGD steps (default: %(default)s)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
