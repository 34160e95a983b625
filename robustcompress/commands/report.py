"""`robustcompress report`: one page that shows all about a saved result."""

from __future__ import annotations

import argparse
from pathlib import Path

from robustcompress.commands.arguments import (
    add_data_arguments,
    add_result_argument,
    count_or_all,
    data_of,
    fraction,
    names,
    result_from,
)
from robustcompress.errors import InputError
from robustcompress.publish import write_report
from robustcompress.publish.page import CURVE_IMAGES
from robustcompress.publish.page import EXAMPLES as SHOWN
from robustcompress.terminal import Output, say

NAME = "report"
SUMMARY = "write one HTML page that shows all about a saved model"
DESCRIPTION = """\
Write one HTML file about a saved result: costs before and after, accuracy under each attack with intervals, widths,
training, searches, attacked images, ONNX files and other commands' records that lie beside it, provenance, and a recipe
that makes it again. The file needs nothing else, no network and no script, and can be sent as it is.

Recorded accuracies are shown as they are; `robustcompress evaluate --save` measures them again."""
EXAMPLES = """\
examples:
  robustcompress report runs/digits
  robustcompress report runs/digits -o digits.html --curve 0.02,0.05,0.1,0.2
  robustcompress report runs/hydra --data cifar10 --root data --curve 2/255,4/255,8/255,16/255 --overwrite"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_result_argument(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the page (default: DIR/report.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--title", default="", help="heading of the page (default: model and strategy)")
    parser.add_argument(
        "--curve", type=radii, default=(), metavar="EPS,...", help="measure accuracy under PGD-20 at these radii, too"
    )
    parser.add_argument(
        "--curve-images",
        type=count_or_all,
        default=CURVE_IMAGES,
        metavar="N",
        help="test images of that curve, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=SHOWN,
        metavar="N",
        help="attacked images to show, where there are data (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="where the curve is measured (default: %(default)s)")
    add_data_arguments(parser, default="the embedded digits, for a result that was trained on them; else none")


def radii(text: str) -> tuple[float, ...]:
    """Read radii with commas in between, such as "2/255,4/255"."""
    return tuple(fraction(part) for part in names(text))


def run(arguments: argparse.Namespace) -> Output:
    """Write the page."""
    result = result_from(arguments)
    path = arguments.output or arguments.directory / "report.html"
    if path.is_file() and not arguments.overwrite:
        raise InputError(f"{path} exists; choose another file with -o, or pass --overwrite")
    data = data_of(result, arguments)
    if arguments.curve and data is not None:
        say(f"measuring accuracy under PGD-20 at {len(arguments.curve)} radii")
    write_report(
        result,
        path,
        data,
        directory=arguments.directory,
        title=arguments.title,
        examples=arguments.examples,
        curve=arguments.curve,
        curve_images=arguments.curve_images,
        device=arguments.device,
        overwrite=arguments.overwrite,
    )
    size = path.stat().st_size
    parts = [f"written to {path} ({size / 1e3:.0f} kB): open it in a browser"]
    if data is None:
        parts.append(f"without attacked images: pass --data {result.data['name']} (and --root) to show some")
    return Output(document={"report": str(path), "bytes": size, "data": data is not None}, parts=tuple(parts))
