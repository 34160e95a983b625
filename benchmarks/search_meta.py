"""On images, is it worth while to begin a search with a meta-trained policy, and who searches best?

The searches of `rcnas` are run on the tables of `search_tasks`, where every network of a space was looked at. The hunt
is the strategy's own (uniform widths and the rule first, then five proposals at a time); only the evaluation is
replaced by the table. A task is a space and what is rewarded: clean accuracy, or `rcnas`'s reward under PGD-10.
  axes   tasks are held out by one level of an axis at a time (one data set, one network, the small or the large
         radius, one budget), a policy is trained on all others, and a search on each held-out task begins with it
  arms   "meta"; "blind", trained alike, but shown one and the same domain for all tasks, so that it can know only what
         is good on average; "pretrained", meta-trained after its encoder learned to tell the reward of 200 random
         children from their tokens; "fresh", a new policy, and "fresh-slow" with the smaller steps of fine-tuning;
         evolution and random; "rule" and "uniform" by themselves
  score  the mean over 5 to 50 networks looked at of the true value of the best so far. It is chosen by the first look,
         and its true value is the second, which no search saw (networks below the upper third have none: of these the
         first counts). In points: hundredths of the reward, which is 1 for the teacher
Differences are paired: same task, same seed. Intervals are of the bootstrap over teachers (95 %): tasks of one teacher
are not independent of each other. "Below all" is what is lost against looking at every network.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import search_tasks
from benchmarks.common import (
    RESULTS,
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
from benchmarks.search_policies import trained, unseen
from benchmarks.search_race import shown
from benchmarks.search_table import Task, best_so_far, likeness, look, spread, tasks_in
from robustcompress.search.reinforce import TUNING_LR
from robustcompress.search.rule import Rule
from robustcompress.search.searchers import make_searcher

MODULE = "search_meta"
AXES = ("data", "network", "eps", "budget")
TRAINED = ("meta", "blind")
ABLATED = "network"
"""The axis along which encoders are pre-trained too."""

UNTRAINED = ("fresh", "fresh-slow", "evolution", "random", "rule", "uniform")
FROM, CURVE = 5, 50

Curves = dict[str, list[list[float]]]
"""By task, for each seed, the true value of the best so far after each look."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    axes: Sequence[str] = AXES
    if options.quick:
        options.seeds, options.policies, options.rounds, axes = 2, 1, 3, ("network",)
    with threads(options.threads):
        tasks = tasks_in(options.tables)
        if options.quick:
            tasks = [task for task in tasks if task.levels["budget"] == "0.75" and task.levels["attack"] == "pgd"]
        if not tasks:
            raise SystemExit(
                f"{options.tables.name} holds no table that is whole: run benchmarks.{search_tasks.MODULE}"
            )
        curves: dict[str, Curves] = {}
        for arm in UNTRAINED:
            curves[arm] = {task.name: [_searched(task, arm, seed) for seed in range(options.seeds)] for task in tasks}
            print(f"{arm}: {_area(curves[arm]):.2f}", file=sys.stderr, flush=True)
        for axis in axes:
            for arm in (*TRAINED, *(["pretrained"] if axis == ABLATED else [])):
                curves[f"{axis}/{arm}"] = _held_out(tasks, axis, arm, options)
                print(f"{axis}, {arm}: {_area(curves[f'{axis}/{arm}']):.2f}", file=sys.stderr, flush=True)
    value = record(MODULE, options, argv, _results(tasks, axes, curves, options))
    write_json(path, value)
    print(markdown(value))
    return 0


def _searched(task: Task, arm: str, seed: int) -> list[float]:
    if arm in ("rule", "uniform"):
        config = task.domain.whole if arm == "uniform" else Rule(task.domain, 0).ask()
        return [task.value[task.number(config)]] * CURVE
    name = arm if arm in ("evolution", "random") else "reinforce"
    options = {"lr": TUNING_LR} if arm == "fresh-slow" else {}
    searcher = make_searcher(name, task.domain, seed, **options)
    return best_so_far(task, look(task, searcher, seed, CURVE), CURVE)


