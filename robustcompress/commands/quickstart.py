"""`robustcompress quickstart`: the whole way in about two minutes, on images that come with the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from robustcompress.quickstart import FAST, FULL, quickstart
from robustcompress.terminal import Output

NAME = "quickstart"
SUMMARY = "see it all work on real images, in about two minutes"
DESCRIPTION = """\
Train a small network on the embedded handwritten digits as it is (none), pruned (hydra) and grown (grape) to half its
multiply-adds; attack all three, export and serve the compact ones with onnxruntime, and print one table."""
EXAMPLES = """\
examples:
  robustcompress quickstart
  robustcompress quickstart --out robustcompress-quickstart-2 --seed 1
  robustcompress quickstart --fast    # a smoke run: trains too briefly for its numbers to mean anything"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("robustcompress-quickstart"),
        metavar="DIR",
        help="where everything is left; must not exist (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seeds everything (default: %(default)s)")
    parser.add_argument(
        "--fast",
        action="store_true",
        help=f"a smoke run of every step: {FAST.epochs:g} epochs in place of {FULL.epochs:g}, "
        f"{FAST.autoattack_images} images for a shortened AutoAttack",
    )


def run(arguments: argparse.Namespace) -> Output:
    """Run it."""
    return quickstart(arguments.out, FAST if arguments.fast else FULL, seed=arguments.seed)
