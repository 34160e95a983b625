"""A grid of runs, declared in YAML: arms (strategies and controls) times axes (budget, seed, model, data, epochs).

    about: what the grid is for
    recipe: recipes/digits.yaml          # what all cells share, from the repository's root
    axes:
      budget: [0.5, 0.25]
      seed: [0, 1, 2]
    arms:
      none: {strategy: none}
      uniform: {strategy: uniform}
      grape: {strategy: grape}
      grape-retrained: {retrain: grape}  # grape's final architecture, from scratch, under the same changes
    baselines: [none, uniform]           # arms that the others are compared with, seed by seed
    matched:                             # a second accounting: as much training compute as `to` of the same seed
      to: none
      arms: [uniform, grape]

An arm lists what it changes in the recipe. A cell is one arm at one point of the axes, and is named after them. Arms
with strategy "none" know no budget and have one cell a seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.training_cost import matched_epochs
from robustcompress.errors import InputError, Problems, nearest
from robustcompress.recipe import RunRecipe, merged, read_yaml

KEYS = ("about", "recipe", "axes", "arms", "baselines", "matched")
AXES = ("model", "data", "epochs", "budget", "seed")
EPOCHS, MACS = "same epochs", "same training MACs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a grid.

    Attributes:
        name: Unique in its grid, and a file name.
        arm: The strategy or control.
        labels: Its place on every axis but the seed, as text.
        seed: Its seed.
        account: `EPOCHS` or `MACS`: what is equal between cells.
        changes: What the recipe of the grid becomes, before `retrain` and `matched` are filled in.
        retrain: Cell whose final widths are trained from scratch; None for most.
        matched: The two cells from which the epochs follow: this arm's with the recipe's epochs, and the one whose
            training compute is matched; None for most.
    """

    name: str
    arm: str
    labels: Mapping[str, str]
    seed: int
    account: str
    changes: Mapping[str, Any]
    retrain: str | None = None
    matched: tuple[str, str] | None = None

    @property
    def parents(self) -> tuple[str, ...]:
        """Cells that have to be finished first."""
        return tuple(name for name in (self.retrain, *(self.matched or ())) if name is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A declared set of runs.

    Attributes:
        name: The file's.
        about: What it is for.
        base: The recipe that all cells share, as plain data.
        cells: In the order to run them: parents first, seed by seed.
        baselines: Arms that the others are compared with.
        matched_to: The arm whose training compute others are matched to; None where none are.
        arms: Names of the arms.
    """

    name: str
    about: str
    base: Mapping[str, Any]
    cells: tuple[Cell, ...]
    baselines: tuple[str, ...] = ()
    matched_to: str | None = None
    arms: tuple[str, ...] = field(default=())

    def recipe(self, cell: Cell, finished: Mapping[str, Mapping[str, Any]]) -> RunRecipe:
        """The recipe of a cell.

        Args:
            cell: One of this grid's.
            finished: Records of finished cells by name; the parents must be there.

        Raises:
            InputError: The recipe cannot be used.
        """
        value = merged(self.base, cell.changes)
        if cell.retrain is not None:
            widths = finished[cell.retrain]["results"]["widths"]
            value["strategy"] = {"name": "fixed", "widths": dict(widths)}
        if cell.matched is not None:
            mine, theirs = (finished[name] for name in cell.matched)
            value["epochs"] = round(matched_epochs(mine, theirs), 2)
        return RunRecipe.from_mapping(value)


def read_grid(path: str | Path) -> Grid:
    """Read a grid, and check that the recipe of every cell can be used.

    Raises:
        InputError: Listing all that is wrong.
    """
    path = Path(path)
    value = read_yaml(path)
    try:
        return _grid(path, value)
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{path.name} is no grid: {error}") from error


def _grid(path: Path, value: Mapping[str, Any]) -> Grid:
    problems = Problems(f"{path.name} cannot be used")
    _check(value, problems)
    problems.raise_if_any()
    axes, arms, matched = value.get("axes") or {}, value["arms"], value.get("matched") or {}
    base = read_yaml(ROOT / value["recipe"])
    if base.get("epochs") is None and "epochs" not in axes:
        problems.add(f"{value['recipe']} says no epochs: a grid compares runs of known length")
    cells = tuple(_cells(axes, arms, matched))
    grid = Grid(
        name=path.stem,
        about=str(value.get("about", "")),
        base=base,
        cells=cells,
        baselines=tuple(value.get("baselines") or ()),
        matched_to=matched.get("to"),
        arms=tuple(arms),
    )
    checked: list[Any] = []
    for cell in cells:
        but_seed = {key: change for key, change in cell.changes.items() if key != "seed"}
        if but_seed in checked:
            continue
        checked.append(but_seed)
        try:
            RunRecipe.from_mapping(merged({"strategy": "none", **base}, cell.changes))
        except InputError as error:
            problems.add(f"cell {cell.name}: {error}")
    problems.raise_if_any()
    return grid


def _check(value: Mapping[str, Any], problems: Problems) -> None:
    """Note what is wrong with the shape of a grid, and names that it does not have."""
    for key in value:
        if key not in KEYS:
            problems.add(f"key {key!r} does not exist{nearest(key, KEYS)}")
    for key in ("recipe", "arms"):
        if not value.get(key):
            problems.add(f"key {key!r} is missing")
    axes, arms, matched = (value.get(key) or {} for key in ("axes", "arms", "matched"))
    for key, found in (("axes", axes), ("arms", arms), ("matched", matched)):
        if not isinstance(found, Mapping):
            problems.add(f"{key}={found!r}: give names and values")
            return
    for key, axis in axes.items():
        if key not in AXES:
            problems.add(f"axis {key!r} does not exist{nearest(str(key), AXES)}")
        if not isinstance(axis, list | Mapping) or not axis:
            problems.add(f"axis {key!r}: give a list of values, or labels with values, not {axis!r}")
    for name, arm in arms.items():
        if not isinstance(arm, Mapping):
            problems.add(f"arm {name!r}: give what it changes in the recipe, such as {{strategy: grape}}, not {arm!r}")
            return
    named = [("baselines", name) for name in value.get("baselines") or ()]
    named += [("retrain", arm["retrain"]) for arm in arms.values() if "retrain" in arm]
    if matched:
        if sorted(matched) != ["arms", "to"]:
            problems.add(f"matched has {', '.join(sorted(matched))}: it needs 'arms' and 'to', and nothing else")
        named += [("matched", name) for name in (*matched.get("arms", ()), matched.get("to"))]
    for place, name in named:
        if name not in arms:
            problems.add(f"{place}: there is no arm {name!r}{nearest(str(name), arms)}")
    before: list[str] = []
    for name, arm in arms.items():
        parent = arm.get("retrain")
        if parent in arms and (parent not in before or "retrain" in arms[parent]):
            problems.add(f"arm {name!r} retrains {parent!r}, which must come before it and not be a retraining itself")
        before.append(name)


def _cells(
    axes: Mapping[str, Any], arms: Mapping[str, Mapping[str, Any]], matched: Mapping[str, Any]
) -> Iterator[Cell]:
    points = [_points(axes.get(key)) for key in AXES]
    seeds = points.pop()
    for seed_label, seed in seeds:
        cells: list[Cell] = []
        for place in itertools.product(*points):
            named = {key: label for key, (label, _) in zip(AXES, place, strict=False) if label}
            values = {key: value for key, (label, value) in zip(AXES, place, strict=False) if label}
            number = int(seed) if seed_label else 0
            for arm, changes in arms.items():
                cells.append(_cell(arm, arms, named, {**values, "seed": number}, dict(changes), EPOCHS))
            for arm in matched.get("arms", ()):
                plain = _cell(arm, arms, named, {**values, "seed": number}, dict(arms[arm]), EPOCHS)
                to = _cell(matched["to"], arms, named, {**values, "seed": number}, dict(arms[matched["to"]]), EPOCHS)
                twin = _cell(arm, arms, named, {**values, "seed": number}, dict(arms[arm]), MACS)
                cells.append(
                    Cell(
                        name=twin.name,
                        arm=arm,
                        labels=twin.labels,
                        seed=number,
                        account=MACS,
                        changes=twin.changes,
                        retrain=twin.retrain,
                        matched=(plain.name, to.name),
                    )
                )
        yield from {cell.name: cell for cell in cells}.values()  # arms without a budget come up at every budget


def _points(axis: Any) -> list[tuple[str, Any]]:
    """The values of an axis with their labels; one nameless point where the axis is absent."""
    if axis is None:
        return [("", None)]
    if isinstance(axis, Mapping):
        return [(str(label), value) for label, value in axis.items()]
    return [(str(value), value) for value in axis]


def _cell(
    arm: str,
    arms: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str],
    place: Mapping[str, Any],
    changes: dict[str, Any],
    account: str,
) -> Cell:
    retrain = changes.pop("retrain", None)
    if retrain is not None:  # the same budget and training as the parent's
        changes = merged({key: change for key, change in arms[retrain].items() if key != "strategy"}, changes)
    labels, place = dict(labels), dict(place)
    strategy = changes.get("strategy")
    if (strategy.get("name") if isinstance(strategy, Mapping) else strategy) == "none":
        labels.pop("budget", None)
        place.pop("budget", None)
    parts = [arm, *labels.values(), *(["matched"] if account == MACS else []), f"s{place['seed']}"]
    parent = None
    if retrain is not None:
        parent = _cell(retrain, arms, labels, place, dict(arms[retrain]), EPOCHS).name
    return Cell(
        name="_".join(parts).replace("/", "-").replace(" ", "-"),
        arm=arm,
        labels=labels,
        seed=int(place["seed"]),
        account=account,
        changes=merged(place, changes),
        retrain=parent,
    )


def select(cells: Sequence[Cell], patterns: Sequence[str]) -> tuple[Cell, ...]:
    """Cells whose names match one of the shell patterns, with their parents; all where there is no pattern.

    Raises:
        InputError: A pattern matches nothing.
    """
    from fnmatch import fnmatchcase

    if not patterns:
        return tuple(cells)
    by_name = {cell.name: cell for cell in cells}
    wanted: set[str] = set()
    for pattern in patterns:
        found = [name for name in by_name if fnmatchcase(name, pattern)]
        if not found:
            raise InputError(f"no cell is called {pattern!r}{nearest(pattern, by_name)}; --list shows them")
        wanted.update(found)
    while missing := {parent for name in wanted for parent in by_name[name].parents} - wanted:
        wanted |= missing
    return tuple(cell for cell in cells if cell.name in wanted)
