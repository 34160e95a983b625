"""On images, is it worth while to begin a search with a meta-trained policy, and who searches best?

The searches of `rcnas` are run on the tables of `search_tasks`, where every network of a space was looked at. The hunt
is the strategy's own (uniform widths and the rule first, then five proposals at a time); only the evaluation is
replaced by the table. A task is a space and what is rewarded: clean accuracy, or `rcnas`'s reward under PGD-10.
  axes   tasks are held out by one level of an axis at a time (one data set, one network, the small or the large
         radius, one budget), policies are trained on all others, and searches on each held-out task begin with them
  arms   "meta"; "blind", trained alike, but shown one and the same domain for all tasks, so that it can know only what
         is good on average; "pretrained" (held-out networks alone), meta-trained after its encoder learned to tell the
         reward of 200 random children from their tokens; "fresh", a new policy, and "fresh-slow" with the smaller
         steps of fine-tuning; evolution and random; "rule" and "uniform" by themselves; "known" goes through the
         networks in the order of how good they are on average in the other tasks, of which it knows everything: what
         a policy could learn of what is good on average (where another space has the same coordinates)
  score  the mean over 5 to 50 networks looked at of the true value of the best so far. It is chosen by the first look,
         and its true value is the second, which no search saw (networks below the upper quarter have none: of these
         the first counts)
Rewards of tasks differ in scale, so that the unit is the standard deviation of a task's networks at the first look.
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
from benchmarks.search_policies import proposed, trained, unseen
from benchmarks.search_race import shown
from benchmarks.search_table import Task, best_so_far, by_rank, likeness, look, spread, tasks_in
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
"""By task, for each seed, how far the best so far is below looking at all networks, after each look."""


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
        proposals: dict[str, dict[str, float]] = {}
        for arm in UNTRAINED:
            curves[arm] = {task.name: [_searched(task, arm, seed) for seed in range(options.seeds)] for task in tasks}
            print(f"{arm}: {_shown(curves[arm])}", file=sys.stderr, flush=True)
        for axis in axes:
            curves[f"{axis}/known"] = _known(tasks, axis)
            for arm in (*TRAINED, *(["pretrained"] if axis == ABLATED else [])):
                name = f"{axis}/{arm}"
                curves[name], proposals[name] = _held_out(tasks, axis, arm, options)
                print(f"{name}: {_shown(curves[name])}", file=sys.stderr, flush=True)
    value = record(MODULE, options, argv, _results(tasks, axes, curves, options) | {"proposals": proposals})
    write_json(path, value)
    print(markdown(value))
    return 0


def _below(task: Task, looked: Sequence[int]) -> list[float]:
    return [(task.exhausted - value) / (task.spread or 1.0) for value in best_so_far(task, looked, CURVE)]


def _searched(task: Task, arm: str, seed: int) -> list[float]:
    if arm in ("rule", "uniform"):
        config = task.domain.whole if arm == "uniform" else Rule(task.domain, 0).ask()
        return _below(task, [task.number(config)])
    name = arm if arm in ("evolution", "random") else "reinforce"
    options = {"lr": TUNING_LR} if arm == "fresh-slow" else {}
    return _below(task, look(task, make_searcher(name, task.domain, seed, **options), seed, CURVE))


def _known(tasks: Sequence[Task], axis: str) -> Curves:
    found: Curves = {}
    for task in tasks:
        looked = by_rank(task, [other for other in tasks if other.levels[axis] != task.levels[axis]], CURVE)
        if looked is not None:
            found[task.name] = [_below(task, looked)]
    return found


def _held_out(
    tasks: Sequence[Task], axis: str, arm: str, options: argparse.Namespace
) -> tuple[Curves, dict[str, float]]:
    """Searches on every task, with policies that saw no task of its level of an axis; and what those propose."""
    found: Curves = {task.name: [] for task in tasks}
    blind = arm == "blind"
    worth: dict[str, list[float]] = {"trained": [], "held_out": []}
    for level in sorted({task.levels[axis] for task in tasks}):
        training = [task for task in tasks if task.levels[axis] != level]
        policies = [
            trained(training, number, options.rounds, blind=blind, pretrain=arm == "pretrained")
            for number in range(options.policies)
        ]
        for task in tasks:
            place = "trained" if task in training else "held_out"
            worth[place] += [proposed(policy, task, blind=blind) for policy in policies]
            if place == "held_out":
                domain = unseen(task.domain) if blind else task.domain
                for seed in range(options.seeds):
                    searcher = make_searcher("reinforce", domain, seed, policy=policies[seed % len(policies)])
                    found[task.name].append(_below(task, look(task, searcher, seed, CURVE)))
    return found, {place: round(statistics.fmean(values), 4) for place, values in worth.items()}


def _area(found: Sequence[Sequence[float]]) -> float:
    """Of one task: the mean from `FROM` looks on, over its seeds."""
    return statistics.fmean(statistics.fmean(curve[FROM - 1 :]) for curve in found)


def _shown(curves: Curves) -> str:
    return f"{statistics.fmean(map(_area, curves.values())):.3f} below all" if curves else "nothing like it is known"


def _results(
    tasks: Sequence[Task], axes: Sequence[str], curves: Mapping[str, Curves], options: argparse.Namespace
) -> dict[str, Any]:
    joined = dict(curves)
    for arm in (*TRAINED, "known"):  # a task is held out once along each axis
        parts = [curves[f"{axis}/{arm}"] for axis in axes]
        joined[f"all/{arm}"] = {
            task.name: [curve for part in parts for curve in part.get(task.name, [])]
            for task in tasks
            if any(task.name in part for part in parts)
        }
    teachers = {task.name: task.teacher for task in tasks}
    area = {arm: {name: _area(found) for name, found in by_task.items()} for arm, by_task in joined.items()}
    arms = {}
    for arm, ours in area.items():
        axis = arm.rpartition("/")[0]
        rivals = {name: area[name] for name in ("fresh", "fresh-slow", "evolution", "random") if name != arm}
        rivals |= {name: area[f"{axis}/{name}"] for name in TRAINED if axis and f"{axis}/{name}" != arm}
        if ours:
            arms[arm] = {
                "below": by_teacher(ours, teachers),
                "over": {
                    rival: by_teacher({name: theirs[name] - value for name, value in ours.items()}, teachers)
                    for rival, theirs in rivals.items()
                },
                "mean": [
                    round(statistics.fmean(statistics.fmean(c[n] for c in found) for found in joined[arm].values()), 4)
                    for n in range(CURVE)
                ],
                "by_task": {name: round(value, 4) for name, value in ours.items()},
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
        f"policies of {results['rounds']} rounds for each held-out level: in standard deviations of a task's networks, "
        f"mean over {results['from']} to {results['curve']} looks; then after so many looks"
    )
    places = (results["from"], 10, 20, results["curve"])

    def over(arm: str, rival: str) -> str:
        found = arms.get(arm, {}).get("over", {}).get(rival)
        return "" if found is None else shown(found, signed=True)

    rows = [
        (
            name,
            shown(arms[arm]["below"]),
            *(over(arm, rival) for rival in ("fresh", "evolution", "random")),
            *(f"{arms[arm]['mean'][n - 1]:.2f}" for n in places),
        )
        for name, arm in [*((arm, f"all/{arm}") for arm in TRAINED), *((arm, arm) for arm in UNTRAINED)]
    ]
    head = ("start", "below all", "better than fresh", "than evolution", "than random", *map(str, places))
    parts = [f"**Starts**, {about}", table(head, rows)]
    rows = [
        (
            axis,
            *(over(f"{axis}/{arm}", "fresh") for arm in (*TRAINED, "known")),
            over(f"{axis}/meta", "blind"),
            over(f"{axis}/meta", "evolution"),
        )
        for axis in (*results["axes"], "all")
    ]
    head = ("held out", "meta over fresh", "blind over fresh", "known over fresh", "meta over blind", "over evolution")
    parts += ["**By what is held out**", table(head, rows)]
    taught = f"{ABLATED}/pretrained"
    parts += [
        f"With a pre-trained encoder, networks held out: {over(taught, 'meta')} over meta, "
        f"{over(taught, 'fresh')} over fresh."
    ]
    rows = [
        (name, *(f"{worth[place]:+.2f}" for place in ("trained", "held_out")))
        for name, worth in results["proposals"].items()
    ]
    parts += [
        "**What policies propose**, on average over the mean of a task's networks, in their standard deviations",
        table(("policy", "tasks of its training", "tasks held out"), rows),
    ]
    keys = ("spread", "noise", "uniform", "rule", "median")
    rows = [
        (space["name"], f"{space['networks']}", *("" if space[key] is None else f"{space[key]:.2f}" for key in keys))
        for space in results["spaces"]
    ]
    head = ("task", "networks", "spread", "noise", "uniform below all", "rule below all", "median below all")
    parts += [
        "**Tasks**: hundredths of the reward, which is 1 for the teacher; spread and noise are standard deviations",
        table(head, rows),
    ]
    rows = [
        (axis, f"{like['pairs']}", *(f"{like[key]:+.2f}" for key in ("mean", "least", "largest")))
        for axis, like in results["likeness"].items()
    ]
    head = ("tasks that differ in", "pairs", "mean rank correlation", "least", "largest")
    parts += ["**How alike tasks are**: rank correlation of the same configurations", table(head, rows)]
    return "\n\n".join([*parts, provenance(value)])


def plot(value: Mapping[str, Any], path: Path) -> Path:
    """Two panels: points below looking at all networks against networks looked at; what meta-training gains by axis."""
    from matplotlib.figure import Figure

    from robustcompress.plots import COLOURS, GREY

    results = value["results"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    lines = [arm for arm in UNTRAINED if arm not in ("fresh-slow", "rule")]
    order = [*((arm, f"all/{arm}") for arm in TRAINED), *((arm, arm) for arm in lines)]
    colours = dict(zip((name for name, _ in order), (*COLOURS, GREY, "#000000"), strict=False))
    for name, arm in order:
        curve = results["arms"][arm]["mean"][results["from"] - 1 :]
        left.plot(range(results["from"], results["curve"] + 1), curve, color=colours[name], label=name)
    left.set_xlabel("networks looked at")
    left.set_ylabel("standard deviations below looking at all")
    left.set_title("held-out tasks", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    groups = (*results["axes"], "all")
    for offset, name in ((-0.12, "meta"), (0.12, "blind")):
        cells = [results["arms"][f"{axis}/{name}"]["over"]["fresh"] for axis in groups]
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
    add("--policies", type=positive, default=4, help="meta-trained for each held-out level (default: %(default)s)")
    add("--rounds", type=positive, default=800, help="of meta-training (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
