"""Is a run ever lost, does a damaged file ever crash, and are several processes one?

    python -m benchmarks.endurance                      # all three suites, about twenty minutes on two cores
    python -m benchmarks.endurance kills --quick --out FILE

"kills": real processes are killed at random instants, in all phases of every strategy, and their commands repeated
until they end; what they end with must be what an uninterrupted run ends with, bit for bit. "fuzz": every file that
this package reads is damaged in thousands of ways, and must be read or refused with one of its own errors.
"distributed": every strategy over 2 and 4 processes must end as in one, also where a process is killed in the middle.

Counts are written, not figures of speed. The exit code is 1 where any suite found a fault.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import endurance_distributed, endurance_fuzz, endurance_kills
from benchmarks.common import (
    add_out,
    make_parser,
    out_path,
    positive,
    provenance,
    read_json,
    record,
    table,
    threads,
    write_json,
)

MODULE = "endurance"
BEFORE = "done_before"
SUITES: dict[str, Callable[..., dict[str, Any]]] = {
    "kills": endurance_kills.run,
    "fuzz": endurance_fuzz.run,
    "distributed": endurance_distributed.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    results: dict[str, Any] = read_json(path)["results"] if path.exists() and not options.quick else {}
    sound = True
    with threads(options.threads):
        for name in options.suites or SUITES:
            print(f"{name}:", file=sys.stderr, flush=True)
            start = time.perf_counter()
            more = {"workers": options.workers} if name != "distributed" else {}
            found = SUITES[name](quick=options.quick, seed=options.seed, **more)
            results[name] = found | {"seconds": round(time.perf_counter() - start)}
            sound &= not faults(name, found)
            write_json(path, record(MODULE, options, argv, results))
    print(markdown(read_json(path)))
    return 0 if sound else 1


def faults(name: str, found: Mapping[str, Any]) -> int:
    """How much went wrong in a suite."""
    if name == "fuzz":
        return int(found["failed"])
    if name == "kills":
        ways = [counts for counts in found.values() if isinstance(counts, Mapping) and "runs" in counts]
        # Each counts runs, and what of them went well; a run may be over before its signal comes.
        good = [(way["runs"], min(n for key, n in way.items() if key != BEFORE), way.get(BEFORE, 0)) for way in ways]
        lost = sum(max(0, runs - least - before) for runs, least, before in good)
        return int(found["runs"] - found["identical"] + lost)
    pairs = (("compared", "equal"), ("compared_near", "near"), ("killed", "killed_equal"), ("resized", "resized_near"))
    return sum(int(found[whole] - found[good]) for whole, good in pairs if whole in found)


def markdown(value: Mapping[str, Any]) -> str:
    """One line for each number that a suite counted."""
    rows = []
    for name, found in value["results"].items():
        ways = {k: v for k, v in found.items() if isinstance(v, Mapping) and "runs" in v}
        flat = {**found, **{f"{way}: {k}": n for way, counts in ways.items() for k, n in counts.items()}}
        for key, count in flat.items():
            if isinstance(count, int | float) and not isinstance(count, bool):
                rows.append((name, key.replace("_", " "), f"{count:g}" if isinstance(count, float) else f"{count:,}"))
        rows.append((name, "faults", str(faults(name, found))))
    return f"{table(('suite', 'what', 'count'), rows)}\n\n{provenance(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.endurance fuzz")
    add_out(parser, MODULE)
    parser.add_argument(
        "suites", nargs="*", choices=[[], *SUITES], metavar="SUITE", help=f"of {', '.join(SUITES)}; all"
    )
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes, of kills and fuzz")
    return parser


if __name__ == "__main__":
    sys.exit(main())
