"""What compression is worth where it is deployed: files in onnxruntime, dense, compact, with zeros, in int8.

ResNet-18 with random weights (no figure depends on them): ours at 32 pixels and torchvision's at 224. Each is exported
dense, at a half and a quarter of its multiply-adds, and with 90 % of each convolution's weights set to zero; and each
of these in int8 where quantisation is there. Channels are rounded to the multiple that is measured to be best: the
half-sized network is timed with multiples of 8 and of 16; the one that keeps more of the promised speed-up is used.
All files of one network take turns in `rc.bench_onnx`, each in a process of its own. "gain kept" is how much of the
promised speed-up arrives: (ratio of multiply-adds) / (ratio of times); the aim is 80 %.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import robustcompress as rc
from benchmarks.common import add_out, make_parser, out_path, positive, provenance, record, table, threads, write_json
from benchmarks.latency import compacted, with_zeros

MODULE = "deployment"
DENSE, SPARSE = "dense", "90 % zeros"
FRACTIONS = (0.5, 0.25)
MULTIPLES = (8, 16)
SPARSITY = 0.9
AIM = 0.8
NETWORKS: Mapping[str, int] = {"resnet18": 32, "torchvision:resnet18": 224}
"""Model and pixels a side."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.deployment --seconds 10")
    add_out(parser, MODULE)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each file and setting (default: %(default)s)")
    parser.add_argument("--batches", nargs="+", type=positive, default=[1, 8], help="images a call (default: 1 8)")
    options = parser.parse_args(argv)
    path = out_path(options, MODULE)
    networks = dict(NETWORKS)
    if options.quick:
        networks, options.seconds, options.batches = {"resnet8": 32}, 0.05, [1]
    results = []
    with threads(options.threads), tempfile.TemporaryDirectory() as directory:
        for name, side in networks.items():
            results.append(
                deploy(
                    name,
                    side,
                    Path(directory),
                    batches=options.batches,
                    seconds=options.seconds,
                    threads=options.threads,
                    seed=options.seed,
                )
            )
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    print(markdown(value))
    return 0


def deploy(
    name: str, side: int, directory: Path, *, batches: Sequence[int], seconds: float, threads: int, seed: int
) -> dict[str, Any]:
    """Export every variant of one network and time them in turns."""
    torch.manual_seed(seed)
    model, _ = rc.build_model(name)
    model.eval()
    shape, example = (3, side, side), torch.zeros(1, 3, side, side)
    macs = {DENSE: rc.measure(model, example).macs}
    files = {DENSE: export(model, directory / f"{side}-dense.onnx", shape)}
    halves = {multiple: compacted(model, FRACTIONS[0], multiple, shape) for multiple in MULTIPLES}
    tried = {m: export(half, directory / f"{side}-half-by-{m}.onnx", shape) for m, half in halves.items()}
    rows = rc.bench_onnx([files[DENSE], *tried.values()], threads=[threads], seconds=seconds).rows[1:]
    shares = [rc.measure(half, example).macs / macs[DENSE] for half in halves.values()]
    kept = {m: share / row.ratio for m, share, row in zip(MULTIPLES, shares, rows, strict=True)}
    multiple = max(kept, key=lambda m: kept[m])
    first, *others = FRACTIONS
    files[named(first)], macs[named(first)] = tried[multiple], rc.measure(halves[multiple], example).macs
    variants = {named(fraction): compacted(model, fraction, multiple, shape) for fraction in others}
    variants[SPARSE] = with_zeros(model, SPARSITY)
    for number, (variant, network) in enumerate(variants.items()):
        files[variant] = export(network, directory / f"{side}-{number}.onnx", shape)
        macs[variant] = rc.measure(network, example).macs
    for variant, file in list(files.items()):
        small = file.with_suffix(".int8.onnx")
        if quantised(file, small, shape, seed):
            files[f"{variant}, int8"], macs[f"{variant}, int8"] = small, macs[variant]
    report = rc.bench_onnx(list(files.values()), threads=[threads], batches=batches, seconds=seconds)
    names = {file.name: variant for variant, file in files.items()}
    found = []
    for row in report.to_json()["rows"]:
        variant = names[row.pop("file")]
        promised = macs[variant] / macs[DENSE] * ((1 - SPARSITY) if variant.startswith(SPARSE) else 1)
        about = {key: report.files[files[variant].name][key] for key in ("bytes", "zeros", "precision")}
        found.append(row | about | {"variant": variant, "macs": macs[variant], "macs_ratio": promised})
    about_multiples = {str(m): round(value, 4) for m, value in kept.items()}
    return {"model": name, "side": side, "round_to": multiple, "gain_kept_by_multiple": about_multiples, "rows": found}


def named(fraction: float) -> str:
    """What a compact variant is called."""
    return f"{fraction:g} of the MACs"


def export(network: nn.Module, path: Path, shape: tuple[int, int, int]) -> Path:
    """Write a file, without comparing it: the tests of the export do that."""
    rc.export_onnx(network, path, image_shape=shape, verify=False)
    return path


def quantised(file: Path, target: Path, shape: tuple[int, int, int], seed: int) -> bool:
    """Write an int8 file where this version can; random images stand for real ones, as random weights do."""
    quantize = getattr(rc, "quantize_onnx", None)
    if quantize is None:
        return False
    scores = rc.open_onnx(file).scores(torch.zeros(1, *shape)).shape[1]
    generator = torch.Generator().manual_seed(seed)

    def images(count: int) -> rc.Images:
        pixels = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
        return rc.Images(pixels, torch.arange(count) % scores)

    names = tuple(str(number) for number in range(scores))
    data = rc.DataSplits(name="noise", classes=names, train=images(256), val=images(2), test=images(8))
    try:
        quantize(file, target, data=data, threat=rc.ThreatModel(), judged=8, allow_loss=True)
    except rc.RobustCompressError as error:
        print(f"no int8 of {file.name}: {error}", file=sys.stderr)
        return False
    return True


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    head = [
        "network",
        "variant",
        "images",
        "GMACs",
        "MACs",
        "p50 ms",
        "p95 ms",
        "time",
        "gain kept",
        "peak MB",
        "file MB",
    ]
    rows = []
    for network in value["results"]:
        for row in network["rows"]:
            kept = row["macs_ratio"] / row["ratio"]
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
            cells = [f"{network['model']}, {network['side']} px", row["variant"], str(row["batch"])]
            cells += [f"{row['macs'] / 1e9:.3f}", f"{row['macs_ratio']:.3f}", f"{row['p50_ms']:.2f}"]
            cells += [f"{row['p95_ms']:.2f}", f"{row['ratio']:.3f}", f"{100 * kept:.0f} %", peak]
            rows.append([*cells, f"{row['bytes'] / 1e6:.2f}"])
    chosen = ", ".join(f"{n['model']} {n['round_to']}" for n in value["results"])
    note = f"Channels in multiples of: {chosen}. Zeros save no time; they are counted as if they did."
    return f"{table(head, rows)}\n\n{note} {provenance(value)}"


if __name__ == "__main__":
    sys.exit(main())
