"""The command line: which command, how its answer is printed, and what each failure exits with."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from robustcompress import __version__
from robustcompress.commands import COMMANDS
from robustcompress.distributed import launched
from robustcompress.errors import BudgetError, InputError, Interrupted, ParityError, ResultError, RobustCompressError
from robustcompress.interrupt import graceful
from robustcompress.terminal import Output

OK, FAILED, BAD_INPUT, OVER_BUDGET, NO_PARITY, INTERRUPTED = 0, 1, 2, 3, 4, 130
SHARED = ("compress", "run", "evaluate")
"""Commands that several processes, started by torchrun, carry out together."""

SIGNALLED = 128
"""A signal that stopped a command is told by this plus its number, as shells do."""

EXIT_CODES = """\
exit codes:
  0    done
  1    something failed that should not have
  2    bad input: an argument, a file, a model or a saved result cannot be used
  3    the budget cannot be reached, or the model already meets it
  4    the written file does not compute what the model computes, or loses more accuracy than it may
  130  interrupted (Ctrl-C); 143 where SIGTERM did it. A long command stops after the step it is at, and says how the
       same command goes on; the second Ctrl-C stops at once"""

EXAMPLES = """\
examples:
  robustcompress quickstart
  robustcompress compress resnet20 --strategy grape --data cifar10 --root data --macs 0.5 --out runs/grape
  robustcompress evaluate runs/grape --attacks clean,pgd-20,autoattack
  robustcompress export --onnx runs/grape"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command; each sets `command` to the module that carries it out."""
    parser = argparse.ArgumentParser(
        prog="robustcompress",
        description="Compact, adversarially robust vision models: grow or prune under one budget, verify, export.",
        epilog=f"{EXAMPLES}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"robustcompress {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=f"{command.EXAMPLES}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(sub)
        sub.add_argument(
            "--json", action="store_true", help="print one JSON document on standard output and nothing else there"
        )
        sub.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command.

    Args:
        argv: The arguments after the program's name; those of the process where None.

    Returns:
        The exit code, as `--help` lists them.
    """
    rank = int(os.environ["RANK"]) if launched() else 0
    with contextlib.nullcontext() if rank == 0 else _silent():
        try:
            arguments = build_parser().parse_args(argv)
        except SystemExit as stop:  # argparse has printed its help, or what is wrong
            return int(stop.code or OK)
    tell = getattr(arguments.command, "if_stopped", None)  # of long commands alone
    lost: str | None = None if tell is None else tell(arguments)
    try:
        # Libraries that print while they work must not spoil the one document on standard output.
        with contextlib.redirect_stdout(sys.stderr), graceful() if lost is not None else contextlib.nullcontext():
            _check_alone(arguments.command.NAME)
            output: Output = arguments.command.run(arguments)
        if rank == 0:
            _print(output, as_json=arguments.json)
    except Interrupted as stop:
        if rank:
            return SIGNALLED + stop.signal
        return _stopped(stop, lost or "", _this_command(argv), as_json=arguments.json)
    except (RobustCompressError, OSError) as error:
        code, message = _explain(error)
        if rank:  # bad input is what the first process is told too
            if code == FAILED:
                print(f"error in process {rank}: {message}", file=sys.stderr)
            return code
        print(f"error: {message}", file=sys.stderr)
        if arguments.json:
            kind = type(error).__name__
            print(json.dumps({"error": {"kind": kind, "message": message}, "exit_code": code}, indent=1))
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return OK


def _check_alone(name: str) -> None:
    """Refuse several processes for a command that one carries out."""
    if launched() and os.environ["WORLD_SIZE"] != "1" and name not in SHARED:
        raise InputError(f"{name} is carried out by one process: leave torchrun out ({', '.join(SHARED)} take several)")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Print nothing: the first process says it."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _stopped(stop: Interrupted, lost: str, again: str, *, as_json: bool) -> int:
    """Say what was stopped, and how it goes on; return the exit code."""
    code, message = SIGNALLED + stop.signal, str(stop).partition("; the same call")[0]
    print(f"interrupted: {message}", lost or f"go on with:\n  {again}", sep="\n", file=sys.stderr)
    if as_json:
        error = {"kind": type(stop).__name__, "message": message}
        print(json.dumps({"error": error, "exit_code": code, "resume": None if lost else again}, indent=1))
    return code


def _this_command(argv: Sequence[str] | None) -> str:
    """What a shell has to be given to do the same again."""
    if launched():
        return "the same torchrun command"
    words = sys.argv[1:] if argv is None else argv
    program = ["robustcompress"]
    if Path(sys.argv[0]).name == "__main__.py":
        program = [sys.executable, "-m", "robustcompress"]
    elif Path(sys.argv[0]).name == "robustcompress":
        program = [sys.argv[0]]
    return shlex.join([*program, *(str(word) for word in words)])


def _print(output: Output, *, as_json: bool) -> None:
    try:
        if as_json:
            print(json.dumps(output.document, indent=1, allow_nan=False))
        else:
            output.show()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: RobustCompressError | OSError) -> tuple[int, str]:
    """Return exit code and message; errors that no user caused are raised again, with their traceback."""
    if isinstance(error, OSError):
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            return BAD_INPUT, f"a file could not be written ({error.strerror}): make room and repeat the command"
        if error.filename is None:  # not about a path that anybody named
            raise error
        return BAD_INPUT, f"{error.filename}: {error.strerror}"
    # BudgetError is an InputError too, so it is asked for first.
    for kind, code in ((BudgetError, OVER_BUDGET), (ParityError, NO_PARITY), ((InputError, ResultError), BAD_INPUT)):
        if isinstance(error, kind):
            return code, str(error)
    return FAILED, str(error)
