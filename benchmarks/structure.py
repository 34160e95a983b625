"""How long it takes to find out what a network is made of, and to edit it.

Per network, in turns, with fresh copies outside the clock:
  trace     `StructuralEditor(model, example)`: graph, groups, and the proof of all groups on a copy
  graph     torch-pruning's own `DependencyGraph().build_dependency` of a copy on the same example (batch 2, as it
            needs); "of it" is trace / graph
  forward   one forward pass at batch 1 without gradients: the yardstick
  edits     every editable group is pruned to half its width, then grown back (init "pair"); seconds per edit, median
Medians over the rounds (and, for edits, over groups). Built-in networks take 32x32 images, torchvision's 224x224.
Weights are random: no figure depends on them. The plot shows how trace and edits grow with the number of layers.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import (
    add_out,
    interleaved,
    make_parser,
    out_path,
    positive,
    provenance,
    record,
    summary,
    table,
    threads,
    write_json,
)
from robustcompress import StructuralEditor, build_model

MODULE = "structure"
MODELS = (
    *("resnet18", "resnet20", "wrn_16_4", "vgg16_bn", "mobilenet_v2", "densenet121"),
    *(f"torchvision:resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("torchvision:vit_b_16", "torchvision:swin_t", "torchvision:convnext_tiny"),
)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.models, options.rounds = ["resnet8"], 1
    with threads(options.threads):
        results = []
        for name in options.models:
            results.append(measure(name, options.rounds, image_size=options.image_size, seed=options.seed))
            print(f"{name}: {results[-1]['trace']['median']:.2f} s", file=sys.stderr, flush=True)
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    print(markdown(value))
    return 0


def measure(name: str, rounds: int, *, image_size: int = 224, seed: int = 0) -> dict[str, Any]:
    """Time one network; all times in seconds."""
    torch.manual_seed(seed)
    model, _ = build_model(name)
    model.eval()
    size = image_size if name.startswith("torchvision:") else 32
    example = torch.rand(2, 3, size, size)
    StructuralEditor(model, example, seed=seed)  # imports what it needs
    copies = [copy.deepcopy(model) for _ in range(rounds + 1)]
    editors: list[StructuralEditor] = []

    def trace() -> None:
        editors[:] = [StructuralEditor(model, example, seed=seed)]

    def forward() -> None:
        with torch.no_grad():
            model(example[:1])

    times = interleaved({"trace": trace, "graph": lambda: _graph(copies.pop(), example), "forward": forward}, rounds)
    times["forward"] += interleaved({"forward": forward}, 5 * rounds)["forward"]
    prunes, grows = _edits(editors[0])
    return {
        "model": name,
        "image_size": size,
        "params": sum(p.numel() for p in model.parameters()),
        "layers": sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()),
        "groups": len(editors[0].groups),
        "editable": len(editors[0].editable),
        "trace": summary(times["trace"]),
        "graph": summary(times["graph"]),
        "forward": summary(times["forward"]),
        "prune": summary(prunes) | {"max": max(prunes)},
        "grow": summary(grows) | {"max": max(grows)},
    }


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """Seconds of a trace, and of an edit, against the number of layers, for one family of networks."""
    import matplotlib.pyplot as plt

    rows = [row for row in value["results"] if row["model"].startswith("torchvision:resnet")]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    layers = [row["layers"] for row in rows]
    for label, key, colour in (("trace and proof", "trace", "#0072B2"), ("torch-pruning's graph", "graph", "#999999")):
        seconds = [row[key]["median"] for row in rows]
        axes[0].plot(layers, seconds, marker="o", color=colour)
        axes[0].annotate(label, (layers[-1], seconds[-1]), ha="right", va="bottom", color=colour, fontsize=9)
    for label, key, colour in (("pruning", "prune", "#D55E00"), ("growing", "grow", "#009E73")):
        axes[1].plot(layers, [1e3 * row[key]["median"] for row in rows], marker="o", color=colour, label=label)
    axes[1].plot(layers, [1e3 * row["forward"]["median"] for row in rows], marker="o", color="#999999", label="forward")
    axes[1].legend(frameon=False, fontsize=9)
    for axis, title in zip(axes, ("seconds to trace a network", "milliseconds for one group"), strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("layers of ResNet-18 to ResNet-152")
        axis.set_xlim(0)
        axis.set_ylim(0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _graph(model: nn.Module, example: torch.Tensor) -> None:
    # Measured beside ours on purpose; in the package itself torch_pruning lives in one file.
    import torch_pruning  # noqa: TID251

    torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example, verbose=False)


def _edits(editor: StructuralEditor) -> tuple[list[float], list[float]]:
    prunes, grows = [], []
    for group in editor.editable:
        half = max(group.min_width, group.width // 2)
        if half == group.width:
            continue
        start = time.perf_counter()
        editor.prune(group.name, range(half))
        prunes.append(time.perf_counter() - start)
        start = time.perf_counter()
        editor.grow(group.name, group.width - half)
        grows.append(time.perf_counter() - start)
    return prunes, grows


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    head = (
        "model",
        "image",
        "groups",
        "trace s",
        "graph s",
        "of it",
        "prune ms",
        "grow ms",
        "slowest ms",
        "forward ms",
    )
    rows = [
        (
            row["model"],
            str(row["image_size"]),
            str(row["editable"]),
            f"{row['trace']['median']:.2f}",
            f"{row['graph']['median']:.2f}",
            f"{row['trace']['median'] / row['graph']['median']:.1f}x",
            f"{1e3 * row['prune']['median']:.1f}",
            f"{1e3 * row['grow']['median']:.1f}",
            f"{1e3 * max(row['prune']['max'], row['grow']['max']):.1f}",
            f"{1e3 * row['forward']['median']:.1f}",
        )
        for row in value["results"]
    ]
    return f"{table(head, rows)}\n\n{provenance(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.structure --rounds 3")
    add_out(parser, MODULE)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names as build_model reads them")
    parser.add_argument("--rounds", type=positive, default=3, help="traces of each network (default: %(default)s)")
    parser.add_argument("--image-size", type=positive, default=224, help="for torchvision's networks (default: 224)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
