"""`robustcompress sensitivity`: which groups and blocks robust accuracy hangs on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from robustcompress.commands.arguments import (
    add_data_arguments,
    assignment,
    count_or_all,
    data_from,
    data_of,
    fraction,
    load_weights,
    names,
)
from robustcompress.data import DataSplits
from robustcompress.errors import InputError, Problems
from robustcompress.models import build_model
from robustcompress.plots import check_picture
from robustcompress.result import RESULT, CompressResult, load
from robustcompress.robust import ThreatModel
from robustcompress.sensitivity import sensitivity
from robustcompress.sensitivity_plot import plot_sensitivity
from robustcompress.terminal import Output, say, table

NAME = "sensitivity"
SUMMARY = "show which channel groups and blocks robust accuracy hangs on"
DESCRIPTION = """\
Prune each channel group alone to a few shares of its channels, by magnitude, and leave out each block that can leave;
attack every network that this makes anew, and tell what is lost. Nothing is trained.

MODEL|DIR is the directory of a saved result, or a model as `robustcompress compress` takes it with --weights: an
untrained network has no robust accuracy to lose. Validation images are looked at; --split test is for a network that
was trained on them."""
EXAMPLES = """\
examples:
  robustcompress sensitivity runs/digits
  robustcompress sensitivity runs/digits --attack fgsm --shares 0.5 --plot sensitivity.png
  robustcompress sensitivity runs/none --recalibrate --images all --json
  robustcompress sensitivity resnet18 --weights robust.safetensors --data cifar10 --split test --eps 8/255"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("target", metavar="MODEL|DIR", help="a saved result, or a model's name")
    parser.add_argument(
        "--model-arg", type=assignment, action="append", default=[], metavar="K=V", help="an argument of its factory"
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="safetensors with the weights of a model")
    parser.add_argument(
        "--model",
        metavar="MODULE:FACTORY",
        help="the factory of the reference, for results of your own models: code is imported only when named here",
    )
    parser.add_argument(
        "--shares",
        type=_numbers,
        default=(0.75, 0.5, 0.25),
        metavar="F,F",
        help="shares of the channels that are kept (default: 0.75,0.5,0.25)",
    )
    parser.add_argument("--attack", default="pgd-10", metavar="A", help="such as fgsm (default: %(default)s)")
    parser.add_argument(
        "--images", type=count_or_all, default=300, metavar="N", help="judge N images, or all (default: %(default)s)"
    )
    parser.add_argument("--split", choices=("val", "test"), default="val", help="whose images (default: %(default)s)")
    parser.add_argument("--groups", type=names, metavar="A,B", help="look at these groups only")
    parser.add_argument("--no-depth", action="store_true", help="leave the blocks alone")
    parser.add_argument(
        "--recalibrate", action="store_true", help="estimate batch-norm statistics anew on training images"
    )
    parser.add_argument("--eps", type=fraction, help="radius (default: the result's, else 8/255)")
    parser.add_argument("--norm", help="linf or l2 (default: the result's, else linf)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a heat map: .png, .pdf, .svg")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the attack (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_data_arguments(parser, default="the embedded handwritten digits")


def _numbers(text: str) -> tuple[float, ...]:
    """Read numbers with commas in between.

    Raises:
        argparse.ArgumentTypeError: They are none.
    """
    try:
        return tuple(float(part) for part in names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between, such as 0.5,0.25") from None


def run(arguments: argparse.Namespace) -> Output:
    """Cut, attack, tell."""
    problems = Problems("sensitivity cannot start")
    if arguments.plot is not None:
        problems.attempt(lambda: check_picture(arguments.plot))
    subject = problems.attempt(lambda: _subject(arguments))
    data = None if subject is None else problems.attempt(lambda: _data(arguments, subject))
    known = subject.threat if isinstance(subject, CompressResult) else ThreatModel("linf", 8 / 255)
    if arguments.norm not in (None, known.norm) and arguments.eps is None:
        problems.add(f"--norm {arguments.norm}: an eps of {known.norm} means nothing there; give --eps as well")
    eps = known.eps if arguments.eps is None else arguments.eps
    threat = problems.attempt(lambda: ThreatModel(arguments.norm or known.norm, eps))
    problems.raise_if_any()
    assert subject is not None
    found = sensitivity(
        subject,
        data,
        threat,
        shares=arguments.shares,
        attack=arguments.attack,
        images=arguments.images,
        split=arguments.split,
        groups=arguments.groups,
        depth=not arguments.no_depth,
        recalibrate=arguments.recalibrate,
        seed=arguments.seed,
        device=arguments.device,
        progress=not arguments.quiet,
    )
    parts: list[Any] = []
    if found.groups:
        parts.append(table(found.title, found.columns, found.rows(), left=("group",)))
    if found.blocks:
        parts.append(table("Blocks", found.block_columns, found.block_rows(), left=("block",)))
    parts += found.notes()
    document = found.to_json() | {"plot": None}
    if arguments.plot is not None and found.cuts:
        plot_sensitivity(found, arguments.plot)
        document["plot"] = str(arguments.plot)
        parts.append(f"drawn in {arguments.plot}")
    return Output(document=document, parts=tuple(parts))


def _subject(arguments: argparse.Namespace) -> nn.Module | CompressResult:
    """The result, or the model with its weights."""
    directory = Path(arguments.target)
    if (directory / RESULT).is_file():
        if arguments.model_arg or arguments.weights is not None:
            raise InputError("--model-arg and --weights are for a model: a result has its own")
        return load(directory, model=arguments.model)
    if directory.is_dir():
        raise InputError(f"{directory} holds no {RESULT}: name a saved result, or a model")
    model, _ = build_model(arguments.target, **dict(arguments.model_arg))
    if arguments.weights is None:
        say(f"warning: {arguments.target} has no trained weights: pass --weights FILE, or a saved result")
    else:
        load_weights(model, arguments.weights, option="--weights")
    return model


def _data(arguments: argparse.Namespace, subject: nn.Module | CompressResult) -> DataSplits:
    if not isinstance(subject, CompressResult):
        return data_from(arguments, name=arguments.data, seed=arguments.seed)
    data = data_of(subject, arguments)
    if data is None:
        name = subject.data["name"]
        raise InputError(f"{arguments.target} was trained on {name!r}: pass --data {name} (and --root), or a directory")
    return data
