"""`robustcompress latency`: networks to be timed on another device."""

from __future__ import annotations

import argparse
from pathlib import Path

from robustcompress.commands.arguments import assignment
from robustcompress.latency_table import NETWORKS, export_latency
from robustcompress.models import build_model
from robustcompress.terminal import Output

NAME = "latency"
SUMMARY = "write networks to be timed on another device"
DESCRIPTION = """\
Write a directory to be copied to the device that shall run the compact network: networks of several widths as ONNX
files, and measure.py, which times them there (python3 DIR/measure.py) and needs onnxruntime and numpy only. What it
writes, times.json, is for `robustcompress compress --latency-table`: limits on latency are about that device then."""
EXAMPLES = """\
examples:
  robustcompress latency resnet20 phone --num-classes 10
  robustcompress latency torchvision:resnet18 board --image-size 224 --num-classes 10 --round-to 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("model", metavar="MODEL", help="the reference, as `robustcompress compress` takes it")
    parser.add_argument("directory", type=Path, metavar="DIR", help="to be written; must not exist")
    parser.add_argument(
        "--model-arg", type=assignment, action="append", default=[], metavar="K=V", help="an argument of its factory"
    )
    parser.add_argument("--image-size", type=int, default=32, metavar="N", help="pixels a side (default: %(default)s)")
    parser.add_argument("--num-classes", type=int, metavar="N", help="of the data that it will be compressed for")
    parser.add_argument("--round-to", type=int, metavar="N", help="widths become multiples of N (default: by size)")
    parser.add_argument("--networks", type=int, default=NETWORKS, metavar="N", help="how many (default: %(default)s)")


def run(arguments: argparse.Namespace) -> Output:
    """Build the reference, write the directory."""
    model, _ = build_model(arguments.model, **dict(arguments.model_arg))
    directory = export_latency(
        model,
        arguments.directory,
        image_shape=(3, arguments.image_size, arguments.image_size),
        num_classes=arguments.num_classes,
        round_to=arguments.round_to,
        networks=arguments.networks,
        name=arguments.model,
    )
    count = len(list(directory.glob("*.onnx")))
    said = (
        f"{count} networks in {directory}; copy it to the device, run `python3 measure.py` there, bring times.json "
        f"back, and pass --latency-table {directory / 'times.json'}"
    )
    return Output(document={"directory": str(directory), "networks": count}, parts=(said,))
