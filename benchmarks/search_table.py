"""Searches of `rcnas` on tables of measured networks: the strategy's own hunt, with a table for the evaluation."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from benchmarks.common import read_json
from benchmarks.search_tasks import ALPHAS, reward
from robustcompress.search import domain as parts
from robustcompress.search.domain import Config, Domain
from robustcompress.search.evaluate import Evaluator, Job, Outcome
from robustcompress.search.hunt import Hunt
from robustcompress.search.rule import Rule
from robustcompress.search.searcher import Searcher
from robustcompress.search.space import Architecture, Space
from robustcompress.session import Session

BATCH = 5
"""Proposals at a time, as `RCNAS.batch` is by default."""


@dataclass(frozen=True, eq=False)
class Task:
    """A space that was measured, and what is rewarded in it.

    Attributes:
        name: Of the space and the attack.
        levels: By axis, where it lies.
        teacher: Tasks of one teacher have the same.
        domain: What a searcher is told.
        first: By network, the reward of the first look.
        value: That of the second, or of the first where there was none.
        again: Whether there was a second.
        numbers: By configuration, the number of its network.
    """

    name: str
    levels: dict[str, str]
    teacher: str
    domain: Domain
    first: list[float]
    value: list[float]
    again: list[bool]
    numbers: list[int]

    def number(self, config: Sequence[int]) -> int:
        """Of the network that a configuration stands for."""
        place = 0
        for option, size in zip(config, self.domain.sizes, strict=True):
            place = place * size + option
        return self.numbers[place]

    def reward(self, config: Config) -> float:
        """What a search goes by."""
        return self.first[self.number(config)]

    @property
    def exhausted(self) -> float:
        """True value of what one finds who looks at all networks."""
        return self.value[max(range(len(self.first)), key=self.first.__getitem__)]

    @property
    def spread(self) -> float:
        """Standard deviation of the first look over the networks."""
        return statistics.pstdev(self.first)

    @property
    def starts(self) -> list[Config]:
        """What `rcnas` looks at first: uniform widths, and the rule."""
        return [self.domain.whole, Rule(self.domain, 0).ask()]


def tasks_in(directory: Path) -> list[Task]:
    """The tasks of all spaces in a directory whose networks were all looked at once."""
    found = []
    for path in sorted(directory.glob("*.json")):
        rows = read_json(path)["results"]
        if all(row is not None for row in rows["looks"][0]):
            found += [task_of(rows, attack) for attack in ALPHAS]
    return found


def task_of(rows: dict[str, Any], attack: str) -> Task:
    """One task of a space."""
    told = dict(rows["task"])
    first, again = rows["looks"]
    chosen = [one if two is None else two for one, two in zip(first, again, strict=True)]
    known = told | {"attack": attack, "robust": told["clean"] if attack == "clean" else told["robust"]}
    data, network, eps, budget = (rows[key] for key in ("data", "network", "eps", "budget"))
    return Task(
        name=f"{data}-{network}-{eps}-{budget:g}-{attack}",
        levels={
            "data": data,
            "network": network,
            "eps": "small" if eps in (4, 16) else "large",
            "budget": f"{budget:g}",
            "attack": attack,
        },
        teacher=f"{data}-{network}-{eps}",
        domain=Domain(
            tuple(parts.Coordinate(c["stage"], c["kind"], tuple(c["options"])) for c in rows["coordinates"]),
            tuple(parts.Token(**token) for token in rows["tokens"]),
            parts.Task(**known),
        ),
        first=[reward(found, told, ALPHAS[attack]) for found in first],
        value=[reward(found, told, ALPHAS[attack]) for found in chosen],
        again=[row is not None for row in again],
        numbers=list(rows["configs"]),
    )


class _Space:
    """As much of a space as a hunt asks for: networks by number."""

    def __init__(self, task: Task) -> None:
        self.domain = task.domain
        self._task = task

    def project(self, config: Config) -> Architecture:
        return Architecture((str(self._task.number(config)),), {})


class _Table:
    """In place of training: what the table says."""

    recovery = "distill"

    def __init__(self, task: Task) -> None:
        self._task = task

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        return [Outcome(0.0, self._task.first[int(job.architecture.bypassed[0])], 0, 0, 0) for job in jobs]


class _Run:
    """As much of a session as a hunt asks for."""

    def __init__(self, seed: int) -> None:
        self.goal = dataclasses.make_dataclass("Goal", ["seed"])(seed)

    def keep(self, name: str, state: object) -> None: ...
    def forget(self, name: str) -> None: ...
    def say(self, text: str) -> None: ...
    def record(self, row: dict[str, Any]) -> None: ...

    def repeat(self, name: str, count: int, run: Callable[[int], object]) -> None:
        for number in range(count):
            run(number)


def look(task: Task, searcher: Searcher, seed: int, evaluations: int) -> list[int]:
    """The networks that `rcnas` looks at, in order; fewer than asked for where there are no more.

    Args:
        task: What is searched.
        searcher: Who proposes.
        seed: Of the run.
        evaluations: How many.
    """
    hunt = Hunt(
        cast(Session, _Run(seed)),
        cast(Space, _Space(task)),
        searcher,
        lambda: cast(Evaluator, _Table(task)),
        lambda outcome, architecture, progress: outcome.robust,
        evaluations=evaluations,
        batch=BATCH,
        steps=0,
        first=task.starts,
    )
    hunt.look()
    return [task.number(entry.config) for entry in hunt._ledger.entries.values()]


def best_so_far(task: Task, looked: Sequence[int], evaluations: int) -> list[float]:
    """After each look, the true value of the best by the first looks; the last one's where there are no more."""
    best, highest, values = 0, -math.inf, list[float]()
    for number in looked:
        if task.first[number] > highest:
            best, highest = number, task.first[number]
        values.append(task.value[best])
    return values + values[-1:] * (evaluations - len(values))


