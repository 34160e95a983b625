"""What an evaluation found: flags for every image and attack, the numbers they give, and what to doubt."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustcompress.errors import InputError, ResultError, nearest
from robustcompress.robust.hierarchy import Hierarchy, Severity
from robustcompress.robust.statistics import wilson
from robustcompress.robust.threat import ThreatModel

WORST_CASE = "worst case"
_FORMAT = 1
_COLUMNS = ("attack", "accuracy %", "95 % interval", "n", "seconds")
_NOT_RUN = (
    "robust accuracy means AutoAttack at exactly the stated eps, and AutoAttack was not run: "
    "PGD is a progress meter, not a result"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttackResult:
    """How one attack went.

    Attributes:
        name: The attack's name, as `attack_by_name` reads it.
        correct: For each image, in the report's order, whether it was still classified right: bool [n] on
            the CPU. An image that the clean model gets wrong counts as wrong under every attack.
        seconds: Wall time that the attack took; for a continued evaluation, over all its runs.
        max_perturbation: Largest change actually made to an image, in the threat's norm; 0 where none was.
        suite: Which attacks AutoAttack was made of; "" for others.
        broken_by: For AutoAttack: how many images each attack of the suite was the first to break.
        severity: How far from the truth its mistakes are, where a hierarchy was given; else None.
    """

    name: str
    correct: Tensor
    seconds: float
    max_perturbation: float = 0.0
    suite: str = ""
    broken_by: Mapping[str, int] = field(default_factory=dict)
    severity: Severity | None = None

    @property
    def n(self) -> int:
        """How many images were judged."""
        return self.correct.numel()

    @property
    def accuracy(self) -> float:
        """Share of the judged images that were still right, in [0, 1]; NaN of none."""
        return int(self.correct.sum()) / self.n if self.n else float("nan")

    @property
    def low(self) -> float:
        """Lower end of the 95 % Wilson interval of the accuracy."""
        return wilson(int(self.correct.sum()), self.n)[0]

    @property
    def high(self) -> float:
        """Upper end of the 95 % Wilson interval of the accuracy."""
        return wilson(int(self.correct.sum()), self.n)[1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttackResult) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, Any]:
        """Return plain data; the flags as one string of 0 and 1, distances of mistakes as pairs with their numbers."""
        data = {
            "name": self.name,
            "n": self.n,
            "accuracy": self.accuracy if self.n else None,
            "low": self.low,
            "high": self.high,
            "seconds": self.seconds,
            "max_perturbation": self.max_perturbation,
            "suite": self.suite,
            "broken_by": dict(self.broken_by),
            "correct": pack_flags(self.correct),
        }
        if self.severity is None:
            return data
        mean = self.severity.mean if self.severity.errors else None
        return data | {"mistakes": self.severity.to_json(), "mean_distance": mean}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AttackResult:
        """Read what `to_json` wrote.

        Raises:
            ResultError: A key is missing or of the wrong type, or the flags do not give the stated accuracy.
        """
        try:
            result = cls(
                name=_text(data["name"]),
                correct=unpack_flags(data["correct"]),
                seconds=_number(data["seconds"]),
                max_perturbation=_number(data["max_perturbation"]),
                suite=str(data["suite"]),
                broken_by={str(key): int(count) for key, count in data["broken_by"].items()},
                severity=Severity.from_json(data["mistakes"]) if "mistakes" in data else None,
            )
            stated = None if data["accuracy"] is None else float(data["accuracy"])
            n = data["n"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ResultError(f"this is not the result of an attack: {error!r}") from error
        if n != result.n or (stated is not None and not abs(stated - result.accuracy) <= 1e-9):
            raise ResultError(
                f"the flags of {result.name!r} do not give the stated accuracy {stated} of {n} images: "
                "the file was changed, evaluate again"
            )
        if result.severity is not None and result.severity.errors != result.n - int(result.correct.sum()):
            raise ResultError(f"{result.name!r} has not as many distances as mistakes: the file was changed")
        return result


def _number(value: Any) -> float:
    if isinstance(value, str) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RobustReport:
    """What `evaluate` found.

    Attributes:
        threat: What the adversary was allowed.
        n: How many images were chosen; an attack may have judged fewer, always the first ones.
        seed: Seed of the attacks.
        attacks: Results in the order they ran; "clean" comes first.
        images_sha256: Hash of the chosen images and labels, in order: equal hashes mean paired flags.
        indices: Which images of the data were chosen, in the order judged: int64 [n]. It depends on how
            many there are and on nothing else, so that two reports are about the same images.
        warnings: Reasons to doubt the numbers, each a sentence.
        hierarchy: By which the mistakes' distances are measured; None where they are not.
    """

    threat: ThreatModel
    n: int
    seed: int
    attacks: tuple[AttackResult, ...]
    images_sha256: str
    indices: Tensor
    warnings: tuple[str, ...] = ()
    hierarchy: Hierarchy | None = None

    def result(self, attack: str) -> AttackResult:
        """Return the result of one attack by name, or of "worst case".

        Raises:
            InputError: That attack was not run.
        """
        if attack == WORST_CASE:
            return self.worst_case
        for result in self.attacks:
            if result.name == attack:
                return result
        names = [result.name for result in self.attacks]
        raise InputError(f"attack {attack!r} was not run{nearest(attack, [*names, WORST_CASE])}")

    @property
    def worst_case(self) -> AttackResult:
        """Per image, whether it withstood every attack; over the images that all of them judged."""
        n = min(result.n for result in self.attacks)
        correct = torch.stack([result.correct[:n] for result in self.attacks]).all(0)
        return AttackResult(
            name=WORST_CASE,
            correct=correct,
            seconds=sum(result.seconds for result in self.attacks),
            max_perturbation=max(result.max_perturbation for result in self.attacks),
        )

    @property
    def clean_accuracy(self) -> float:
        """Accuracy without an attack, in [0, 1]."""
        return self.result("clean").accuracy

    @property
    def robust_accuracy(self) -> float | None:
        """Accuracy under AutoAttack, in [0, 1]; None where it was not run. No weaker attack stands in for it."""
        for result in self.attacks:
            if result.name == "autoattack":
                return result.accuracy
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RobustReport) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, Any]:
        """Return plain data from which `from_json` makes an equal report."""
        data = {
            "format": _FORMAT,
            "threat": self.threat.to_json(),
            "n": self.n,
            "seed": self.seed,
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "attacks": [result.to_json() for result in self.attacks],
            "images_sha256": self.images_sha256,
            "indices": self.indices.tolist(),
            "warnings": list(self.warnings),
        }
        return data if self.hierarchy is None else data | {"hierarchy": self.hierarchy.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RobustReport:
        """Read what `to_json` wrote.

        Raises:
            ResultError: The data are of a newer format, incomplete, or contradict themselves.
        """
        if data.get("format") != _FORMAT:
            raise ResultError(f"format {data.get('format')!r} of this robust report is not {_FORMAT}: evaluate again")
        try:
            report = cls(
                threat=ThreatModel.from_json(data["threat"]),
                n=int(data["n"]),
                seed=int(data["seed"]),
                attacks=tuple(AttackResult.from_json(item) for item in data["attacks"]),
                images_sha256=str(data["images_sha256"]),
                indices=torch.tensor(data["indices"], dtype=torch.int64),
                warnings=tuple(str(warning) for warning in data["warnings"]),
                hierarchy=Hierarchy.from_json(data["hierarchy"]) if "hierarchy" in data else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ResultError(f"this is not a robust report: {error!r}") from error
        named = [result.name for result in report.attacks]
        if "clean" not in named or len(set(named)) != len(named) or len(report.indices) != report.n:
            raise ResultError("this robust report is incomplete: it lacks results or indices, or names one twice")
        return report

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return the cells of the table: attack, accuracy %, interval, n, seconds."""
        rows = [
            (
                result.name,
                f"{100 * result.accuracy:.2f}" if result.n else "-",
                f"{100 * result.low:.1f} to {100 * result.high:.1f}",
                str(result.n),
                f"{result.seconds:.1f}",
            )
            for result in (*self.attacks, self.worst_case)
        ]
        return rows if len(self.attacks) > 1 else rows[:1]

    def notes(self) -> list[str]:
        """Return what has to be read with the numbers, one sentence each; the warnings come last."""
        notes = []
        if self.robust_accuracy is None:
            notes.append(_NOT_RUN)
        else:
            autoattack = self.result("autoattack")
            notes.append(f"AutoAttack: {autoattack.suite}")
            if autoattack.n < self.n:
                notes.append(f"AutoAttack judged {autoattack.n} of {self.n} images, the worst case is over those")
        notes += self.mistakes()
        return notes + [f"warning: {warning}" for warning in self.warnings]

    def mistakes(self) -> list[str]:
        """Return one sentence on how far from the truth mistakes are; none where no hierarchy was given."""
        if self.hierarchy is None:
            return []
        found = [f"{r.name} {_mistakes(r.severity)}" for r in self.attacks if r.severity is not None]
        about = f"{self.hierarchy.name!r} (a class at random: {self.hierarchy.chance:.2f})"
        return [f"mean distance of mistakes in {about}: {', '.join(found)}"] if found else []

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in (_COLUMNS, *rows)) for i in range(len(_COLUMNS))]
        lines = [f"robustness under {self.threat.label()}, {self.n} images, seed {self.seed}"]
        for row in (_COLUMNS, *rows):
            numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
        return "\n".join(lines + self.notes())

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows()
        )
        title = html.escape(f"robustness under {self.threat.label()}, {self.n} images, seed {self.seed}")
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes())
        return f"<table><caption>{title}</caption><tr>{head}</tr>{body}</table>{notes}"


def _mistakes(severity: Severity) -> str:
    if not severity.errors:
        return "none"
    spread = f" +- {severity.error:.2f}" if math.isfinite(severity.error) else ""
    return f"{severity.mean:.2f}{spread} of {severity.errors}"


def pack_flags(flags: Tensor) -> str:
    """Write a bool vector as one string of 0 and 1."""
    return "".join("1" if flag else "0" for flag in flags.tolist())


def unpack_flags(text: str) -> Tensor:
    """Read what `pack_flags` wrote.

    Raises:
        ValueError: There is another character than 0 and 1.
    """
    if not isinstance(text, str) or set(text) - {"0", "1"}:
        raise ValueError("flags are a string of 0 and 1")
    return torch.tensor([character == "1" for character in text], dtype=torch.bool)
