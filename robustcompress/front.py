"""Several compressions beside each other: what each costs, what it withstands, and which of them no other beats."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from robustcompress.budget import Budget, human
from robustcompress.errors import InputError, ResultError, nearest
from robustcompress.robust import RobustReport, ThreatModel

FORMAT = 1
_NAME = re.compile(r"(?!\.{1,2}$)[^/\\]+")  # of a directory, and of none above
COSTS = {"macs": "MACs", "size": "size", "onnx_ms": "onnxruntime ms"}
"""What a front is drawn over, by the name in a record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One network of a front, or the reason why there is none.

    Attributes:
        name: Its directory.
        label: Its strategy, told apart from others of the same name.
        strategy: Name and options.
        budget: The limits it was given; none for the reference.
        macs: Multiply-adds of one image.
        params: Parameters.
        size: Bytes of parameters and buffers.
        onnx_ms: Milliseconds of one image through onnxruntime on the CPU, one thread.
        accuracies: By attack: "accuracy", "low", "high" (the 95 % interval), "n", "suite".
        failed: Why there is no network; empty where there is one.
    """

    name: str
    label: str
    strategy: Mapping[str, Any]
    budget: Mapping[str, Any] = field(default_factory=dict)
    macs: int = 0
    params: int = 0
    size: int = 0
    onnx_ms: float | None = None
    accuracies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failed: str = ""

    @property
    def is_reference(self) -> bool:
        """Whether it is what the others are measured against."""
        return bool(self.strategy["name"] == "none")

    @property
    def asked_for(self) -> str:
        """Its budget in words."""
        return str(Budget(**self.budget)) if self.budget else "reference"

    def to_json(self) -> dict[str, Any]:
        """The point as plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Point:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It holds what no point can; other errors where it is of another shape.
        """
        point = cls(**{entry.name: record[entry.name] for entry in fields(cls)})
        texts = (point.name, point.label, point.failed, point.strategy["name"])
        counts = (point.macs, point.params, point.size)
        if not all(isinstance(text, str) for text in texts) or not _NAME.fullmatch(point.name):
            raise ValueError(f"{point.name!r} is no name of a network")
        if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise ValueError(f"{point.name}: costs are whole numbers")
        if point.onnx_ms is not None and not 0 < float(point.onnx_ms) < math.inf:
            raise ValueError(f"{point.name}: onnx_ms={point.onnx_ms} is no time")
        for attack, found in point.accuracies.items():
            shares = (found["low"], found["accuracy"], found["high"])
            if not all(0 <= share <= 1 for share in shares) or type(found["n"]) is not int:
                raise ValueError(f"{point.name}: {attack} says no accuracy of a number of images")
        if point.accuracies and "clean" not in point.accuracies:
            raise ValueError(f"{point.name}: accuracy without an attack is missing")
        if point.budget:
            Budget(**point.budget)
        return point


def accuracies_of(report: RobustReport) -> dict[str, dict[str, Any]]:
    """What a point keeps of a report."""
    return {
        a.name: {"accuracy": a.accuracy, "low": a.low, "high": a.high, "n": a.n, "suite": a.suite}
        for a in report.attacks
    }


def undominated(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Which of several things no other beats: none costs no more and is worth no less, and differs in either.

    Args:
        costs: Less is better.
        values: More is better; as many.

    Returns:
        Their places, by rising cost.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i], i))
    front: list[int] = []
    for i in order:
        best = front[-1] if front else None
        if best is None or values[i] > values[best] or (values[i] == values[best] and costs[i] == costs[best]):
            front.append(i)
    return front


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What `pareto()` found.

    Attributes:
        points: The reference first, then in the order they were asked for; failures among them.
        attack: The attack under which "robust" is measured.
        threat: What it was allowed.
        data: Name of the data.
        seed: Seed of everything.
    """

    points: tuple[Point, ...]
    attack: str
    threat: ThreatModel
    data: str
    seed: int

    @property
    def made(self) -> tuple[Point, ...]:
        """The points that are networks, judged by the attack."""
        return tuple(point for point in self.points if not point.failed and self.attack in point.accuracies)

    def front(self, cost: str = "macs") -> tuple[Point, ...]:
        """The points that no other beats in cost and robust accuracy, by rising cost.

        It goes by the measured accuracies; where intervals overlap, another sample may put others on it.

        Args:
            cost: "macs", "size" or "onnx_ms".

        Raises:
            InputError: There is no such cost.
        """
        if cost not in COSTS:
            raise InputError(f"cost {cost!r} does not exist{nearest(cost, COSTS)}")
        timed = [point for point in self.made if getattr(point, cost) is not None]
        robust = [float(point.accuracies[self.attack]["accuracy"]) for point in timed]
        return tuple(timed[i] for i in undominated([float(getattr(point, cost)) for point in timed], robust))

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table, in `columns`; why a budget failed is among the notes."""
        fronts = {title: {point.name for point in self.front(cost)} for cost, title in COSTS.items()}
        rows: list[tuple[str, ...]] = []
        for point in self.points:
            if point not in self.made:
                rows.append((point.label, point.asked_for, *["-"] * 5, "failed"))
                continue
            found = point.accuracies[self.attack]
            interval = f"{100 * found['low']:.1f} to {100 * found['high']:.1f}, n={found['n']}"
            rows.append(
                (
                    point.label,
                    point.asked_for,
                    human(point.macs),
                    human(point.size) + "B",
                    "-" if point.onnx_ms is None else f"{point.onnx_ms:.3f}",
                    f"{100 * point.accuracies['clean']['accuracy']:.1f}",
                    f"{100 * found['accuracy']:.1f} ({interval})",
                    ", ".join(title for title, names in fronts.items() if point.name in names) or "",
                )
            )
        return rows

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings of the rows."""
        return (
            "strategy",
            "asked for",
            "MACs",
            "size",
            "onnxruntime ms",
            "clean %",
            f"{self.attack} % (95 %)",
            "on the front of",
        )

    @property
    def title(self) -> str:
        """What is measured, in a line."""
        return f"{self.attack} accuracy on {self.data} ({self.threat.label()}, seed {self.seed})"

    def notes(self) -> list[str]:
        """What has to be read with the numbers."""
        notes = [f"{p.label}, {p.asked_for}: {p.failed or 'not judged yet'}" for p in self.points if p not in self.made]
        notes += ["One seed. A difference within the intervals means nothing; nor does a front made of such."]
        if self.attack != "autoattack":
            notes.append(f"{self.attack} is an upper bound on accuracy under AutoAttack: add it to the attacks.")
        return notes

    def __str__(self) -> str:
        table = [self.columns, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.columns) - 1)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in table
        ]
        return "\n".join([self.title, *lines, *self.notes()])

    def to_json(self) -> dict[str, Any]:
        """The front as plain JSON."""
        return {
            "format": FORMAT,
            "attack": self.attack,
            "threat": self.threat.to_json(),
            "data": self.data,
            "seed": self.seed,
            "points": [point.to_json() for point in self.points],
            "fronts": {cost: [point.name for point in self.front(cost)] for cost in COSTS},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Front:
        """Read what `to_json` wrote.

        Raises:
            ResultError: It is no such thing, or of a newer format.
        """
        try:
            if int(record["format"]) > FORMAT:
                raise ResultError(f"a front of format {record['format']}; this version reads up to {FORMAT}: upgrade")
            return cls(
                points=tuple(Point.from_json(point) for point in record["points"]),
                attack=str(record["attack"]),
                threat=ThreatModel.from_json(record["threat"]),
                data=str(record["data"]),
                seed=int(record["seed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ResultError(f"this is no front: {error!r}") from error