def _held_out(tasks: Sequence[Task], axis: str, arm: str, options: argparse.Namespace) -> Curves:
    """Searches on every task, with policies that saw no task of its level of an axis."""
    found: Curves = {task.name: [] for task in tasks}
    for level in sorted({task.levels[axis] for task in tasks}):
        training = [task for task in tasks if task.levels[axis] != level]
        policies = [
            trained(training, number, options.rounds, blind=arm == "blind", pretrain=arm == "pretrained")
            for number in range(options.policies)
        ]
        for task in tasks:
            if task.levels[axis] == level:
                domain = unseen(task.domain) if arm == "blind" else task.domain
                for seed in range(options.seeds):
                    searcher = make_searcher("reinforce", domain, seed, policy=policies[seed % len(policies)])
                    found[task.name].append(best_so_far(task, look(task, searcher, seed, CURVE), CURVE))
    return found


def _area(curves: Curves) -> float:
    return statistics.fmean(100 * statistics.fmean(curve[FROM - 1 :]) for found in curves.values() for curve in found)


def _results(
    tasks: Sequence[Task], axes: Sequence[str], curves: Mapping[str, Curves], options: argparse.Namespace
) -> dict[str, Any]:
    teachers = {task.name: task.teacher for task in tasks}
    area = {
        arm: {name: statistics.fmean(100 * statistics.fmean(c[FROM - 1 :]) for c in of) for name, of in found.items()}
        for arm, found in curves.items()
    }
    for arm in TRAINED:  # a task is held out once along each axis
        area[f"all/{arm}"] = {
            task.name: statistics.fmean(area[f"{a}/{arm}"][task.name] for a in axes) for task in tasks
        }
    arms = {}
    for arm, by_task in area.items():
        found = [curves[arm]] if arm in curves else [curves[f"{axis}/{arm.split('/')[1]}"] for axis in axes]
        axis = arm.rpartition("/")[0]
        less = {name: by_task[name] - area["fresh"][name] for name in by_task}
        below = {task.name: 100 * task.exhausted - by_task[task.name] for task in tasks}
        rivals = {other: area[other] for other in ("evolution", "random", "fresh-slow")}
        rivals |= {other: area[f"{axis}/{other}"] for other in TRAINED if axis}
        arms[arm] = {
            "below": by_teacher(below, teachers),
            "over_fresh": by_teacher(less, teachers),
            "over": {
                other: by_teacher({name: by_task[name] - theirs[name] for name in by_task}, teachers)
                for other, theirs in rivals.items()
                if theirs is not by_task
            },
            "over_fresh_by_attack": {
                attack: by_teacher({n: v for n, v in less.items() if n.endswith(attack)}, teachers)
                for attack in sorted({task.levels["attack"] for task in tasks})
            },
            "mean": [
                round(
                    statistics.fmean(
                        100 * (task.exhausted - curve[n])
                        for part in found
                        for task in tasks
                        for curve in part[task.name]
                    ),
                    4,
                )
                for n in range(CURVE)
            ],
        }
    return {
        "seeds": options.seeds,
        "policies": options.policies,
        "rounds": options.rounds,
        "from": FROM,
        "curve": CURVE,
        "axes": list(axes),
        "tasks": len(tasks),
        "teachers": len(set(teachers.values())),
        "arms": arms,
        "spaces": [spread(task) for task in tasks],
        "likeness": likeness(tasks),
    }


def by_teacher(values: Mapping[str, float], teachers: Mapping[str, str], *, resamples: int = 2000) -> dict[str, float]:
    """Mean over tasks, and the 95 % interval of the bootstrap over teachers (percentiles)."""
    groups: dict[str, list[float]] = {}
    for name, value in values.items():
        groups.setdefault(teachers[name], []).append(value)
    names, dice = sorted(groups), random.Random(0)
    means = []
    for _ in range(resamples):
        drawn = [value for name in dice.choices(names, k=len(names)) for value in groups[name]]
        means.append(statistics.fmean(drawn))
    means.sort()
    return {
        "mean": round(statistics.fmean(values.values()), 4),
        "low": round(means[int(0.025 * resamples)], 4),
        "high": round(means[int(0.975 * resamples) - 1], 4),
        "n": len(names),
    }


