"""`robustcompress push`: a saved result to the Hugging Face Hub."""

from __future__ import annotations

import argparse

from robustcompress.commands.arguments import add_data_arguments, add_result_argument, data_of, result_from
from robustcompress.publish import push
from robustcompress.terminal import Output

NAME = "push"
SUMMARY = "send a saved model to the Hugging Face Hub"
DESCRIPTION = """\
Send a saved result to a repository of the Hugging Face Hub, in one commit: its own files (JSON, safetensors, the
recipe), ONNX files and records of verification and timing that lie beside it, a model card and a report page. README.md
and report.html are written where DIR has none, and sent as they are where it has.

A repository that is made is private, and one that exists must be, unless --public: what was public once cannot be taken
back. The token is that of `hf auth login`, or HF_TOKEN."""
EXAMPLES = """\
examples:
  robustcompress push runs/digits me/robust-digits --license apache-2.0
  robustcompress push runs/hydra me/robust-cifar10 --public --data cifar10 --root data"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_result_argument(parser)
    parser.add_argument("repo", metavar="REPO", help="owner/name; with @branch, a branch that exists")
    parser.add_argument("--public", action="store_true", help="make a new repository public, or send to one that is")
    parser.add_argument("--license", metavar="ID", help="of the network, for the card (default: none is stated)")
    parser.add_argument("--message", default="", help="of the commit (default: model, strategy and seed)")
    add_data_arguments(parser, default="the embedded digits, for a result that was trained on them; else none")


def run(arguments: argparse.Namespace) -> Output:
    """Load, write what is missing, send."""
    data = data_of(result_from(arguments), arguments)
    pushed = push(
        arguments.directory,
        arguments.repo,
        license=arguments.license,
        private=not arguments.public,
        message=arguments.message,
        data=data,
        model=arguments.model,
    )
    sent = pushed.sent
    parts = [
        f"sent to {sent.url} ({'private' if sent.private else 'public'}): {', '.join(sent.files)}",
        f"written for it: {', '.join(pushed.made) or 'nothing'}",
        f"next: rc.load({str(sent.address)!r}), or robustcompress pull {sent.address} DIR",
    ]
    if arguments.public and sent.private:
        parts.append("the repository existed and is private; make it public on its page")
    document = {
        "address": str(sent.address),
        "url": sent.url,
        "private": sent.private,
        "files": list(sent.files),
        "made": list(pushed.made),
    }
    return Output(document=document, parts=tuple(parts))
