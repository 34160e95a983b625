"""Which searcher finds the better shape, on a surrogate of robust training, and is meta-training worth it?

What a shape is worth is a formula (benchmarks/surrogate.py: one task fitted to published points, and an invented
family), so that a search takes a second; nothing here says what real training would give. Every searcher proposes
shapes, which are projected onto the budget; counted are *unique* evaluations, of networks not evaluated before. After
so many, the 5 best by their noisy scores are evaluated 4 times anew (not counted), and the best by these is chosen.
"Below the optimum" is how many points its true value is below that of the best of all 531441 configurations.
  searchers   each with the options that `search_tuning` chose on training tasks, here on held-out tasks of the
              family, one for every seed, and on the published task, with other noise for every seed
  stalls      REINFORCE's answers to proposing what it has proposed already
  dual level  a policy meta-trained on training tasks and fine-tuned on held-out ones, against a fresh one, with
              steps as large as are best for it, and ("fresh-slow") with the smaller ones of fine-tuning: the mean
              over the first 100 unique evaluations of the true value of the best so far by its noisy score. "Blind"
              was trained alike, but shown one and the same domain for all tasks, so that it can know only what is
              good on average.
Intervals are of the bootstrap over seeds (95 %); differences are paired: same task, same noise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from benchmarks.search_race import Run, interval, race, shown, trained_policy, unseen
from benchmarks.surrogate import SurrogateTask, draw_task, published
from robustcompress.search.domain import Domain
from robustcompress.search.reinforce import TUNING_LR
from robustcompress.search.searchers import make_searcher

MODULE = "search_surrogate"
SEARCHERS = ("reinforce", "evolution", "random", "optuna", "rule")
STALLS = ("mutate", "restart", "none")
"""The first is the default."""

CHECKPOINTS = (10, 20, 50, 100, 200, 400)
ACCEPTED = (50, 100)
"""Where REINFORCE may not be worse than random."""

META_CURVE = 100
META_TASKS = 3
_DUAL_FROM = 100
"""Number of the first task of the dual level: no other part of this benchmark has them."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    checkpoints: Sequence[int] = CHECKPOINTS
    curve = META_CURVE
    if options.quick:
        options.seeds = options.meta_seeds = 2
        options.meta_rounds, checkpoints, curve = 4, (5, 10), 10
    with threads(options.threads):
        families = {
            "held-out": [draw_task(options.seed + i, held_out=True) for i in range(options.seeds)],
            "published": [published()] * options.seeds,
        }
        optima = {task.name: task.optimum() for tasks in families.values() for task in dict.fromkeys(tasks)}
        searchers = {
            family: _compare(tasks, optima, {n: (n, {}) for n in SEARCHERS}, checkpoints)
            for family, tasks in families.items()
        }
        others = {stall: ("reinforce", {"stall": stall}) for stall in STALLS[1:]}
        results = {
            "checkpoints": list(checkpoints),
            "searchers": searchers,
            "stalls": {
                STALLS[0]: searchers["held-out"]["reinforce"],
                **_compare(families["held-out"], optima, others, checkpoints),
            },
            "dual": dual(options.meta_seeds, options.meta_rounds, curve, options.seed),
        }
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    print(markdown(value))
    return 0


