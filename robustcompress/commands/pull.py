"""`robustcompress pull`: a result from the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from robustcompress.publish import pull
from robustcompress.terminal import Output

NAME = "pull"
SUMMARY = "fetch a saved model from the Hugging Face Hub"
DESCRIPTION = """\
Fetch a result that `robustcompress push` sent: its own files, and the card, ONNX files and records beside it. Only
plain data are fetched: no pickle, no code and no page that could hold a script. The result is loaded once, so that what
comes to lie in DIR is whole; one of an author's own network is built only when --model names its factory."""
EXAMPLES = """\
examples:
  robustcompress pull hf://me/robust-digits runs/digits
  robustcompress pull hf://me/robust-digits@4f2c1d runs/digits"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("address", metavar="hf://OWNER/NAME[@REVISION]", help="the repository")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to put it; must not exist")
    parser.add_argument("--model", metavar="MODULE:FACTORY", help="the factory of the reference, if you trust its code")


def run(arguments: argparse.Namespace) -> Output:
    """Fetch, check, put in place."""
    directory = pull(arguments.address, arguments.directory, model=arguments.model)
    files = sorted(path.name for path in directory.iterdir())
    parts = (f"fetched to {directory}: {', '.join(files)}", f"next: robustcompress evaluate {directory}")
    return Output(document={"directory": str(directory), "files": files}, parts=parts)
