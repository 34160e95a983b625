"""What a smaller file loses: the same images through both files, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from robustcompress.budget import human
from robustcompress.robust import PairedTest, paired_test, wilson


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """Two files judged on the same images.

    Attributes:
        name: "clean", or the attack that made the images from the float network.
        before: Which images the float file gets right, bool [N].
        after: Which the smaller one gets right.
    """

    name: str
    before: Tensor
    after: Tensor

    @property
    def loss(self) -> float:
        """Percentage points that are lost; negative where some are gained."""
        return 100 * (int(self.before.sum()) - int(self.after.sum())) / len(self.before)

    @property
    def test(self) -> PairedTest:
        """Whether the difference, before minus after, means anything."""
        return paired_test(self.before, self.after)

    def row(self, flags: Tensor) -> dict[str, Any]:
        """One accuracy as results and files write it."""
        right, n = int(flags.sum()), len(flags)
        low, high = wilson(right, n)
        suite = None if self.name == "clean" else "made from the float network, replayed"
        return {"attack": self.name, "accuracy": right / n, "low": low, "high": high, "n": n, "suite": suite}

    def to_json(self) -> dict[str, Any]:
        """Both accuracies and their difference, as plain JSON."""
        test = self.test
        return {
            "name": self.name,
            "before": self.row(self.before),
            "after": self.row(self.after),
            "loss_points": self.loss,
            "low": 100 * test.low,
            "high": 100 * test.high,
            "p_value": test.p_value,
        }

    def __str__(self) -> str:
        before, after = (self.row(flags) for flags in (self.before, self.after))
        shares = "  ".join(
            f"{100 * r['accuracy']:5.1f} % ({100 * r['low']:.1f} to {100 * r['high']:.1f})" for r in (before, after)
        )
        change = f"{0 - self.loss:+.2f} points, p = {self.test.p_value:.3g}, n = {len(self.before)}"
        return f"{self.name:<10} {shares}  {change}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizeReport:
    """One smaller file, written, and compared with the float file.

    Attributes:
        path: The file.
        to: "int8" or "float16".
        target: For which processor.
        bytes: Its size.
        float_bytes: Size of the float file, with its weights.
        kept: Layers that stay float.
        clean: On held-out images.
        robust: On adversarial images that were made from the float network; None where that was not at hand.
        max_loss: Percentage points that either may lose.
        calibration: How the ranges of activations were found.
        metadata: Every key and value stored in the file.
    """

    path: Path
    to: str
    target: str
    bytes: int
    float_bytes: int
    kept: tuple[str, ...]
    clean: Change
    robust: Change | None
    max_loss: float
    calibration: Mapping[str, Any]
    metadata: Mapping[str, str]

    @property
    def within(self) -> bool:
        """Whether no accuracy that was measured fell by more than `max_loss`."""
        return all(change.loss <= self.max_loss + 1e-9 for change in self.changes)

    @property
    def changes(self) -> tuple[Change, ...]:
        """What was measured."""
        return (self.clean,) if self.robust is None else (self.clean, self.robust)

    def __str__(self) -> str:
        ratio = self.float_bytes / self.bytes
        lines = [
            f"{self.path}  {self.to} for {self.target}, {human(self.bytes)}B of {human(self.float_bytes)}B: "
            f"{ratio:.1f} times smaller"
        ]
        if self.kept:
            lines.append(f"float stay {', '.join(self.kept)}")
        lines.append(f"{'':<10} {'float':<24} {self.to}")
        lines += [str(change) for change in self.changes]
        if self.robust is None:
            lines.append("under attack: not measured, for want of the network in torch to attack: name its result too")
        if not self.within:
            lines.append(f"it loses more than {self.max_loss:g} points, and was written because that was allowed")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON; the path as a string."""
        return {
            "path": str(self.path),
            "to": self.to,
            "target": self.target,
            "bytes": self.bytes,
            "float_bytes": self.float_bytes,
            "kept": list(self.kept),
            "clean": self.clean.to_json(),
            "robust": None if self.robust is None else self.robust.to_json(),
            "max_loss": self.max_loss,
            "within": self.within,
            "calibration": dict(self.calibration),
            "metadata": dict(self.metadata),
        }
