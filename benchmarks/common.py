"""What every benchmark shares: how it is called, timed, and written down so that it can be run again.

A record holds the command line, the hardware, the versions, the commit, the seeds, the data and the results. It
holds no host name, no user name and no absolute path.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from robustcompress import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FORMAT = 1
_ABSOLUTE = re.compile(r"^(/|~|\.\./|[A-Za-z]:[\\/])")


def make_parser(module: str, description: str | None, *, example: str, cells: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; its help opens with the module's own header.

    Args:
        module: The benchmark's name.
        description: Its header.
        example: A command line.
        cells: Its runs are cells of a grid, which say their own seeds.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small run that proves the script works, no figure")
    parser.add_argument("--threads", type=positive, default=1, help="torch threads (default: %(default)s)")
    if not cells:
        parser.add_argument("--seed", type=int, default=0, help="seed of weights and images (default: %(default)s)")
    return parser


def positive(text: str) -> int:
    """An argparse type: a whole number, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def add_out(parser: argparse.ArgumentParser, module: str) -> None:
    """Add `--out`, a JSON file."""
    default = RESULTS / f"{module}.json"
    parser.add_argument("--out", type=Path, help=f"JSON file (default: {default.relative_to(ROOT)})")


def out_path(options: argparse.Namespace, module: str) -> Path:
    """Where to write: what was asked for, else the committed place; a quick run must say where."""
    if options.out is not None:
        return Path(options.out)
    if options.quick:
        raise SystemExit("--quick gives no figure worth keeping: say --out FILE, so that no committed result is lost")
    return RESULTS / f"{module}.json"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many torch threads, and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions turn by turn, each round beginning with another one, so that drift and load hit all alike.

    Returns:
        Seconds of each call, by name.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        for offset in range(len(names)):
            name = names[(number + offset) % len(names)]
            start = clock()
            functions[name]()
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def in_fresh_process(
    module: str, words: Sequence[str], *, what: str, environment: Mapping[str, str] | None = None
) -> Any:
    """Run a benchmark in a process of its own, and return the JSON of the last line that it prints.

    Args:
        module: The benchmark's name.
        words: Its arguments.
        what: What is measured there, for the message where it fails.
        environment: Its environment variables; None for our own.

    Raises:
        SystemExit: It failed; the message ends with its last line.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what}: {(done.stderr.strip().splitlines() or ['ended without a word'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of a list of times, in seconds."""
    ordered = sorted(seconds)
    low, _, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": round(statistics.median(ordered), 7),
        "q25": round(low, 7),
        "q75": round(high, 7),
        "n": len(ordered),
    }


def record(
    module: str,
    options: argparse.Namespace,
    argv: Sequence[str],
    results: Any,
    *,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything one needs to know about a run, as plain JSON.

    Args:
        module: The benchmark's name.
        options: Its parsed options.
        argv: What it was called with.
        results: What it found.
        data: Name and hash of the images; None where images do not matter.
    """
    return {
        "format": FORMAT,
        "benchmark": module,
        "command": command(module, argv),
        "quick": bool(options.quick),
        "seed": options.seed,
        "data": dict(data) if data is not None else None,
        "hardware": hardware(options.threads),
        "versions": machine.versions(),
        "code": commit(),
        "results": results,
    }


def command(module: str, argv: Sequence[str]) -> str:
    """The command line; of absolute paths only the last part stays."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *(_anonymous(word) for word in argv)])


def _anonymous(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (Path(value).name if _ABSOLUTE.match(value) else value)


def hardware(threads: int) -> dict[str, Any]:
    """Processor, cores, threads used, and how busy the machine was: a load beyond the threads means shared cores."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return machine.hardware() | {"threads": threads, "load_at_the_end": load}


def commit() -> dict[str, Any]:
    """Hash of the checked-out commit, and whether code differed from it; None where git does not know."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "robustcompress", "benchmarks/*.py")
    return {"commit": head or None, "modified": None if changed is None else bool(changed)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or absent, also when the run is killed."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; its directory is made where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(draft).chmod(0o644)
        Path(draft).replace(path)
    finally:
        Path(draft).unlink(missing_ok=True)


def kept_cell(
    directory: Path | None, name: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """A cell as it was kept with the same settings; else it is made, told to the terminal, and kept.

    Args:
        directory: Where cells are kept; None for nowhere.
        name: Of the cell's file.
        settings: What it depends on beside its name, as plain data.
        make: Makes it.
    """
    path = None if directory is None else directory / f"{name}.json"
    if path is not None and path.is_file():
        value = read_json(path)
        if value["settings"] == settings:
            return dict(value["cell"])
    cell = make()
    print(cell, file=sys.stderr, flush=True)
    if path is not None:
        write_json(path, {"format": 1, "settings": settings, "cell": cell})
    return cell


def read_json(path: Path) -> dict[str, Any]:
    """Read a record back."""
    value: dict[str, Any] = json.loads(path.read_text())
    if value.get("format") != FORMAT:
        raise SystemExit(f"{path.name} has format {value.get('format')!r}, not {FORMAT}: run the benchmark again")
    return value


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 0) -> str:
    """A Markdown table, padded to be read in a terminal too; the first column is text, the others are numbers.

    Args:
        head: The names of the columns.
        rows: The cells.
        words: How many of the last columns are text too; of these, the last is not padded.
    """
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(head))]
    text = {0, *range(len(head) - words, len(head))}
    if words:
        widths[-1] = 3

    def line(row: Sequence[str]) -> str:
        padded = [cell.ljust(widths[i]) if i in text else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        return "| " + " | ".join(padded) + " |"

    rule = "| " + " | ".join("-" * w if i in text else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def provenance(value: Mapping[str, Any]) -> str:
    """One line on where a record's figures come from: the command, the processor, the versions, the commit."""
    machine, code = value["hardware"], value["code"]
    at = "unknown commit" if not code["commit"] else f"commit {code['commit'][:10]}"
    at += " with uncommitted changes" if code["modified"] else ""
    busy = "" if machine["load_at_the_end"] is None else f", load {machine['load_at_the_end']:.1f}"
    return (
        f"`{value['command']}`; {machine['cpu']}, {machine['threads']} of {machine['cores']} cores{busy}; "
        f"torch {value['versions']['torch']}; {at}"
    )
