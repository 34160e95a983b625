"""What attacks on a file found: a report, never a certificate. Plain data, a table, JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustcompress.export import ParityCheck
from robustcompress.robust import AttackResult, RobustReport

FORMAT = 1
UPPER_BOUND = "a report, no certificate: an attack that was not run may find more"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Accuracy of the file at one radius.

    Attributes:
        eps: The radius; 0 is no attack.
        result: How the attack went there.
        unbounded: Whether every image can be turned into plain grey here: nothing should be left of the accuracy.
    """

    eps: float
    result: AttackResult
    unbounded: bool = False

    def to_json(self) -> dict[str, Any]:
        """The point as plain JSON."""
        return {"eps": self.eps, "unbounded": self.unbounded, **self.result.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArtefactReport:
    """What `verify_artefact` found about a file.

    Attributes:
        path: The file.
        file: Its SHA-256, size, precision, and what it reads and gives.
        data: Name of the images, where it is known.
        robust: Flags, accuracies and intervals of every attack, all judged by the file; and the warnings.
        parity: The file against its torch twin; empty without one.
        queries: By attack, of the images that Square broke: how many queries each took.
        curve: Accuracy over radii, ascending; empty where not asked for.
        corruptions: Accuracy under each corruption at severities 1 to 5; empty where not asked for.
        corruption_images: How many images those are about.
        notes: What was left out and why, one sentence each.
        made_with: Versions and hardware.
    """

    path: Path
    file: Mapping[str, Any]
    data: str | None
    robust: RobustReport
    parity: tuple[ParityCheck, ...] = ()
    queries: Mapping[str, tuple[int, ...]]
    curve: tuple[CurvePoint, ...] = ()
    corruptions: Mapping[str, tuple[float, ...]]
    corruption_images: int = 0
    notes: tuple[str, ...] = ()
    made_with: Mapping[str, Any]

    @property
    def worst_case(self) -> AttackResult:
        """Per image, whether the file withstood every attack; over the images that all of them judged."""
        return self.robust.worst_case

    @property
    def clean_accuracy(self) -> float:
        """Accuracy of the file without an attack, in [0, 1]."""
        return self.robust.clean_accuracy

    @property
    def corruption_accuracy(self) -> float | None:
        """Mean accuracy over corruptions and severities; None where they were not made."""
        values = [value for row in self.corruptions.values() for value in row]
        return sum(values) / len(values) if values else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the numbers, or the file."""
        return self.robust.warnings

    def headline(self) -> str:
        """The number to quote, with its interval and what it is about."""
        worst = self.worst_case
        return (
            f"worst case over {len(self.robust.attacks) - 1} attacks: {100 * worst.accuracy:.1f} % "
            f"(95 %: {100 * worst.low:.1f} to {100 * worst.high:.1f}) of {worst.n} images under "
            f"{self.robust.threat.label()}"
        )

    def remarks(self) -> list[str]:
        """What has to be read with the numbers, warnings last."""
        remarks = [UPPER_BOUND, *self.notes]
        for name, spent in self.queries.items():
            if spent:
                remarks.append(
                    f"{name}: the images that it broke took {sorted(spent)[len(spent) // 2]} queries (median)"
                )
        return remarks + [f"warning: {warning}" for warning in self.warnings]

    def parity_lines(self) -> list[str]:
        """One line for each kind of images: the worst over the sizes of a call."""
        lines = []
        for name in dict.fromkeys(check.name for check in self.parity):
            checks = [check for check in self.parity if check.name == name]
            lines.append(
                f"as its twin, {name} images: {100 * min(c.argmax_agreement for c in checks):.1f} % get the same "
                f"class, scores differ by {max(c.relative_diff for c in checks):.1e} of their scale "
                f"(n={checks[0].images}; {', '.join(str(c.batch) for c in checks)} a call)"
            )
        return lines

    def corruption_rows(self) -> list[tuple[str, ...]]:
        """The cells of the table: the corruption, accuracy % at each severity, their mean."""
        return [
            (name, *(f"{100 * value:.1f}" for value in row), f"{100 * sum(row) / len(row):.1f}")
            for name, row in self.corruptions.items()
        ]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.headline()}", ""]
        columns = ("attack", "accuracy %", "95 % interval", "n", "seconds")
        rows = [columns, *self.robust.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        for first, *others in rows:
            cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
        lines += self.parity_lines()
        if self.curve:
            points = ", ".join(f"{p.eps:.4g}: {100 * p.result.accuracy:.1f} %" for p in self.curve)
            lines.append(f"accuracy over eps (n={self.curve[0].result.n}): {points}")
        mean = self.corruption_accuracy
        if mean is not None:
            lines.append(f"mean over corruptions: {100 * mean:.1f} % (n={self.corruption_images} images each)")
        return "\n".join(lines + self.remarks())

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON; of the path only the name."""
        worst, mean = self.worst_case, self.corruption_accuracy
        return {
            "format": FORMAT,
            "file": {"name": self.path.name, **self.file},
            "data": self.data,
            "clean_accuracy": self.clean_accuracy,
            "worst_case": {"accuracy": worst.accuracy, "low": worst.low, "high": worst.high, "n": worst.n},
            "robust": self.robust.to_json(),
            "parity": [check.to_json() for check in self.parity],
            "queries": {name: list(spent) for name, spent in self.queries.items()},
            "curve": [point.to_json() for point in self.curve],
            "corruptions": {name: list(row) for name, row in self.corruptions.items()},
            "corruption_accuracy": mean,
            "corruption_images": self.corruption_images,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "made_with": dict(self.made_with),
        }
