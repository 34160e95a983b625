"""Which options do searchers do best with, on training tasks of the surrogate family?

The defaults of robustcompress's searchers, and of meta-training, come from here; `search_surrogate` reports them on
other tasks. One entry varies one or two options and leaves the others at their defaults. "Above the default" is in
points, the mean over the checkpoints of the true value found (for meta-training: over the first 100 unique evaluations
of the best so far), paired by task, with the 95 % interval of the bootstrap over seeds. A default is not changed for
what is within its interval or at its edge: with so many entries one of them is there by chance.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import (
    add_out,
    make_parser,
    out_path,
    positive,
    provenance,
    record,
    table,
    threads,
    write_json,
)
from benchmarks.search_race import interval, race, shown, trained_policy
from benchmarks.surrogate import draw_task
from robustcompress.search.policy import Policy
from robustcompress.search.searchers import make_searcher

MODULE = "search_tuning"
CHECKPOINTS = (50, 100, 200)
CURVE = 100
META_ROUNDS = 800
GRIDS: Mapping[str, Sequence[dict[str, Any]]] = {
    "reinforce": (
        *({"lr": lr, "entropy": entropy} for lr in (1e-2, 3e-2, 1e-1) for entropy in (0.02, 0.1)),
        *({"update_every": count} for count in (3, 10)),
        *({"stall": stall} for stall in ("restart", "none")),
    ),
    "evolution": tuple({"population": p, "sample": s} for p in (10, 20, 40) for s in (3, 5, 10)),
    "meta-training": ({"entropy": 0.02}, {"entropy": 0.1}, {"entropy": 1.0}, {"lr": 1e-3}, {"lr": 1e-2}),
    "fine-tuning": ({"warm_entropy": 0.0}, {"warm_entropy": 0.5}, {"lr": 3e-3}, {"lr": 3e-2}),
}
RENAMED = {"batch": "update_every"}
"""What options are called today that a record has by an earlier name."""

_FIRST = 1000
"""Number of the first task: meta-training has the first ones."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    checkpoints: Sequence[int] = CHECKPOINTS
    curve, rounds, grids = CURVE, META_ROUNDS, GRIDS
    if options.quick:
        options.seeds, checkpoints, curve, rounds = 2, (5, 10), 10, 3
        grids = {name: grid[:1] for name, grid in GRIDS.items()}
    results = []
    with threads(options.threads):
        for name in options.only:
            default: list[float] = []
            for changed in ({}, *grids[name]):
                if name in ("meta-training", "fine-tuning"):
                    values = _tuned(name, changed, options.seeds, curve, rounds, options.seed)
                else:
                    values = _found(name, changed, options.seeds, checkpoints, options.seed)
                default = default or values
                row = {"searcher": name, "options": changed, "value": interval(values)}
                row["over_default"] = interval([ours - theirs for ours, theirs in zip(values, default, strict=True)])
                results.append(row)
                print(f"{name} {changed}: {shown(row['over_default'], signed=True)}", file=sys.stderr, flush=True)
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    print(markdown(value))
    return 0


def _found(name: str, changed: dict[str, Any], seeds: int, checkpoints: Sequence[int], first: int) -> list[float]:
    """For each seed, the mean over the checkpoints of what a searcher found on a task of its own."""
    values = []
    for seed in range(seeds):
        task = draw_task(_FIRST + first + seed, held_out=False)
        run = race(task, make_searcher(name, task.domain, seed, **changed), seed, checkpoints)
        values.append(statistics.fmean(run.found.values()))
    return values


def _tuned(name: str, changed: dict[str, Any], seeds: int, curve: int, rounds: int, first: int) -> list[float]:
    """For each seed, the mean of the best so far of searches that start from one of two meta-trained policies."""
    training, tuning = (changed, {}) if name == "meta-training" else ({}, changed)
    policies = [_trained(number, rounds, tuple(training.items())) for number in range(2)]
    values = []
    for seed in range(seeds):
        task = draw_task(_FIRST + first + seed, held_out=False)
        searcher = make_searcher("reinforce", task.domain, seed, policy=policies[seed % len(policies)], **tuning)
        values.append(statistics.fmean(race(task, searcher, seed, (curve,)).best))
    return values


@functools.cache
def _trained(seed: int, rounds: int, options: tuple[tuple[str, Any], ...]) -> Policy:
    """Fine-tuning varies nothing of the training: its policies are those of the defaults."""
    return trained_policy(seed, rounds, **dict(options))


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    rows = [
        (
            row["searcher"],
            ", ".join(f"{RENAMED.get(key, key)} {setting}" for key, setting in row["options"].items()) or "default",
            f"{row['value']['mean']:.2f}",
            shown(row["over_default"], signed=True) if row["options"] else "",
        )
        for row in value["results"]
    ]
    return f"{table(('searcher', 'options', 'points', 'above the default'), rows)}\n\n{provenance(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.search_tuning --only evolution")
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--seeds", type=positive, default=12, help="tasks, each with a seed of its own (default: %(default)s)")
    add("--only", nargs="+", choices=list(GRIDS), default=list(GRIDS), help="what to vary (default: all)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