def markdown(value: Mapping[str, Any]) -> str:
    """The tables, and where they come from."""
    results = value["results"]
    arms = results["arms"]
    about = (
        f"{results['tasks']} tasks of {results['teachers']} teachers, {results['seeds']} seeds, {results['policies']} "
        f"policies of {results['rounds']} rounds for each held-out level: points of reward, mean over "
        f"{results['from']} to {results['curve']} looks"
    )
    head = ("start", "below all", "better than fresh", "than evolution", "than random", f"at {results['from']}", "last")

    def row(name: str, arm: str) -> tuple[str, ...]:
        found = arms[arm]
        over = [shown(found["over"][rival], signed=True) if rival in found["over"] else "" for rival in head_rivals]
        own = "" if arm == "fresh" else shown(found["over_fresh"], signed=True)
        at, last = found["mean"][results["from"] - 1], found["mean"][-1]
        return name, shown(found["below"]), own, *over, f"{at:.2f}", f"{last:.2f}"

    head_rivals = ("evolution", "random")
    rows = [row(arm, f"all/{arm}") for arm in TRAINED] + [row(arm, arm) for arm in UNTRAINED]
    parts = [f"**Starts**, {about}", table(head, rows)]
    head = ("held out", *(f"{arm} over fresh" for arm in TRAINED), "meta over blind", "meta over evolution")
    rows = [
        (
            axis,
            *(shown(arms[f"{axis}/{arm}"]["over_fresh"], signed=True) for arm in TRAINED),
            *(shown(arms[f"{axis}/meta"]["over"][rival], signed=True) for rival in ("blind", "evolution")),
        )
        for axis in (*results["axes"], "all")
    ]
    parts += ["**By what is held out**", table(head, rows)]
    taught = arms[f"{ABLATED}/pretrained"]
    parts += [
        f"With a pre-trained encoder, networks held out: {shown(taught['over']['meta'], signed=True)} over meta, "
        f"{shown(taught['over_fresh'], signed=True)} over fresh."
    ]
    rows = [
        (
            space["name"],
            f"{space['networks']}",
            *(
                "" if space[key] is None else f"{space[key]:.2f}"
                for key in ("spread", "noise", "uniform", "rule", "median")
            ),
        )
        for space in results["spaces"]
    ]
    head = ("task", "networks", "spread", "noise", "uniform below all", "rule below all", "median below all")
    parts += [
        "**Tasks**: points of reward; spread and noise are standard deviations of the first look",
        table(head, rows),
    ]
    head = (
        "two tasks of one network differ in",
        "pairs",
        "mean rank correlation of their networks",
        "least",
        "largest",
    )
    rows = [
        (words, f"{like['pairs']}", *(f"{like[key]:+.2f}" for key in ("mean", "least", "largest")))
        for words, like in results["likeness"].items()
    ]
    parts += ["**How alike tasks are**", table(head, rows)]
    return "\n\n".join([*parts, provenance(value)])


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """Two panels: points below looking at all networks against networks looked at; what meta-training gains by axis."""
    from matplotlib.figure import Figure

    from robustcompress.plots import COLOURS, GREY

    results = value["results"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    order = [("meta", "all/meta"), ("blind", "all/blind"), *((arm, arm) for arm in UNTRAINED if arm != "fresh-slow")]
    colours = dict(zip((name for name, _ in order), (*COLOURS, GREY, "#000000"), strict=False))
    for name, arm in order:
        curve = results["arms"][arm]["mean"][results["from"] - 1 :]
        left.plot(range(results["from"], results["curve"] + 1), curve, color=colours[name], label=name)
    left.set_xlabel("networks looked at")
    left.set_ylabel("points of reward below looking at all")
    left.set_title("held-out tasks", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    groups = (*results["axes"], "all")
    for offset, name in ((-0.12, "meta"), (0.12, "blind")):
        cells = [results["arms"][f"{axis}/{name}"]["over_fresh"] for axis in groups]
        means = [cell["mean"] for cell in cells]
        bars = [[c["mean"] - c["low"] for c in cells], [c["high"] - c["mean"] for c in cells]]
        places = [place + offset for place in range(len(groups))]
        right.errorbar(places, means, bars, fmt="o", color=colours[name], capsize=3, label=name)
    right.axhline(0, color="#888888", linewidth=0.8)
    right.set_xticks(range(len(groups)), groups)
    right.set_title("better than a fresh policy, by what was held out", fontsize=11)
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.search_meta --seeds 10")
    add_out(parser, MODULE)
    add = parser.add_argument
    tables = RESULTS / search_tasks.MODULE
    add("--tables", type=Path, default=tables, help="directory that search_tasks wrote (default: the committed one)")
    add("--seeds", type=positive, default=10, help="searches on each task (default: %(default)s)")
    add("--policies", type=positive, default=5, help="meta-trained for each held-out level (default: %(default)s)")
    add("--rounds", type=positive, default=400, help="of meta-training (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