def by_rank(task: Task, others: Sequence[Task], evaluations: int) -> list[int] | None:
    """The networks in the order of how good their configurations are on average in other tasks, for all is known there.

    What could be gained at most by knowing what is good elsewhere; no policy is in it. Uniform widths and the rule come
    first here too.

    Args:
        task: What is searched.
        others: Where everything is known; those with other coordinates are left out.
        evaluations: How many networks.

    Returns:
        Networks; None where no other task has these coordinates.
    """
    known = [standard(other) for other in others if other.domain.sizes == task.domain.sizes]
    if not known:
        return None
    found: dict[int, list[float]] = {}
    for number, values in zip(task.numbers, zip(*known, strict=True), strict=True):
        found.setdefault(number, []).append(statistics.fmean(values))
    order = sorted(found, key=lambda number: -statistics.fmean(found[number]))
    return list(dict.fromkeys([*map(task.number, task.starts), *order]))[:evaluations]


def standard(task: Task) -> list[float]:
    """By configuration, how far its reward is above the mean of the networks, in their standard deviations."""
    mean, spread = statistics.fmean(task.first), task.spread or 1.0
    return [(task.first[number] - mean) / spread for number in task.numbers]


def spread(task: Task) -> dict[str, Any]:
    """How much there is to find in a task, in points: what networks differ by, what looks differ by, what is lost."""
    twice = [one - two for one, two, both in zip(task.first, task.value, task.again, strict=True) if both]
    uniform, rule = (task.value[task.number(config)] for config in task.starts)
    lost = {"uniform": uniform, "rule": rule, "median": statistics.median(task.value)}
    return {
        "name": task.name,
        "networks": len(task.first),
        "spread": round(100 * task.spread, 3),
        "noise": round(100 * statistics.pstdev(twice) / math.sqrt(2), 3) if len(twice) > 1 else None,
        **{name: round(100 * (task.exhausted - value), 3) for name, value in lost.items()},
    }


def likeness(tasks: Sequence[Task]) -> dict[str, Any]:
    """Rank correlations of the rewards of the same configurations in two tasks that differ along one axis alone.

    Two networks can be compared where their spaces have the same coordinates.
    """
    found: dict[str, list[float]] = {}
    for one, two in itertools.combinations(tasks, 2):
        differ = [axis for axis, level in one.levels.items() if two.levels[axis] != level]
        if len(differ) == 1 and one.domain.sizes == two.domain.sizes:
            pair = [ranks([task.first[number] for number in task.numbers]) for task in (one, two)]
            if all(len(set(places)) > 1 for places in pair):
                found.setdefault(differ[0], []).append(statistics.correlation(*pair))
    return {
        axis: {
            "pairs": len(values),
            "mean": round(statistics.fmean(values), 3),
            "least": round(min(values), 3),
            "largest": round(max(values), 3),
        }
        for axis, values in sorted(found.items())
    }


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value among all; equal ones share the mean of theirs."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    return [statistics.fmean(places[value]) for value in values]