def _compare(
    tasks: Sequence[SurrogateTask],
    optima: Mapping[str, float],
    entries: Mapping[str, tuple[str, dict[str, Any]]],
    checkpoints: Sequence[int],
) -> dict[str, Any]:
    """Race entries, each a searcher and its options, on a task for every seed."""
    runs: dict[str, list[Run]] = {}
    for entry, (name, options) in entries.items():
        runs[entry] = [
            race(task, make_searcher(name, task.domain, seed, **options), seed, checkpoints)
            for seed, task in enumerate(tasks)
        ]
        print(f"{entry}: {statistics.fmean(run.unique for run in runs[entry]):.0f} unique", file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for entry, ours in runs.items():
        below = {
            str(n): interval([optima[task.name] - run.found[n] for task, run in zip(tasks, ours, strict=True)])
            for n in checkpoints
        }
        found[entry] = {
            "below": below,
            "unique": statistics.fmean(run.unique for run in ours),
            "asks": statistics.fmean(run.asks for run in ours),
        }
        if "random" in runs and entry != "random":
            found[entry]["over_random"] = {
                str(n): interval([a.found[n] - b.found[n] for a, b in zip(ours, runs["random"], strict=True)])
                for n in checkpoints
            }
    return found


def dual(seeds: int, rounds: int, curve: int, first: int) -> dict[str, Any]:
    """Fine-tuned from a meta-trained policy against begun afresh, on held-out tasks."""
    arms: dict[str, list[list[list[float]]]] = {}
    for seed in range(seeds):
        policies = {
            "meta": trained_policy(seed, rounds),
            "blind": trained_policy(seed, rounds, blind=True),
        }
        tasks = [draw_task(first + _DUAL_FROM + META_TASKS * seed + i, held_out=True) for i in range(META_TASKS)]
        optima = [task.optimum() for task in tasks]
        for arm in ("meta", "blind", "fresh", "fresh-slow", "evolution", "random", "rule"):
            below = []
            for number, task in enumerate(tasks):
                domain: Domain = unseen(task.domain) if arm == "blind" else task.domain
                name = arm if arm in SEARCHERS else "reinforce"
                options: dict[str, Any] = {"policy": policies[arm]} if arm in policies else {}
                options |= {"lr": TUNING_LR} if arm == "fresh-slow" else {}
                run = race(task, make_searcher(name, domain, seed, **options), seed, (curve,))
                below.append([optima[number] - value for value in run.best])
            arms.setdefault(arm, []).append(below)
        print(f"dual level, seed {seed}", file=sys.stderr, flush=True)
    area = {arm: [statistics.fmean(map(statistics.fmean, below)) for below in found] for arm, found in arms.items()}
    over = {
        fresh: {arm: [f - a for a, f in zip(values, area[fresh], strict=True)] for arm, values in area.items()}
        for fresh in ("fresh", "fresh-slow")
    }
    first_tries = {
        arm: interval([statistics.fmean(b[0] for b in below) for below in found]) for arm, found in arms.items()
    }
    last = {arm: interval([statistics.fmean(b[-1] for b in below) for below in found]) for arm, found in arms.items()}
    return {
        "rounds": rounds,
        "curve": curve,
        "tasks": META_TASKS,
        "arms": {
            arm: {
                "area": interval(area[arm]),
                "over_fresh": interval(over["fresh"][arm]),
                "over_slow": interval(over["fresh-slow"][arm]),
                "first": first_tries[arm],
                "last": last[arm],
                "by_seed": [round(value, 4) for value in area[arm]],
                "mean": [
                    round(statistics.fmean(below[n] for seed in arms[arm] for below in seed), 4) for n in range(curve)
                ],
            }
            for arm in arms
        },
    }


def markdown(value: Mapping[str, Any]) -> str:
    """The tables, and where they come from."""
    results = value["results"]
    checkpoints = [str(n) for n in results["checkpoints"]]
    compared = [str(n) for n in ACCEPTED if str(n) in checkpoints]
    parts = []
    for family, found in results["searchers"].items():
        seeds = found["random"]["below"][checkpoints[0]]["n"]
        about = f"**Searchers, {family} task{'s' * (family == 'held-out')}**, {seeds} seeds: points below the optimum"
        rows = [
            (
                name,
                *(shown(row["below"][n]) for n in checkpoints),
                *(shown(row["over_random"][n], signed=True) if name != "random" else "" for n in compared),
            )
            for name, row in found.items()
        ]
        parts += [about, table(("after", *checkpoints, *(f"over random at {n}" for n in compared)), rows)]
    rows = [
        (name, *(shown(row["below"][n]) for n in checkpoints), f"{row['unique']:.0f}", f"{row['asks']:.0f}")
        for name, row in results["stalls"].items()
    ]
    parts += ["**Stalls of REINFORCE, held-out tasks**: points below the optimum"]
    parts += [table(("stall", *checkpoints, "unique", "asked"), rows)]
    dual_level = results["dual"]
    seen, blind = (dual_level["arms"][arm]["by_seed"] for arm in ("meta", "blind"))
    knowing = interval([theirs - ours for ours, theirs in zip(seen, blind, strict=True)])
    area = f"mean of the first {dual_level['curve']}"
    head = ("start", area, "better than fresh", "than fresh-slow", "first proposal", "last")
    rows = [
        (
            name,
            shown(row["area"]),
            "" if name == "fresh" else shown(row["over_fresh"], signed=True),
            "" if name == "fresh-slow" else shown(row["over_slow"], signed=True),
            shown(row["first"]),
            shown(row["last"]),
        )
        for name, row in dual_level["arms"].items()
    ]
    parts += [
        f"**Dual level, held-out tasks**, {dual_level['arms']['meta']['area']['n']} seeds of {dual_level['tasks']} "
        f"tasks, {dual_level['rounds']} rounds of meta-training: points below the optimum, of the best so far by its "
        "noisy score",
        table(head, rows),
        f"Knowing the task (meta) over knowing what is good on average (blind): {shown(knowing, signed=True)}",
    ]
    return "\n\n".join([*parts, provenance(value)])


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """Three panels: searchers, stalls, and the dual level; points below the optimum against unique evaluations."""
    from matplotlib.figure import Figure

    from robustcompress.plots import COLOURS, GREY

    results = value["results"]
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = {name: COLOURS[i] for i, name in enumerate(SEARCHERS)}
    panels = (
        (left, results["searchers"]["held-out"], "searchers, held-out tasks", colours),
        (
            middle,
            results["stalls"],
            "REINFORCE when it stalls, held-out tasks",
            dict(zip(STALLS, COLOURS, strict=False)),
        ),
    )
    for axes, found, title, palette in panels:
        for name, row in found.items():
            x = results["checkpoints"]
            cells = [row["below"][str(n)] for n in x]
            axes.plot(x, [c["mean"] for c in cells], color=palette[name], label=name, marker="o", markersize=3)
            axes.fill_between(
                x, [c["low"] for c in cells], [c["high"] for c in cells], color=palette[name], alpha=0.12, linewidth=0
            )
        axes.set_xscale("log")
        axes.set_xticks(x, [str(n) for n in x])
        axes.minorticks_off()
        axes.set_title(title, fontsize=11)
    arms = results["dual"]["arms"]
    starts = {"meta": COLOURS[5], "blind": COLOURS[6], "fresh": COLOURS[0], "fresh-slow": GREY}
    for name, row in arms.items():
        colour = starts[name] if name in starts else colours[name]
        right.plot(range(1, len(row["mean"]) + 1), row["mean"], color=colour, label=name)
    right.set_title("dual level, held-out tasks", fontsize=11)
    for axes in (left, middle, right):
        axes.set_xlabel("unique evaluations")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    right.set_ylim(0, 2)  # what comes of chance alone begins far above
    left.set_ylabel("points below the optimum")
    figure.savefig(path, dpi=110)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.search_surrogate --seeds 8")
    add_out(parser, MODULE)
    add = parser.add_argument
    add("--seeds", type=positive, default=20, help="seeds of the searchers (default: %(default)s)")
    add("--meta-seeds", type=positive, default=10, help="meta-trained policies (default: %(default)s)")
    add("--meta-rounds", type=positive, default=800, help="batches to meta-train on (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
