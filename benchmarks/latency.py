"""Do fewer multiply-adds mean less time in onnxruntime?

The CIFAR form of ResNet-18 is exported dense, compact at a half and at a quarter of its multiply-adds (every group
scaled by one ratio, widths in multiples of 8, channels removed by the editor), and with 90 % of each convolution's
weights set to zero in place (the smallest ones: what unstructured pruning leaves behind). onnxruntime runs the four
files in turns, one thread, batch 1 and batch 8; medians. "latency" and "MACs" are ratios to the dense file, and
"gain kept" is how much of the promised speed-up arrives: (MACs ratio) / (latency ratio); 100 % would be all of it.
For the zeros, the ratio of MACs is what it would be if zeros were skipped; they are not. Weights are random: no figure
depends on them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
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
from robustcompress import StructuralEditor, build_model, export_onnx, measure
from robustcompress.budget import CostModel
from robustcompress.export import load_session
from robustcompress.shapes import floor_widths, rounded

MODULE = "latency"
DENSE, SPARSE = "dense", "90 % zeros"
SPARSITY = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.models, options.rounds, options.fractions = ["resnet8"], 3, [0.5]
    results = []
    with threads(options.threads):
        for name in options.models:
            results += compare(
                name,
                options.fractions,
                round_to=options.round_to,
                batches=options.batches,
                rounds=options.rounds,
                threads=options.threads,
                seed=options.seed,
            )
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    print(markdown(value))
    return 0


def compare(
    name: str,
    fractions: Sequence[float],
    *,
    round_to: int,
    batches: Sequence[int],
    rounds: int,
    threads: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Export the variants of one network and time them; one row a variant."""
    torch.manual_seed(seed)
    model, _ = build_model(name)
    model.eval()
    variants = {DENSE: model}
    variants |= {f"compact {fraction:g}": compacted(model, fraction, round_to) for fraction in fractions}
    variants[SPARSE] = with_zeros(model, SPARSITY)
    dense_macs = measure(model, torch.zeros(1, 3, 32, 32)).macs
    rows: list[dict[str, Any]] = []
    for variant, network in variants.items():
        cost = measure(network, torch.zeros(1, 3, 32, 32))
        share = _nonzero(network) if variant == SPARSE else 1.0
        rows.append({"model": name, "variant": variant, "macs": cost.macs, "params": cost.params})
        rows[-1] |= {"macs_ratio": round(share * cost.macs / dense_macs, 4), "latency": {}}
    with tempfile.TemporaryDirectory() as directory:
        sessions: dict[str, Any] = {}
        for number, (row, network) in enumerate(zip(rows, variants.values(), strict=True)):
            report = export_onnx(network, Path(directory) / f"{number}.onnx")
            row["bytes"] = report.bytes
            sessions[row["variant"]] = load_session(report.path, threads=threads)
        for batch in batches:
            images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).numpy()
            calls = {key: partial(session.run, None, {"images": images}) for key, session in sessions.items()}
            times = interleaved(calls, rounds, warm_up=3)
            dense = summary(times[DENSE])["median"]
            for row in rows:
                seconds = summary(times[row["variant"]])
                row["latency"][str(batch)] = seconds | {"ratio": round(seconds["median"] / dense, 4)}
    return rows


def compacted(model: nn.Module, fraction: float, round_to: int, shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """A copy whose groups all keep the largest common share of their channels that meets the fraction of MACs."""
    twin, example = copy.deepcopy(model), torch.zeros(2, *shape)
    editor = StructuralEditor(twin, example)
    cost, floor = CostModel(editor, example), floor_widths(editor, round_to)
    limit = fraction * cost.predict({})[0]

    def widths(ratio: float) -> dict[str, int]:
        return {g.name: rounded(ratio * g.width, round_to, floor[g.name], g.width) for g in editor.editable}

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.predict(widths(middle))[0] <= limit else (low, middle)
    for group, width in widths(low).items():
        if width < editor.widths[group]:
            editor.prune(group, range(width))
    return twin


def with_zeros(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy with this share of every convolution's weights, the smallest, set to zero."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.data
            count = int(sparsity * weight.numel())
            weight.view(-1)[weight.abs().flatten().argsort()[:count]] = 0.0
    return twin


def _nonzero(model: nn.Module) -> float:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    batches = list(value["results"][0]["latency"])
    head = ["model", "variant", "MMACs", "MACs", "file MB"]
    for batch in batches:
        head += [f"ms at {batch}", "latency", "gain kept"]
    rows = []
    for row in value["results"]:
        cells = [row["model"], row["variant"], f"{row['macs'] / 1e6:.1f}", f"{row['macs_ratio']:.3f}"]
        cells.append(f"{row['bytes'] / 1e6:.2f}")
        for batch in batches:
            seconds = row["latency"][batch]
            kept = row["macs_ratio"] / seconds["ratio"]
            cells += [f"{1e3 * seconds['median']:.2f}", f"{seconds['ratio']:.3f}", f"{100 * kept:.0f} %"]
        rows.append(cells)
    return f"{table(head, rows)}\n\n{provenance(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.latency --rounds 40")
    add_out(parser, MODULE)
    parser.add_argument("--models", nargs="+", default=["resnet18"], help="built-in networks (default: resnet18)")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.5, 0.25], help="of MACs (default: 0.5 0.25)")
    parser.add_argument("--round-to", type=positive, default=8, help="widths' multiple (default: %(default)s)")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--rounds", type=positive, default=40, help="runs of each file (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
