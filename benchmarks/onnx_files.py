"""What ONNX files gain and lose: nodes, the resize inside, and accuracy in int8 and float16.

"nodes" counts the operators of random networks as torch's exporter translates them, after onnxscript's optimiser (which
every export runs), and after onnxruntime's portable one on top. "resize" puts images through the preprocessing of an
exported file and compares the pixels, in steps of 255, with torch's resize (what named data sets are resized by) and
Pillow's (folders of images); "plain" is the same file without exclude_outside. "quantized" trains a ResNet-8 on the
digits adversarially, and judges each kind of file on the test images, clean and under PGD-20 made from the float
network. No figure is a time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks.common import add_out, make_parser, out_path, provenance, record, table, threads, write_json
from robustcompress import build_model, compress, export_onnx, load_data, quantize_onnx
from robustcompress.artefact.targets import TARGETS
from robustcompress.errors import AccuracyError
from robustcompress.export.ends import preprocessing_of, reference_resize
from robustcompress.export.quiet import quiet
from robustcompress.export.session import open_session

MODULE = "onnx_files"
NETWORKS = ("resnet18", "mobilenet_v2", "vit_tiny")
SIZES = ((480, 640), (224, 224), (97, 131), (20, 31))
INSIDE = 32
EPS = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    networks, sizes, epochs = NETWORKS, SIZES, options.epochs
    if options.quick:
        networks, sizes, epochs = ("resnet8",), SIZES[-1:], 0.2
    with threads(options.threads):
        results = {
            "nodes": [nodes(name) for name in networks],
            "resize": [row for size in sizes for row in resize(size, options.seed)],
            "quantized": quantized(epochs, options.seed),
        }
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    for section in results:
        print(markdown(value, section), end="\n\n")
    return 0


def nodes(name: str) -> dict[str, Any]:
    """Count the operators of one network before and after each optimiser."""
    model = build_model(name)[0].eval()
    row: dict[str, Any] = {"model": name}
    for key, optimize in (("translated", False), ("exported", True)):
        with quiet():
            program = torch.onnx.export(
                model,
                (torch.full((2, 3, 32, 32), 0.5),),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=20,
                optimize=optimize,
                external_data=False,
                verbose=False,
            )
        proto = program.model_proto
        row[key] = len(proto.graph.node)
    row["onnxruntime"] = len(_optimised(proto).graph.node)
    return row


def _optimised(proto: Any) -> Any:
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "m.onnx")
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def resize(size: tuple[int, int], seed: int) -> list[dict[str, Any]]:
    """Compare one size of image, noise and smooth, with torch and with Pillow."""
    import onnx

    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * INSIDE**2, 2)).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        export_onnx(model, path, input="uint8", resize=True)
        proto = preprocessing_of(onnx.load(path))
    session = open_session(proto.SerializeToString())
    for node in proto.graph.node:
        if node.op_type == "Resize":
            node.attribute.remove(next(a for a in node.attribute if a.name == "exclude_outside"))
    plain = open_session(proto.SerializeToString())
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for kind, cells in (("noise", size), ("smooth", (8, 8))):
        drawn = torch.rand(4, 3, *cells, generator=generator)
        pixels = F.interpolate(drawn, size=size, mode="bicubic").clamp(0, 1).mul(255).round().byte()
        raw = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        found, without = (torch.from_numpy(s.run(None, {"images": raw})[0]) * 255 for s in (session, plain))
        by_torch = reference_resize(pixels.float(), INSIDE, INSIDE)
        by_pillow = torch.stack([_pillow(image) for image in raw])
        row: dict[str, Any] = {"images": kind, "height": size[0], "width": size[1]}
        for name, a, b in (("torch", found, by_torch), ("pillow", found, by_pillow), ("plain", without, by_torch)):
            apart = (a - b).abs()
            share = float((apart > 0.5).double().mean())
            row[name] = {"largest": round(float(apart.max())), "share": round(share, 5)}
        rows.append(row)
    return rows


def _pillow(raw: np.ndarray) -> torch.Tensor:
    height, width = raw.shape[:2]
    scale = INSIDE / min(height, width)
    sides = (max(INSIDE, round(width * scale)), max(INSIDE, round(height * scale)))
    big = np.asarray(Image.fromarray(raw).resize(sides, Image.Resampling.BILINEAR))
    top, left = (sides[1] - INSIDE) // 2, (sides[0] - INSIDE) // 2
    return torch.from_numpy(big[top : top + INSIDE, left : left + INSIDE].copy()).permute(2, 0, 1).float()


def quantized(epochs: float, seed: int) -> list[dict[str, Any]]:
    """Train one network and judge each kind of file; one row a file."""
    from robustcompress import ThreatModel

    torch.manual_seed(seed)
    model, _ = build_model("resnet8", num_classes=10, stem_stride=2)
    threat, data = ThreatModel("linf", EPS), load_data("digits")
    result = compress(model, "none", data=data, threat=threat, epochs=epochs, attacks=(), seed=seed, progress=False)
    kinds: list[dict[str, Any]] = [{"target": target} for target in TARGETS]
    kinds += [{"target": "x86", "calibrate": "adversarial"}, {"target": "x86", "keep_first_last": True}]
    kinds += [{"to": "float16"}]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(kinds):
            path = Path(folder) / f"{number}.onnx"
            refused = False
            try:
                report = quantize_onnx(result, path, data=data, seed=seed, **kind)
            except AccuracyError:
                refused = True
                report = quantize_onnx(result, path, data=data, seed=seed, allow_loss=True, **kind)
            said = report.to_json()
            rows.append(kind | {key: said[key] for key in ("to", "target", "bytes", "float_bytes", "clean", "robust")})
            rows[-1]["refused"] = refused
    return rows


def markdown(value: Mapping[str, Any], section: str) -> str:
    """One table, and where it comes from."""
    rows = value["results"][section]
    if section == "nodes":
        head = ["network", "as translated", "as exported", "onnxruntime on top"]
        body = [[row["model"], *(str(row[key]) for key in ("translated", "exported", "onnxruntime"))] for row in rows]
    elif section == "resize":
        head = ["images", "height", "width", "torch: largest", "differ", "Pillow: largest", "differ", "plain: largest"]
        body = []
        for row in rows:
            cells = [row["images"], str(row["height"]), str(row["width"])]
            for name in ("torch", "pillow"):
                cells += [str(row[name]["largest"]), f"{100 * row[name]['share']:.2f} %"]
            body.append([*cells, str(row["plain"]["largest"])])
    else:
        head = ["file", "times smaller", "clean %", "points (95 %)", "PGD-20 %", "points (95 %)"]
        float32 = rows[0]
        shares = (f"{100 * float32[key]['before']['accuracy']:.1f}" for key in ("clean", "robust"))
        clean, robust = shares
        body = [["float32", "1.0", clean, "", robust, ""]]
        for row in rows:
            cells = [_name(row), f"{row['float_bytes'] / row['bytes']:.1f}"]
            for key in ("clean", "robust"):
                change = row[key]
                low, high = (0 - change[end] for end in ("high", "low"))
                cells.append(f"{100 * change['after']['accuracy']:.1f}")
                cells.append(f"{0 - change['loss_points']:+.2f} ({low:+.2f} to {high:+.2f})")
            body.append(cells)
    return f"{table(head, body)}\n\n{provenance(value)}"


def _name(row: Mapping[str, Any]) -> str:
    words = [row["to"], row["target"]]
    words += ["calibrated under attack"] if row.get("calibrate") == "adversarial" else []
    words += ["first and last float"] if row.get("keep_first_last") else []
    return ", ".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.onnx_files")
    add_out(parser, MODULE)
    parser.add_argument("--epochs", type=float, default=8.0, help="of adversarial training (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
