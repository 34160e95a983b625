"""`robustcompress certify`: what no attack can undo, of a saved model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from robustcompress.certify import METHODS, CertificateReport, certify, plot_certificates, save_certificate
from robustcompress.commands.arguments import (
    add_data_arguments,
    add_result_argument,
    count_or_all,
    data_of,
    fraction,
    result_from,
)
from robustcompress.commands.keeping import if_unwritable, kept_in
from robustcompress.errors import InputError
from robustcompress.plots import check_picture
from robustcompress.result import CompressResult
from robustcompress.terminal import Output, evaluation_bar, table

NAME = "certify"
SUMMARY = "prove a lower bound of a saved model's robust accuracy"
DESCRIPTION = """\
Prove of each test image how far it may be changed before the answer can, whatever attack changes it. Attacks give upper
bounds of robust accuracy (`robustcompress evaluate`), certificates lower bounds.

smoothing certifies the network's majority vote under Gaussian noise, in l2: any network, worth something for those
trained with `--objective smoothing`. ibp and crown-ibp certify the network itself, in linf: worth something for those
trained with `--objective ibp` or `crown-ibp`.

The images that are done are kept in DIR/.certify: a stopped run goes on where it was when the same command is given
again."""
EXAMPLES = """\
examples:
  robustcompress certify runs/smoothed --method smoothing --sigma 0.25 --images 100
  robustcompress certify runs/smoothed --sigma 0.25 --n 100000 --images 500 --plot radii.png --save
  robustcompress certify runs/ibp --method crown-ibp --eps 0.03 --json"""

CACHE = ".certify"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_result_argument(parser)
    parser.add_argument(
        "--method", metavar="NAME", help=f"{', '.join(METHODS)} (default: what the model was trained for, or smoothing)"
    )
    parser.add_argument(
        "--images", type=count_or_all, default=100, metavar="N", help="N test images, or all (default: %(default)s)"
    )
    smoothing = parser.add_argument_group("smoothing")
    smoothing.add_argument(
        "--sigma", type=fraction, metavar="F", help="of the noise (default: what the model was trained under, or 0.25)"
    )
    smoothing.add_argument("--n", type=int, metavar="N", help="draws an image (default: 10000; published: 100000)")
    smoothing.add_argument("--n0", type=int, metavar="N", help="draws that guess the class (default: 100)")
    smoothing.add_argument(
        "--alpha", type=float, metavar="F", help="how often a certificate may be wrong (default: 0.001)"
    )
    smoothing.add_argument("--batch-size", type=int, metavar="N", help="draws a forward pass (default: 1000)")
    smoothing.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: %(default)s)")
    bounds = parser.add_argument_group("ibp and crown-ibp")
    bounds.add_argument("--eps", type=fraction, help="linf radius (default: what the model was trained for)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw certified accuracy over the radius")
    parser.add_argument("--save", action="store_true", help="write DIR/certificate.METHOD-STRENGTH.json")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    add_data_arguments(parser, default="the embedded digits, for what was trained on them")


def if_stopped(arguments: argparse.Namespace) -> str:
    """What is lost when the command is stopped: nothing but the image it is at, or where nothing can be kept."""
    return if_unwritable(arguments.directory)


def run(arguments: argparse.Namespace) -> Output:
    """Certify one result."""
    directory: Path = arguments.directory
    if arguments.plot is not None:
        check_picture(arguments.plot)
    result = result_from(arguments)
    method, options = _asked(arguments, result)
    data = data_of(result, arguments)
    if data is None:
        name = result.data["name"]
        raise InputError(f"{directory} was trained on {name!r}: pass --data {name} (and --root), or a directory")
    with evaluation_bar(directory.name) as progress:
        report = certify(
            result,
            data,
            method=method,
            max_images=arguments.images,
            seed=arguments.seed,
            device=arguments.device,
            resume_dir=kept_in(directory, CACHE, "images"),
            progress=progress,
            **options,
        )
    document: dict[str, Any] = {"result": str(directory), "certificate": report.to_json(), "saved": None, "plot": None}
    parts: list[Any] = shown(str(directory), report)
    if arguments.save:
        path = save_certificate(directory, report)
        document["saved"] = str(path)
        parts += ["", f"saved in {path}"]
    if arguments.plot is not None:
        plot_certificates({f"{directory.name}, {report.name}": report}, arguments.plot)
        document["plot"] = str(arguments.plot)
        parts += ["", f"drawn to {arguments.plot}"]
    return Output(document=document, parts=tuple(parts))


def shown(name: str, report: CertificateReport) -> list[Any]:
    """What is printed of a certificate: its table, and what has to be read with it."""
    title = f"{name}: certified by {report.name} ({report.norm}); predicted right: {100 * report.accuracy:.1f} %"
    return [title, table("", ["radius", "certified %", "95 % interval", "n"], report.rows()), *report.notes()]


def _asked(arguments: argparse.Namespace, result: CompressResult) -> tuple[str, dict[str, Any]]:
    """Method and options; what was not said is as in training.

    Raises:
        InputError: An option of another method was given.
    """
    trained = result.settings.get("objective", {})
    trained = trained if isinstance(trained, dict) else {}
    known = trained.get("name") if trained.get("name") in METHODS else "smoothing"
    method = str(arguments.method or known)
    if method not in METHODS:
        return method, {}  # certify() says what there is
    ours = ("sigma", "n0", "n", "alpha", "batch_size") if method == "smoothing" else ("eps",)
    other = {key for key in ("sigma", "n0", "n", "alpha", "batch_size", "eps") if key not in ours}
    given = [f"--{key.replace('_', '-')}" for key in sorted(other) if getattr(arguments, key) is not None]
    if given:
        raise InputError(f"{', '.join(given)}: method {method!r} has no such option; leave it out, or name --method")
    options = {key: getattr(arguments, key) for key in ours if getattr(arguments, key) is not None}
    if method == "smoothing" and "sigma" not in options and trained.get("name") == "smoothing":
        options["sigma"] = float(trained["sigma"])
    return method, options
