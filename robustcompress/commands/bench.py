"""`robustcompress bench`: how long ONNX files take in onnxruntime, compared in turns."""

from __future__ import annotations

import argparse
from pathlib import Path

from robustcompress.artefact.bench import COLUMNS, CPU, bench_onnx
from robustcompress.commands.arguments import check_output, names
from robustcompress.durable import write_json
from robustcompress.terminal import Output, table

NAME = "bench"
SUMMARY = "time ONNX files, compared in turns"
DESCRIPTION = """\
Time ONNX files in onnxruntime: median and 95th percentile, throughput, peak memory and size. The files take turns,
each in a process of its own, and are compared with the first. Close what else runs: a busy machine shows in the
quartiles."""
EXAMPLES = """\
examples:
  robustcompress bench runs/none/model.onnx runs/grape/model.onnx
  robustcompress bench dense.onnx compact.onnx compact.int8.onnx --threads 1,2 --batch 1,8 --save
  robustcompress bench model.onnx --provider cuda --batch 64 --seconds 10 --json"""

SUFFIX = ".bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE.onnx", help="the files; the first is the reference"
    )
    parser.add_argument("--threads", type=counts, default=(1,), metavar="N,M", help="of onnxruntime (default: 1)")
    parser.add_argument("--batch", type=counts, default=(1,), metavar="N,M", help="images a call (default: 1)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="for each file and setting (default: %(default)s)"
    )
    parser.add_argument("--provider", default=CPU, metavar="NAME", help="of onnxruntime (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="write the JSON beside the first file, as FILE.bench.json")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the JSON there")


def counts(text: str) -> tuple[int, ...]:
    """Read "1,8".

    Raises:
        argparse.ArgumentTypeError: It is no list of positive whole numbers.
    """
    try:
        found = tuple(int(word) for word in names(text))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers from 1, such as 1,8")
    return found


def run(arguments: argparse.Namespace) -> Output:
    """Check everything, then time."""
    target: Path | None = arguments.output
    if target is None and arguments.save:
        target = arguments.files[0].with_suffix(SUFFIX)
    if target is not None:
        check_output(target)
    report = bench_onnx(
        arguments.files,
        threads=arguments.threads,
        batches=arguments.batch,
        seconds=arguments.seconds,
        provider=arguments.provider,
    )
    shown = table("onnxruntime, in turns", COLUMNS, report.cells(), left=("file",))
    parts = [shown, "\n".join(report.notes())]
    if target is not None:
        write_json(target, report.to_json())
        parts += ["", f"saved in {target}"]
    return Output(document=report.to_json(), parts=tuple(parts))
