"""Whether networks that nobody prepared for it can be compressed: one check over every model, one row each.

Per network, with random weights, in a process of its own:
  trace     `StructuralEditor(model, example)`; how many groups can be edited, and why the others cannot
  prune     every editable group narrowed by one ratio, to half the multiply-adds or as near as the others allow; which
            channels go is drawn at random. Law 1: equal to the network whose readers ignore those channels
  grow      every group by a quarter of what is left (init "pair"). Law 2: the logits do not change
  training  one step of SGD in training mode: a finite loss; parameters without a gradient are listed
  undo      the new channels go again: every tensor is what it was, bit for bit
  replay    the edits on a fresh network, then a strict load of the weights: the same logits, bit for bit
  export    one ONNX file, compared in onnxruntime
A step that fails is written into the row, and makes the exit code 1. A network that is refused is no failure: the row
says why. Images are 96x96 where a network takes any, else of its own size. Rows that exist are kept unless --again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    ROOT,
    add_out,
    commit,
    make_parser,
    out_path,
    positive,
    read_json,
    record,
    threads,
    write_json,
)
from benchmarks.conformance import Row
from benchmarks.model_names import WORDS, names_of, parameters_of
from benchmarks.model_table import markdown, words_of
from robustcompress.budget import human

MODULE = "any_model"
QUICK = ("robustcompress:resnet8", "robustcompress:vit_micro")

__all__ = ["MODULE", "main", "markdown", "run", "words_of"]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    names = list(QUICK) if options.quick else names_of(options.models)
    rows = {} if not path.exists() else {row["model"]: row for row in read_json(path)["results"]}
    waiting = [name for name in names if options.again or name not in rows or "not_run" in rows[name]]
    sizes = {name: parameters_of(name) for name in waiting}
    with threads(options.threads):
        for name in sorted(waiting, key=lambda name: sizes[name]):
            if sizes[name] > options.largest * 1e6:
                rows[name] = {"model": name, "params": sizes[name], "not_run": f"over {options.largest} M parameters"}
            else:
                rows[name] = {"model": name, **run(name, options.limit, options.seed, options.threads)}
            value = record(MODULE, options, argv, list(rows.values()))
            write_json(path, value)
            print(_said(rows[name]), file=sys.stderr, flush=True)
    if not waiting:
        value = read_json(path)
    print(markdown(value))
    return 1 if any(rows[name].get("failures") for name in names) else 0


def run(name: str, limit: float, seed: int, num_threads: int) -> Row:
    """Examine one network in a process of its own.

    Args:
        name: As `build_model` reads it.
        limit: Seconds after which it is ended.
        seed: Of weights, images and channels.
        num_threads: For torch.

    Returns:
        The row; what the process did before its end where it did not come to one.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        words = [sys.executable, "-m", "benchmarks.conformance", name, str(file), str(seed), str(num_threads)]
        with (Path(folder) / "said").open("w+") as said:
            process = subprocess.Popen(
                words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(num_threads)}, stdout=said, stderr=said
            )
            try:
                ended = f"ended with code {code}" if (code := process.wait(limit)) else ""
            except subprocess.TimeoutExpired:
                ended = f"not done within {limit:g} s"
            finally:
                process.kill()
                process.wait()
            said.seek(0)
            last = (said.read().strip().splitlines() or [""])[-1][:200]
        row: Row = json.loads(file.read_text()) if file.exists() else {}
        step = row.pop("step", "")
        if ended:
            row["failures"] = [*row.get("failures", []), f"{step or 'start'}: {ended}" + (f" ({last})" if last else "")]
        return {"failures": []} | row | {"commit": commit()["commit"]}


def _said(row: Mapping[str, Any]) -> str:
    if "not_run" in row:
        return f"{row['model']}: not run ({human(row['params'])} parameters)"
    if "refused" in row:
        return f"{row['model']}: refused ({' '.join(row['refused'].split())[:300]})"
    seconds = sum(row.get("seconds", {}).values())
    failed = "".join(f"\n  FAILED {failure}" for failure in row["failures"])
    counts = f"{row.get('editable', '?')}/{row.get('groups', '?')} groups, {row.get('macs', '?')} MACs"
    return f"{row['model']}: {counts}, {seconds:.0f} s{failed}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.any_model --models torchvision:resnet18")
    add_out(parser, MODULE)
    parser.add_argument(
        "--models", nargs="+", default=list(WORDS), help=f"names as build_model reads them, or {', '.join(WORDS)}"
    )
    parser.add_argument("--again", action="store_true", help="also run what has a row")
    parser.add_argument("--limit", type=positive, default=300, help="seconds for each network (default: %(default)s)")
    parser.add_argument(
        "--largest", type=positive, default=120, help="millions of parameters above which a network is not run"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
