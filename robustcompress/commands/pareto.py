"""`robustcompress pareto`: several sizes, and what each withstands."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from robustcompress.commands.arguments import (
    add_data_arguments,
    add_model_arguments,
    add_run_arguments,
    add_training_arguments,
    assignment,
    count_or_all,
    data_from,
    load_weights,
    names,
    objective_from,
    recipe_from,
)
from robustcompress.errors import InputError, Problems
from robustcompress.models import build_model
from robustcompress.pareto import RECORD, carry_out_front, prepare_front
from robustcompress.robust import ThreatModel
from robustcompress.strategies import make_strategy
from robustcompress.terminal import Output, table

NAME = "pareto"
SUMMARY = "compress to several sizes, and set accuracy under attack against cost"
DESCRIPTION = """\
Compress one reference to several budgets, by one strategy or several, and set accuracy under attack against
multiply-adds, size and onnxruntime's latency: a table, DIR/pareto.json and a picture.

The reference itself is trained first, the same way. Every network is saved in DIR. The same command goes on after a
kill and repeats nothing; with more budgets, strategies or attacks it adds what is missing. A budget that cannot be met
is listed with its reason."""
EXAMPLES = """\
examples:
  robustcompress pareto resnet8 --model-arg stem_stride=4 --eps 0.1 --epochs 10 --out runs/front
  robustcompress pareto resnet20 --strategy grape,hydra --budgets 0.1,0.25,0.5 --data cifar10 --out runs/front
  robustcompress pareto resnet20 --data cifar10 --attacks clean,pgd-20,autoattack --test-images 500 --out runs/front
  robustcompress pareto resnet8 --strategy hydra --option granularity=weight --budgets 0.05,0.1 --out runs/sparse
  robustcompress pareto resnet18 --axis latency --budgets 0.3,0.5 --data cifar10 --picture front.svg --out runs/fast"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_model_arguments(parser)
    parser.add_argument(
        "--strategy",
        type=names,
        default=("grape",),
        metavar="A,B",
        help="`robustcompress list strategies` (default: grape)",
    )
    parser.add_argument(
        "--option", type=assignment, action="append", default=[], metavar="K=V", help="an option of the only strategy"
    )
    parser.add_argument(
        "--budgets",
        type=_fractions,
        default=(0.25, 0.5, 0.75),
        metavar="F,F",
        help="fractions of the reference (default: 0.25,0.5,0.75)",
    )
    parser.add_argument(
        "--axis",
        choices=("macs", "params", "latency", "density"),
        help="what they are fractions of (default: macs; density for granularity=weight)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything goes; resumed from")
    parser.add_argument(
        "--picture", default="pareto.png", metavar="NAME", help="the picture in DIR: .png, .svg, .pdf (%(default)s)"
    )
    parser.add_argument("--retry", action="store_true", help="try again what failed in an earlier call")
    parser.add_argument("--round-to", type=int, metavar="N", help="widths become multiples of N (default: by size)")
    add_run_arguments(parser)
    add_training_arguments(parser)
    add_data_arguments(parser, default="the embedded handwritten digits")
    parser.add_argument(
        "--attacks",
        type=names,
        default=("clean", "pgd-20"),
        metavar="A,B",
        help="what is measured on the test images; the last, or autoattack, is what is drawn (default: clean,pgd-20)",
    )
    parser.add_argument(
        "--test-images",
        type=count_or_all,
        default=1000,
        metavar="N",
        help="attack N test images, or all (default: 1000)",
    )


def _fractions(text: str) -> tuple[float, ...]:
    """Read numbers with commas in between.

    Raises:
        argparse.ArgumentTypeError: They are none.
    """
    try:
        return tuple(float(part) for part in names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers with commas between, such as 0.25,0.5") from None


def if_stopped(arguments: argparse.Namespace) -> str:
    """What is lost when the command is stopped: nothing."""
    return ""


def run(arguments: argparse.Namespace) -> Output:
    """Check everything, compress as often as asked, draw."""
    problems = Problems("pareto cannot start")
    if arguments.option and len(arguments.strategy) != 1:
        problems.add("--option belongs to one strategy: name only that one")
    options = dict(arguments.option) if len(arguments.strategy) == 1 else {}
    made = [problems.attempt(lambda kind=kind: make_strategy(kind, **options)) for kind in arguments.strategy]  # type: ignore[misc]
    threat = problems.attempt(lambda: ThreatModel(arguments.norm, arguments.eps))
    objective = problems.attempt(lambda: objective_from(arguments))
    recipe = problems.attempt(lambda: recipe_from(arguments))
    torch.manual_seed(arguments.seed)  # the reference's first weights belong to the seed
    built = problems.attempt(lambda: build_model(arguments.model, **dict(arguments.model_arg)))
    if built is not None and arguments.pretrained_weights is not None:
        problems.attempt(lambda: load_weights(built[0], arguments.pretrained_weights))
    data = problems.attempt(lambda: data_from(arguments, name=arguments.data, seed=arguments.seed))
    if built is None or data is None or None in made:
        problems.raise_if_any(InputError)
    model, spec = built
    base, jobs = prepare_front(
        made,
        arguments.budgets,
        axis=arguments.axis,
        out=arguments.out,
        picture=arguments.picture,
        deadline=None,
        problems=problems,
        model=model,
        data=data,
        threat=0.1 if threat is None else threat,
        objective=objective,
        epochs=arguments.epochs,
        recipe=recipe,
        round_to=arguments.round_to,
        attacks=arguments.attacks,
        test_images=arguments.test_images,
        seed=arguments.seed,
        device=arguments.device,
        pretrained=arguments.pretrained_weights is not None,
        checkpoint_every_s=60.0,
    )
    base = replace(base, spec=spec)
    front = carry_out_front(
        base, jobs, arguments.out, progress=not arguments.quiet, picture=arguments.picture, retry=arguments.retry
    )
    left = ("strategy", "asked for", "on the front of")
    shown = table(front.title, front.columns, front.rows(), left=left)
    picture = str(arguments.out / arguments.picture) if arguments.picture and front.made else None
    said = f"in {arguments.out}: a result for each network, {RECORD}" + (f", {arguments.picture}" if picture else "")
    document = front.to_json() | {"out": str(arguments.out), "picture": picture}
    return Output(document=document, parts=(shown, *front.notes(), said))
