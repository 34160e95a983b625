"""What `compress` and `run` keep while they last, and how the same command goes on from it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from robustcompress.checkpoint import remove
from robustcompress.distributed import current
from robustcompress.resolve import Request
from robustcompress.result import RESULT, check_target
from robustcompress.series import CHECKPOINT, REQUEST, digest_of, read_json
from robustcompress.smallest import clear
from robustcompress.terminal import say

NONE = "none"


def add_keeping_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--out` and `--checkpoint`."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="save the result here; must not exist")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="keep a checkpoint here every minute, which the same command goes on from after a kill; none keeps none "
        f"(default: beside --out, as DIR{CHECKPOINT})",
    )


def checkpoint_of(arguments: argparse.Namespace) -> Path | None:
    """Where the run is to be recorded; None for nowhere."""
    if arguments.checkpoint is not None:
        return None if str(arguments.checkpoint) == NONE else arguments.checkpoint
    return None if arguments.out is None else arguments.out.with_name(f"{arguments.out.name}{CHECKPOINT}")


def if_stopped(arguments: argparse.Namespace) -> str:
    """What is lost when the command is stopped; nothing where the same command goes on."""
    if checkpoint_of(arguments) is not None:
        return ""
    return "nothing is kept of it: with --checkpoint DIR, or --out DIR, the same command would go on"


def kept_in(directory: Path, name: str, what: str) -> Path | None:
    """A directory in a saved result for what is finished; None, and said, where the result may only be read.

    Args:
        directory: Of the result.
        name: Of the directory in it.
        what: What is finished, in the plural.
    """
    place = directory / name
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        say(f"finished {what} are not kept: {place} cannot be made ({error.strerror})")
        return None
    return place


def if_unwritable(directory: Path) -> str:
    """What is lost when a command is stopped that keeps what is finished in a directory: nothing where it may."""
    return "" if os.access(directory, os.W_OK) else f"nothing is kept of it: {directory} may not be written to"


def is_result(out: Path | None) -> bool:
    """Whether a result lies there already, which may be that of this very command."""
    return out is not None and (out / RESULT).is_file()


def is_finished(request: Request, out: Path | None, **also: Any) -> bool:
    """Whether the result of this very request is there: an earlier call saved it, and was killed then or was not.

    Args:
        request: What is asked for; its report may have been made later.
        out: Where the result would go.
        also: What the settings of the result must hold besides.

    Raises:
        InputError: Something else is in the place.
    """
    return current().only_first(lambda: _is_finished(request, out, **also))


def _is_finished(request: Request, out: Path | None, **also: Any) -> bool:
    if out is None or not is_result(out):
        return False
    record = read_json(out / RESULT) or {}
    settings = record.get("settings") or {}
    if {key: settings.get(key) for key in (REQUEST, *also)} != {REQUEST: digest_of(request), **also}:
        check_target(out)
    return True


def discard(checkpoint: Path | None) -> None:
    """Remove what was kept of a run, or of a search for the smallest network, once its result is safe."""
    if checkpoint is None or not checkpoint.is_dir():
        return
    try:
        clear(checkpoint)
        remove(checkpoint)
    except OSError as error:  # no reason to end in an error
        say(f"{checkpoint} could not be removed ({error.strerror}): remove it by hand")
