"""`robustcompress export`: the ONNX file of a saved result, or of a model that has not been trained yet."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from torch import nn

from robustcompress.commands.arguments import add_data_arguments, assignment, data_of, result_from
from robustcompress.errors import InputError, Problems
from robustcompress.export import ExportReport, export_onnx
from robustcompress.models import build_model, check_image_size, image_size
from robustcompress.result import RESULT
from robustcompress.terminal import Output, say

NAME = "export"
SUMMARY = "write an ONNX file, checked against the model"
DESCRIPTION = """\
Write one self-contained ONNX file that maps images [batch, 3, H, W] in [0, 1] to logits, and compare it with the model
in onnxruntime, on clean and on adversarial images, before it is put in place.

With --input uint8 the file takes images as they are decoded: bytes [batch, H, W, 3]; with --resize as well, of any
height and width: the short side is scaled to the model's and the centre cropped, as in training.

MODEL in place of DIR is a model's name, as `robustcompress compress` takes it. Its weights are then random: a file to
try its latency on, and nothing else. --image-size says what it shall read, --model-arg what it is built with."""
EXAMPLES = """\
examples:
  robustcompress export --onnx runs/digits
  robustcompress export --onnx runs/digits -o digits.onnx --overwrite
  robustcompress export --onnx runs/digits -o photos.onnx --input uint8 --resize --softmax
  robustcompress export --onnx runs/hydra --data cifar10 --root data --opset 18 --batch 1 --json
  robustcompress export --onnx torchvision:resnet50 --image-size 224 -o untrained.onnx"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "source", metavar="DIR|MODEL", help="a result that `robustcompress compress --out` left, or a model's name"
    )
    parser.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="the factory of the reference, for results of your own models: code is imported only when named here",
    )
    parser.add_argument(
        "--model-arg",
        type=assignment,
        action="append",
        default=[],
        metavar="K=V",
        help="an argument of MODEL's factory",
    )
    parser.add_argument("--onnx", action="store_true", help="the format; ONNX is the only one, and the default")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the file (default: DIR/model.onnx, or MODEL.onnx)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    shape = parser.add_argument_group("what the file takes and gives")
    shape.add_argument(
        "--input",
        choices=("float32", "uint8"),
        default="float32",
        help="float32 [batch, 3, H, W] in [0, 1], or uint8 [batch, H, W, 3] from 0 to 255 (default: %(default)s)",
    )
    shape.add_argument("--resize", action="store_true", help="with --input uint8: take images of any height and width")
    shape.add_argument("--softmax", action="store_true", help="give probabilities in place of logits")
    shape.add_argument(
        "--batch", type=batch, default="dynamic", metavar="N|dynamic", help="images a call (default: %(default)s)"
    )
    shape.add_argument("--opset", type=int, default=20, metavar="N", help="operator set (default: %(default)s)")
    shape.add_argument(
        "--external-data", action="store_true", help="weights in a second file; models beyond 1.9 GB always have one"
    )
    add_data_arguments(parser, default="the embedded digits, for a result that was trained on them; else random images")


def batch(text: str) -> Literal["dynamic"] | int:
    """Read "dynamic" or a number of images.

    Raises:
        argparse.ArgumentTypeError: It is neither.
    """
    if text == "dynamic":
        return "dynamic"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of images, or 'dynamic'") from None


def run(arguments: argparse.Namespace) -> Output:
    """Export with parity on test images where they can be had."""
    if (Path(arguments.source) / RESULT).is_file() or Path(arguments.source).is_dir():
        return _result(arguments)
    return _untrained(arguments)


def _result(arguments: argparse.Namespace) -> Output:
    arguments.directory = Path(arguments.source)
    if arguments.model_arg:
        raise InputError(f"--model-arg is for a model: {arguments.source} is a result, which knows its own")
    result = result_from(arguments)
    path = arguments.output or arguments.directory / "model.onnx"
    _check_free(path, arguments)
    data = data_of(result, arguments)
    sample = None if data is None else data.test.first(14).as_float()
    report = _export(result, path, arguments, sample=sample, threat=result.threat)
    compared = (
        f"compared on random images: pass --data {result.data['name']} to compare on its test images"
        if data is None
        else f"compared on test images of {data.name}, clean and under PGD ({result.threat.label()})"
    )
    document = report.to_json() | {"compared_on": "random images" if data is None else data.name}
    return Output(document=document, parts=(str(report), compared))


def _untrained(arguments: argparse.Namespace) -> Output:
    problems = Problems("export cannot start")
    if arguments.data is not None:
        problems.add("--data: a model without a result knows no images; name the directory of a saved result")
    if arguments.model is not None:
        problems.add(f"--model is for a result that needs it: {arguments.source} is a model's name already")
    if arguments.image_size is not None and arguments.image_size < 1:
        problems.add(f"--image-size {arguments.image_size}: must be positive")
    model: nn.Module | None = problems.attempt(lambda: build_model(arguments.source, **dict(arguments.model_arg))[0])
    if model is None and Path(arguments.source).name != arguments.source:
        problems.add(f"{arguments.source} is no directory of a saved result either")
    problems.raise_if_any()
    assert model is not None
    if arguments.image_size is None:
        made_for = image_size(model)
        height, width = made_for.height, made_for.width
    else:
        height = width = arguments.image_size
        check_image_size(model, height, width)
    path = arguments.output or Path(f"{arguments.source.rpartition(':')[2]}.onnx")
    _check_free(path, arguments)
    warning = f"{arguments.source} has random weights: a file to time, whose answers mean nothing"
    say(warning)
    report = _export(model, path, arguments, image_shape=(3, height, width), metadata={"weights": "random"})
    document = report.to_json() | {"compared_on": "random images", "weights": "random"}
    return Output(document=document, parts=(str(report), f"compared on random images; {warning}"))


def _check_free(path: Path, arguments: argparse.Namespace) -> None:
    if path.is_file() and not arguments.overwrite:
        raise InputError(f"{path} exists; choose another file with -o, or pass --overwrite")


def _export(source: Any, path: Path, arguments: argparse.Namespace, **more: Any) -> ExportReport:
    return export_onnx(
        source,
        path,
        opset=arguments.opset,
        batch=arguments.batch,
        input=arguments.input,
        resize=arguments.resize,
        softmax=arguments.softmax,
        external_data=arguments.external_data,
        overwrite=arguments.overwrite,
        **more,
    )
