"""How far apart classes are in a tree, and how severe a model's mistakes are by it."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustcompress.errors import InputError, Problems, ResultError, nearest
from robustcompress.untrusted import read_json

SHIPPED = ("cifar10", "digits")
"""Hierarchies that come with the package, by name."""

_LARGEST = 1 << 24  # bytes; ImageNet's tree has some 100,000
_DEEPEST = 50  # levels of groups; WordNet has 19


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A tree over the classes.

    Attributes:
        name: What it is called in reports.
        classes: The classes' names, in the order of their labels.
        paths: For each class the names of its groups, the outermost first.

    Raises:
        InputError: Fewer than two classes, one named twice, or another number of paths.
    """

    name: str
    classes: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        problems = Problems(f"hierarchy {self.name!r} cannot be used")
        if len(self.classes) < 2:
            problems.add(f"classes={list(self.classes)!r}: give two or more")
        for twice in sorted({c for c in self.classes if self.classes.count(c) > 1}):
            problems.add(f"class {twice!r} is there twice")
        if len(self.paths) != len(self.classes):
            problems.add(f"{len(self.paths)} paths for {len(self.classes)} classes: give one for each")
        problems.raise_if_any()

    @property
    def distances(self) -> Tensor:
        """The distance of each pair of classes, float32 [K, K]: how high their lowest common ancestor is.

        The height of a node is the longest way down to a class, so classes of one lowest group are 1 apart (Bertinetto
        et al., CVPR 2020, section 3, measure mistakes so). The diagonal is 0.
        """
        return torch.tensor(_distances(self.paths))

    @property
    def chance(self) -> float:
        """Mean distance of a mistake that takes any of the other classes alike, where all are equally frequent."""
        table = self.distances
        return float(table.sum() / (len(table) * (len(table) - 1)))

    def ordered(self, classes: Sequence[str]) -> Hierarchy:
        """The same tree with labels in the order of `classes`.

        Images given as tensors have no names: where `classes` are "0", "1", and so on, and as many as ours, our own
        order is taken to be that of the labels.

        Raises:
            InputError: These are other classes; the message names those that are missing on either side.
        """
        if tuple(classes) == tuple(str(label) for label in range(len(self.classes))):
            return self
        problems = Problems(f"hierarchy {self.name!r} is not about these classes")
        for label, ours, theirs in (
            ("does not know", classes, self.classes),
            ("holds, and the data do not,", self.classes, classes),
        ):
            odd = [c for c in ours if c not in theirs]
            if odd:
                more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
                problems.add(f"it {label} {', '.join(repr(c) for c in odd[:5])}{more}")
        problems.raise_if_any()
        at = {name: path for name, path in zip(self.classes, self.paths, strict=True)}
        return Hierarchy(self.name, tuple(classes), tuple(at[name] for name in classes))

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `hierarchy_from` reads them."""
        tree: dict[str, Any] = {}
        for name, path in zip(self.classes, self.paths, strict=True):
            node = tree
            for group in path:
                node = node.setdefault(group, {})
            node[name] = None
        return {"name": self.name, "classes": list(self.classes), "tree": tree}

    @classmethod
    def from_json(cls, data: object) -> Hierarchy:
        """Read what `to_json` wrote; as `hierarchy_from`, but no name and no file.

        Raises:
            InputError: It is something else; all that is wrong is listed.
        """
        return _read(data, "unnamed")


def hierarchy_from(source: object) -> Hierarchy:
    """Read a hierarchy.

    Args:
        source: A name of `SHIPPED`, the path of a JSON file, what such a file holds, or a `Hierarchy`. A file holds
            "classes" (names in the order of their labels) and "tree": each key of it is a group with a further such
            mapping or a list of classes, or a class itself where its value is null.

    Raises:
        InputError: There is no such name or file, or it holds something else; all that is wrong is listed.

    Example:
        >>> hierarchy_from({"classes": ["a", "b", "c"], "tree": {"ab": ["a", "b"], "c": None}}).chance
        1.6666666269302368
    """
    if isinstance(source, Hierarchy):
        return source
    if isinstance(source, str) and source in SHIPPED:
        shipped = resources.files("robustcompress.robust") / "hierarchies" / f"{source}.json"
        return _read(json.loads(shipped.read_text(encoding="utf-8")), source)
    if isinstance(source, str | Path):
        return _read_file(Path(source))
    return Hierarchy.from_json(source)


def _read_file(path: Path) -> Hierarchy:
    try:
        data = read_json(path, _LARGEST)
    except OSError as error:
        offered = nearest(str(path), SHIPPED)
        raise InputError(f"hierarchy {str(path)!r} cannot be read ({error.strerror}){offered}") from error
    except ValueError as error:
        raise InputError(f"hierarchy {str(path)!r} is no JSON: {error}") from error
    return _read(data, path.stem)


def _read(data: object, name: str) -> Hierarchy:
    problems = Problems(f"hierarchy {name!r} cannot be used")
    classes = data.get("classes") if isinstance(data, Mapping) else None
    tree = data.get("tree") if isinstance(data, Mapping) else None
    if not isinstance(classes, list | tuple) or not all(isinstance(c, str) for c in classes):
        problems.add("'classes' must be a list of names, in the order of the labels")
    if not isinstance(tree, Mapping):
        problems.add("'tree' must be a mapping of groups")
    problems.raise_if_any()
    assert isinstance(data, Mapping) and isinstance(classes, list | tuple)
    found: dict[str, tuple[str, ...]] = {}
    for leaf, path in _leaves(tree, (), problems):
        if leaf in found:
            problems.add(f"class {leaf!r} is in the tree twice")
        elif leaf not in classes:
            problems.add(f"the tree holds {leaf!r}, which is not among 'classes'{nearest(leaf, classes)}")
        found[leaf] = path
    for missing in [c for c in classes if c not in found]:
        problems.add(f"class {missing!r} is not in the tree")
    problems.raise_if_any()
    return Hierarchy(str(data.get("name", name)), tuple(classes), tuple(found[c] for c in classes))


def _leaves(node: object, path: tuple[str, ...], problems: Problems) -> Iterator[tuple[str, tuple[str, ...]]]:
    if len(path) > _DEEPEST:
        problems.add(f"group {'/'.join(path[:3])!r} goes on for more than {_DEEPEST} levels")
    elif isinstance(node, Mapping):
        for key, below in node.items():
            if below is None:
                yield str(key), path
            else:
                yield from _leaves(below, (*path, str(key)), problems)
    elif isinstance(node, list | tuple):
        for leaf in node:
            if isinstance(leaf, str):
                yield leaf, path
            else:
                problems.add(f"{leaf!r} in group {'/'.join(path)!r}: a list holds names of classes")
    else:
        problems.add(f"{node!r} in group {'/'.join(path)!r}: give a mapping, a list of classes, or null for a class")


@functools.lru_cache(maxsize=8)
def _distances(paths: tuple[tuple[str, ...], ...]) -> tuple[tuple[float, ...], ...]:
    heights: dict[tuple[str, ...], int] = {}
    for path in paths:
        for depth in range(len(path) + 1):
            heights[path[:depth]] = max(heights.get(path[:depth], 0), len(path) + 1 - depth)

    def apart(i: int, j: int) -> float:
        if i == j:
            return 0.0
        shared = 0
        for a, b in zip(paths[i], paths[j], strict=False):
            if a != b:
                break
            shared += 1
        return float(heights[paths[i][:shared]])

    return tuple(tuple(apart(i, j) for j in range(len(paths))) for i in range(len(paths)))


@dataclass(frozen=True, slots=True)
class Severity:
    """How far from the truth the mistakes of one attack are.

    Attributes:
        counts: Pairs of a distance and how many mistakes were so far off, nearest first.
    """

    counts: tuple[tuple[float, int], ...] = ()

    @classmethod
    def of(cls, distances: Tensor, y: Tensor, predicted: Tensor) -> Severity:
        """Count the mistakes among predictions.

        Args:
            distances: Of `Hierarchy.distances`, [K, K].
            y: Labels, int64 [N].
            predicted: Classes, int64 [N]; those that are right are left out.
        """
        y, predicted = y.cpu(), predicted.cpu()
        wrong = predicted != y
        found: list[float] = distances[y[wrong], predicted[wrong]].tolist()
        return cls(tuple(sorted(Counter(found).items())))

    def __add__(self, other: Severity) -> Severity:
        return Severity(tuple(sorted((Counter(dict(self.counts)) + Counter(dict(other.counts))).items())))

    @property
    def errors(self) -> int:
        """How many mistakes there are."""
        return sum(count for _, count in self.counts)

    @property
    def mean(self) -> float:
        """Mean distance of the mistakes; NaN of none."""
        return sum(d * n for d, n in self.counts) / self.errors if self.errors else math.nan

    @property
    def error(self) -> float:
        """Standard error of that mean over the mistakes; NaN of fewer than two."""
        if self.errors < 2:
            return math.nan
        squares = sum(n * (d - self.mean) ** 2 for d, n in self.counts)
        return math.sqrt(squares / (self.errors - 1) / self.errors)

    def to_json(self) -> list[list[float]]:
        """Plain data for `from_json`."""
        return [[distance, count] for distance, count in self.counts]

    @classmethod
    def from_json(cls, data: Sequence[Sequence[float]]) -> Severity:
        """Read what `to_json` wrote.

        Raises:
            ResultError: These are no pairs of a distance and a count.
        """
        try:
            counts = tuple((float(distance), int(count)) for distance, count in data)
        except (TypeError, ValueError) as error:
            raise ResultError(f"these are no distances of mistakes: {error}") from error
        if any(not 0 < distance < math.inf or count < 1 for distance, count in counts):
            raise ResultError("these are no distances of mistakes: a distance or a count is not positive")
        return cls(counts)
