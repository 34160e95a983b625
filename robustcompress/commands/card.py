"""`robustcompress card`: the model card of a saved result."""

from __future__ import annotations

import argparse
from pathlib import Path

from robustcompress.commands.arguments import add_result_argument, result_from
from robustcompress.errors import Problems
from robustcompress.publish import model_card
from robustcompress.publish.page import check_file, put
from robustcompress.terminal import Output

NAME = "card"
SUMMARY = "write the model card of a saved model"
DESCRIPTION = """\
Write a model card in Markdown, with the front matter that the Hugging Face Hub reads: what the network is for, what it
withstands and what not, with intervals, how it is loaded, and where it comes from. It is yours to edit;
`robustcompress push` sends it as it is."""
EXAMPLES = """\
examples:
  robustcompress card runs/digits --license apache-2.0
  robustcompress card runs/digits -o card.md --repo me/robust-digits"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_result_argument(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the card (default: DIR/README.md)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--license", metavar="ID", help="of the network, such as apache-2.0 (default: none is stated)")
    parser.add_argument(
        "--repo", default="", metavar="OWNER/NAME", help="where it will lie, for the lines that load it"
    )


def run(arguments: argparse.Namespace) -> Output:
    """Write the card."""
    result = result_from(arguments)
    path = arguments.output or arguments.directory / "README.md"
    problems = Problems("the card cannot be written")
    check_file(path, ".md", problems, overwrite=arguments.overwrite)
    problems.raise_if_any()
    files = sorted(entry.name for entry in arguments.directory.iterdir() if entry.is_file())
    card = model_card(result, repo=arguments.repo, license=arguments.license, files=files)
    put(path, card)
    parts = [f"written to {path}"]
    if arguments.license is None:
        parts.append("it states no license: pass --license, such as --license apache-2.0")
    return Output(document={"card": str(path), "license": arguments.license}, parts=tuple(parts))
