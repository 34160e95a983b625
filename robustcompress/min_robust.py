"""How robust the smallest model has to stay, and the bisection that looks for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from robustcompress.errors import InputError, Problems, nearest
from robustcompress.robust import RobustReport, attack_by_name, wilson

Axis = Literal["macs", "params", "latency", "density"]

EVENT = "trial"
"""What the records of tried networks are called in a history."""

LOG, REFERENCE = "search.json", "reference"
WORKPLACE = (
    rf"{re.escape(LOG)}|({REFERENCE}|trial-\d+)(\.checkpoint)?|autoattack|"
    rf"\.({re.escape(LOG)}|{REFERENCE}|trial-\d+)[-.].*"
)
"""Names of what a search keeps in its directory: its record, networks, their checkpoints, and drafts of these."""

CLOSE = 1.02
"""The search ends where the smallest network that holds and the largest that does not are this close in size."""


@dataclass(frozen=True, slots=True)
class MinRobust:
    """A demand: the smallest network whose accuracy under attack stays at least this high.

    A network meets it where the lower end of the 95 % interval (Wilson's) of that accuracy does.

    Attributes:
        accuracy: What must be kept, in (0, 1).
        axis: What "smallest" means: "macs", "params", "latency" (onnxruntime's, one image), or "density" for strategies
            with granularity="weight".
        attack: What the networks are attacked with, both for the choice and in the final figure: a name as
            `attack_by_name` reads it.
        images: Validation images that are attacked for the choice; None for all. Few make wide intervals.
        trials: How many networks are compressed at most, beside the reference.
    """

    accuracy: float
    axis: Axis = "macs"
    attack: str = "pgd-20"
    images: int | None = 1000
    trials: int = 5

    def __post_init__(self) -> None:
        problems = Problems("min_robust makes no sense")
        value = self.accuracy
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            hint = f"; for {value:g} % write {value / 100:g}" if isinstance(value, int | float) and value > 1 else ""
            problems.add(f"accuracy={value!r}: must lie between 0 and 1{hint}")
        if self.axis not in get_args(Axis):
            problems.add(f"axis={self.axis!r} does not exist{nearest(str(self.axis), get_args(Axis))}")
        spec = problems.attempt(lambda: attack_by_name(self.attack))
        if spec is not None and spec.kind == "clean":
            problems.add("attack='clean' is none: name one, such as 'pgd-20' or 'autoattack'")
        elif spec is not None:
            object.__setattr__(self, "attack", spec.name)
        for name, count in (("images", self.images), ("trials", self.trials)):
            if count is None and name == "images":
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                problems.add(f"{name}={count!r}: must be a whole number, at least 1")
        problems.raise_if_any()

    @classmethod
    def of(cls, value: object) -> MinRobust:
        """Read a number, which stands for a demand with the default settings, or what `to_json` wrote.

        Raises:
            InputError: It is neither.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return cls(value)  # type: ignore[arg-type]  # complains itself
        known = [entry.name for entry in fields(cls)]
        if "accuracy" not in value:
            raise InputError("min_robust says no accuracy: give {'accuracy': 0.45, ...}, or a number")
        for name in value:
            if name not in known:
                raise InputError(f"min_robust: key {name!r} does not exist{nearest(str(name), known)}")
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """The demand as plain JSON."""
        return asdict(self)

    def holds(self, report: RobustReport | None) -> bool:
        """Whether a report shows it; not where the attack was not run."""
        attacks = report.attacks if report is not None else ()
        return any(result.name == self.attack and result.low >= self.accuracy for result in attacks)

    def read(self, trial: Trial) -> Trial:
        """The trial with its verdict under this demand."""
        return replace(trial, holds=trial.size is not None and trial.interval[0] >= self.accuracy)

    def __str__(self) -> str:
        return f"{self.attack} accuracy >= {100 * self.accuracy:.4g} % (lower end of the 95 % interval)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One network that was tried.

    Attributes:
        limit: Fraction of the reference's size that was asked for; 1 for the reference.
        size: Fraction that it came to; None where no network came of it.
        macs: Its multiply-adds.
        params: Its parameters.
        clean: Share of the validation images that it got right.
        right: How many of them it still got right under attack.
        n: How many there were.
        holds: Whether it meets the demand.
        reason: Why there is no network; empty where there is one.
    """

    limit: float
    size: float | None = None
    macs: int | None = None
    params: int | None = None
    clean: float | None = None
    right: int = 0
    n: int = 0
    holds: bool = False
    reason: str = ""

    @property
    def accuracy(self) -> float:
        """Accuracy under attack, in [0, 1]; NaN where there is no network."""
        return self.right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of that accuracy."""
        return wilson(self.right, self.n)

    def to_json(self) -> dict[str, Any]:
        """The trial as a record of a history."""
        known = {key: value for key, value in asdict(self).items() if value is not None}
        low, high = self.interval
        figures = {"accuracy": self.accuracy, "low": low, "high": high} if self.n else {}
        return {"phase": "smallest", "event": EVENT, **known, **figures}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Trial:
        """Read what `to_json` wrote; what else is there is left alone."""
        return cls(**{entry.name: record[entry.name] for entry in fields(cls) if entry.name in record})


def trials_of(history: Iterable[Mapping[str, Any]]) -> list[Trial]:
    """What was tried on the way to a result: the reference first, then in the order of the search."""
    return [Trial.from_json(record) for record in history if record.get("event") == EVENT]


def propose(tried: Sequence[Trial], *, floor: float, ceiling: float, trials: int) -> float | None:
    """Say which fraction of the reference's size to try next.

    Bisection between the largest network known not to hold and the smallest known to, in equal ratios. Everything
    follows from what was tried, so that a search which was interrupted asks for the same next.

    Args:
        tried: So far, the reference left out.
        floor: The smallest fraction that widths can reach; taken not to hold.
        ceiling: The largest that is allowed.
        trials: How many may be tried in all.

    Returns:
        The fraction, strictly between floor and ceiling; None where the search is at its end.
    """
    low, high = floor, ceiling
    for trial in tried:
        if trial.holds and trial.size is not None:
            high = min(high, trial.size, trial.limit)
        else:
            low = max(low, trial.limit)  # what it came to may be smaller, and nothing lies between
    if len(tried) >= trials or high <= low * CLOSE:
        return None
    return math.sqrt(low * high)


def smallest_of(tried: Iterable[Trial]) -> Trial | None:
    """The smallest network of those that hold; None where none does."""
    holding = [trial for trial in tried if trial.holds]
    return min(holding, key=lambda trial: (trial.size or 0.0, trial.limit)) if holding else None


def images_needed(accuracy: float, demanded: float) -> int | None:
    """From how many images on the lower end of an accuracy's interval would reach what is demanded.

    Returns:
        About how many; None where no number would do, or more than ten million would.
    """
    if accuracy <= demanded:
        return None
    n = 16
    while wilson(round(accuracy * n), n)[0] < demanded:
        n = math.ceil(1.1 * n)
        if n > 10_000_000:
            return None
    return n


COLUMNS = ("asked for", "size", "MACs", "clean %", "robust %", "95 % interval", "n", "holds")


def rows_of(tried: Sequence[Trial]) -> list[tuple[str, ...]]:
    """The cells of the table of what was tried, in `COLUMNS`; the reference is the first."""
    rows: list[tuple[str, ...]] = []
    for number, trial in enumerate(tried):
        name = f"{trial.limit:.3f}" if number else "reference"
        if trial.size is None:
            rows.append((name, "-", "-", "-", "-", trial.reason, "-", "no"))
            continue
        low, high = trial.interval
        rows.append(
            (
                name,
                f"{trial.size:.3f}",
                f"{(trial.macs or 0) / 1e6:.4g}M",
                f"{100 * (trial.clean or 0):.1f}",
                f"{100 * trial.accuracy:.1f}",
                f"{100 * low:.1f} to {100 * high:.1f}",
                str(trial.n),
                "yes" if trial.holds else "no",
            )
        )
    return rows


def lines_of(tried: Sequence[Trial]) -> list[str]:
    """The table as text."""
    table = [COLUMNS, *rows_of(tried)]
    widths = [max(len(row[i]) for row in table if len(row[i]) < 40) for i in range(len(COLUMNS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
