"""`robustcompress export`: the ONNX file of a saved result."""

from __future__ import annotations

import argparse
from pathlib import Path

from robustcompress.commands.arguments import add_data_arguments, add_result_argument, data_of, result_from
from robustcompress.errors import InputError
from robustcompress.export import export_onnx
from robustcompress.terminal import Output

NAME = "export"
SUMMARY = "write an ONNX file, checked against the model"
DESCRIPTION = """\
Write one self-contained ONNX file that maps images [batch, 3, H, W] in [0, 1] to logits, and compare it with the model
in onnxruntime, on clean and on adversarial images, before it is put in place."""
EXAMPLES = """\
examples:
  robustcompress export --onnx runs/digits
  robustcompress export --onnx runs/digits -o digits.onnx --overwrite
  robustcompress export --onnx runs/hydra --data cifar10 --root data --opset 18 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_result_argument(parser)
    parser.add_argument("--onnx", action="store_true", help="the format; ONNX is the only one, and the default")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the file (default: DIR/model.onnx)")
    parser.add_argument("--opset", type=int, default=20, metavar="N", help="operator set (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_data_arguments(parser, default="the embedded digits, for a result that was trained on them; else random images")


def run(arguments: argparse.Namespace) -> Output:
    """Export with parity on test images where they can be had."""
    result = result_from(arguments)
    path = arguments.output or arguments.directory / "model.onnx"
    if path.is_file() and not arguments.overwrite:
        raise InputError(f"{path} exists; choose another file with -o, or pass --overwrite")
    data = data_of(result, arguments)
    sample = None if data is None else data.test.first(14).as_float()
    report = export_onnx(
        result, path, opset=arguments.opset, sample=sample, threat=result.threat, overwrite=arguments.overwrite
    )
    compared = (
        f"compared on random images: pass --data {result.data['name']} to compare on its test images"
        if data is None
        else f"compared on test images of {data.name}, clean and under PGD ({result.threat.label()})"
    )
    document = report.to_json() | {"compared_on": "random images" if data is None else data.name}
    return Output(document=document, parts=(str(report), compared))
