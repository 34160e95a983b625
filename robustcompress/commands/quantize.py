"""`robustcompress quantize`: a file in int8 or float16, and what it loses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from robustcompress.artefact import open_onnx, quantize_onnx
from robustcompress.artefact.quantize import MAX_LOSS
from robustcompress.artefact.targets import TARGETS
from robustcompress.commands.arguments import (
    add_data_arguments,
    count_or_all,
    data_from,
    data_of,
    fraction,
    result_from,
)
from robustcompress.data import DataSplits
from robustcompress.errors import InputError
from robustcompress.result import CompressResult
from robustcompress.robust import ThreatModel
from robustcompress.terminal import Output, say

NAME = "quantize"
SUMMARY = "write an ONNX file in int8 or float16, and say what it loses"
DESCRIPTION = """\
Write an exported file in 8-bit integers, or in float16 for GPUs. Ranges of activations come from training images. The
file is then judged on test images beside the float file, clean and on adversarial images made from the float network;
one that loses more than --max-loss percentage points is not written.

Adversarial images need the network in torch: that of the result, where DIR is named; for a FILE, name its result with
--result. They were not made against the smaller file itself: attack that with `robustcompress evaluate`.

targets of int8:
""" + "\n".join(f"  {name:<9} {target.words}" for name, target in TARGETS.items())
EXAMPLES = """\
examples:
  robustcompress quantize runs/digits --target x86-vnni
  robustcompress quantize digits.onnx --result runs/digits --target arm -o digits.arm.onnx
  robustcompress quantize runs/hydra --data cifar10 --root data --calibrate adversarial --keep-first-last
  robustcompress quantize digits.onnx --to float16 --max-loss 0.5 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("source", type=Path, metavar="FILE|DIR", help="a float32 ONNX file, or a saved result")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the new file (default: FILE.int8.onnx, or DIR/model.int8.onnx)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--to", choices=("int8", "float16"), default="int8", help="(default: %(default)s)")
    parser.add_argument(
        "--target", choices=tuple(TARGETS), help="the processor that will run it (default: x86; gpu for float16)"
    )
    parser.add_argument("--result", type=Path, metavar="DIR", help="the result that FILE was exported from")
    parser.add_argument(
        "--model", metavar="MODULE:FACTORY", help="the factory of the reference, for results of your own models"
    )
    ranges = parser.add_argument_group("ranges of activations")
    ranges.add_argument("--calibrate", choices=("clean", "adversarial"), default="clean", help="(default: %(default)s)")
    ranges.add_argument(
        "--method", choices=("percentile", "entropy", "minmax"), default="percentile", help="(default: %(default)s)"
    )
    ranges.add_argument(
        "--calibration-images", type=int, default=256, metavar="N", help="training images (default: %(default)s)"
    )
    floats = parser.add_argument_group("what stays float")
    floats.add_argument("--keep-first-last", action="store_true", help="the first and the last layer")
    floats.add_argument(
        "--keep-sensitive", type=int, default=0, metavar="N", help="the N layers that alone change the scores most"
    )
    floats.add_argument("--float16-io", action="store_true", help="with float16: take and give float16 as well")
    limits = parser.add_argument_group("what it may lose")
    limits.add_argument(
        "--max-loss", type=float, default=MAX_LOSS, metavar="POINTS", help="percentage points (default: %(default)s)"
    )
    limits.add_argument("--allow-loss", action="store_true", help="write it whatever it loses")
    limits.add_argument(
        "--images", type=count_or_all, default=1000, metavar="N", help="test images, or all (default: %(default)s)"
    )
    limits.add_argument("--attack", default="pgd-20", help="makes the adversarial images (default: %(default)s)")
    limits.add_argument("--eps", type=fraction, help="another radius than the model was trained for, such as 4/255")
    limits.add_argument("--seed", type=int, default=0, metavar="N", help="of the attacks (default: %(default)s)")
    add_data_arguments(parser, default="the embedded digits, for a network that was trained on them")


def run(arguments: argparse.Namespace) -> Output:
    """Quantize, and compare with the float file."""
    source: Path = arguments.source
    directory = source if source.is_dir() else arguments.result
    if source.is_dir() and arguments.result is not None:
        raise InputError(f"--result is for a file: {source} is a result already")
    if directory is None and arguments.eps is not None:
        raise InputError("--eps is for adversarial images, which are made from the network in torch: pass --result too")
    suffix = f".{arguments.to}.onnx"
    path = arguments.output or (source / f"model{suffix}" if source.is_dir() else source.with_suffix(suffix))
    if path.is_file() and not arguments.overwrite:
        raise InputError(f"{path} exists; choose another file with -o, or pass --overwrite")
    result: CompressResult | None = None
    if directory is not None:
        arguments.directory = directory
        result = result_from(arguments)
    data = data_of(result, arguments) if result is not None else _data_of_file(source, arguments)
    if data is None:
        assert result is not None
        name = result.data["name"]
        raise InputError(f"{directory} was trained on {name!r}: pass --data {name} (and --root), or a directory")
    threat = None
    if arguments.eps is not None:
        known = result.threat if result is not None else None
        threat = ThreatModel(known.norm if known is not None else "linf", arguments.eps)
    report = quantize_onnx(
        result if source.is_dir() else source,
        path,
        data=data,
        to=arguments.to,
        target=arguments.target,
        model=result,
        calibrate=arguments.calibrate,
        method=arguments.method,
        images=arguments.calibration_images,
        keep_first_last=arguments.keep_first_last,
        keep_sensitive=arguments.keep_sensitive,
        float16_io=arguments.float16_io,
        threat=threat,
        attack=arguments.attack,
        judged=arguments.images,
        max_loss=arguments.max_loss,
        allow_loss=arguments.allow_loss,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
        progress=say,
    )
    return Output(document=report.to_json(), parts=(str(report),))


def _data_of_file(source: Path, arguments: argparse.Namespace) -> DataSplits:
    """The images that are named; else the embedded digits, for a file that says it is about them."""
    if arguments.data is not None:
        return data_from(arguments, name=arguments.data)
    told = open_onnx(source).metadata.get("data", "null")
    try:
        name = json.loads(told)["name"]
    except (ValueError, TypeError, KeyError):
        name = None
    if name != "digits":
        said = f"; it was trained on {name!r}" if isinstance(name, str) else ""
        raise InputError(f"--data: name the images that {source} was trained on{said}")
    return data_from(arguments, name="digits")
