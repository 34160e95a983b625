"""How much memory it takes to find out what a network is made of, against the network's own.

Per network and figure, in a process of its own (Linux): the network is built, memory that nobody uses is given back,
and the peak of the resident set begins anew. Then, at its peak, what comes on top of the resident set:
  forward   one forward pass of one image, without gradients: the yardstick
  trace     `StructuralEditor(model, example)`: graph, groups, and the proof of all groups on a copy
"of the model" is that over the bytes of its parameters and buffers (the aim is at most 2). What a process takes once,
whatever the network (imports at the first trace of any), is not in it. Built-in networks take 32x32 images,
torchvision's 224x224. Weights are random: no figure depends on them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    add_out,
    in_fresh_process,
    make_parser,
    out_path,
    provenance,
    record,
    table,
    write_json,
)
from benchmarks.model_names import build_named
from robustcompress import StructuralEditor
from robustcompress.budget import human

MODULE = "trace_memory"
FIGURES = ("forward", "trace")
MODELS = (
    *("resnet20", "resnet18", "vgg16_bn"),
    *(f"torchvision:{name}" for name in ("mobilenet_v3_small", "efficientnet_b0", "googlenet", "densenet121")),
    *(f"torchvision:{name}" for name in ("resnet18", "resnet50", "resnet152", "swin_t", "convnext_tiny", "vit_b_16")),
    *(f"torchvision:{name}" for name in ("vgg16", "convnext_large")),
)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.child:
        print(json.dumps(measure(*options.child, options.threads, options.seed)))
        return 0
    path = out_path(options, MODULE)
    names = ["resnet8"] if options.quick else options.models
    results = []
    for name in names:
        results.append(run(name, options.threads, options.seed))
        print(f"{name}: {results[-1]['trace'] / results[-1]['bytes']:.2f} of the model", file=sys.stderr, flush=True)
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    print(markdown(value))
    return 0


def run(name: str, threads: int, seed: int) -> dict[str, Any]:
    """Measure one network, each figure in a process of its own; all sizes in bytes."""
    row: dict[str, Any] = {}
    for what in FIGURES:
        words = ["--child", name, what, "--threads", str(threads), "--seed", str(seed)]
        row |= in_fresh_process(MODULE, words, what=name)
    return row


def measure(name: str, what: str, threads: int, seed: int) -> dict[str, Any]:
    """Measure one figure of a network in this process, which should be a fresh one."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    # The first trace of a process imports what all later ones use.
    StructuralEditor(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), torch.zeros(2, 3, 8, 8))
    model = build_named(name).eval()
    size = 224 if name.startswith("torchvision:") else 32
    example = torch.zeros(2, 3, size, size)
    row: dict[str, Any] = {"model": name, "image_size": size, "params": sum(p.numel() for p in model.parameters())}
    row["bytes"] = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    before = begin_peak()
    if what == "trace":
        row["groups"] = len(StructuralEditor(model, example, seed=seed).groups)
    else:
        with torch.no_grad():
            model(example[:1])
    return row | {what: status("VmHWM") - before}


def begin_peak() -> int:
    """Give back what is not used, begin the peak anew, and tell the resident set."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    head = ("model", "parameters", "model MB", "forward MB", "trace MB", "of the model")
    rows = [
        (
            row["model"],
            human(row["params"]),
            *(f"{row[key] / 1e6:.1f}" for key in ("bytes", "forward", "trace")),
            f"{row['trace'] / row['bytes']:.2f}",
        )
        for row in value["results"]
    ]
    return f"{table(head, rows)}\n\n{provenance(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.trace_memory --models torchvision:resnet50")
    add_out(parser, MODULE)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names as build_model reads them")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
