"""Does a network chosen for a latency have that latency?

Each network is compressed under `Budget(latency=...)`, a fraction of its reference's time in onnxruntime, and measured
at the end of the run, as every run is, and once more afterwards by a stopwatch that knows nothing of the run ("again").
The training is one epoch on a few random images: what the weights are moves no time. "end" and "again" are fractions of
the reference; "of the limit" is end / asked for. A budget is a limit, and widths are whole channels: a network of few
channels may have to stay below it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

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
from robustcompress import Budget, StructuralEditor, build_model, compress
from robustcompress.calibration import PRECISION
from robustcompress.export.timing import Stopwatch

MODULE = "latency_budget"
CASES = ("resnet8:32", "resnet18:32", "mobilenet_v2:32", "vit_micro:32", "torchvision:resnet18:224")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.cases, options.strategies, options.latency = ["resnet8:16"], ["magnitude"], 0.7
    results = []
    with threads(options.threads):
        for case in options.cases:
            for strategy in options.strategies:
                results.append(run(case, strategy, options.latency, images=options.images, seed=options.seed))
                print(f"{case} {strategy}: {results[-1]['end']:.3f}", file=sys.stderr, flush=True)
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    print(markdown(value))
    return 0


def run(case: str, strategy: str, latency: float, *, images: int, seed: int) -> dict[str, Any]:
    """Compress "NAME:SIZE" to a fraction of its latency, and measure what came of it."""
    name, _, size = case.rpartition(":")
    shape = (3, int(size), int(size))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, _ = build_model(name, num_classes=10)
    x, y = torch.rand(images, *shape, generator=generator), torch.arange(images) % 10
    start = time.perf_counter()
    result = compress(
        model,
        strategy=strategy,
        data={"train": (x, y), "test": (x[:20], y[:20])},
        budget=Budget(latency=latency),
        epochs=1,
        attacks=["clean"],
        seed=seed,
        progress=False,
    )
    seconds = time.perf_counter() - start
    assert result.after.onnx_ms is not None and result.before.onnx_ms is not None
    stopwatch = Stopwatch(StructuralEditor(model, torch.zeros(2, *shape)), shape)
    again = stopwatch.time(result.model, seconds=2.0, precision=PRECISION)
    return {
        "model": name,
        "image_size": shape[1],
        "strategy": strategy,
        "asked": latency,
        "end": result.after.onnx_ms / result.before.onnx_ms,
        "again": again.ratio,
        "macs": result.after.macs / result.before.macs,
        "reference_ms": result.before.onnx_ms,
        "seconds": round(seconds, 1),
    }


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    head = ("model", "image", "strategy", "reference ms", "asked for", "end", "again", "of the limit", "MACs", "run s")
    rows = [
        (
            row["model"],
            str(row["image_size"]),
            row["strategy"],
            f"{row['reference_ms']:.2f}",
            f"{row['asked']:g}",
            f"{row['end']:.3f}",
            f"{row['again']:.3f}",
            f"{100 * row['end'] / row['asked']:.1f} %",
            f"{row['macs']:.3f}",
            f"{row['seconds']:.0f}",
        )
        for row in value["results"]
    ]
    return f"{table(head, rows)}\n\n{provenance(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.latency_budget --cases resnet18:32")
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(CASES), metavar="NAME:SIZE", help="networks and image sizes")
    add("--strategies", nargs="+", default=["uniform", "magnitude"], help="of robustcompress (default: %(default)s)")
    add("--latency", type=float, default=0.5, help="fraction of the reference's time (default: %(default)s)")
    add("--images", type=positive, default=40, help="training images (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
