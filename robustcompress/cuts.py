"""What a scan of sensitivities found: one cut after the other, and the tables they make."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from robustcompress.robust import ThreatModel

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One network in which one thing was taken away.

    Attributes:
        part: The channel group, or the block.
        share: Share of the group's channels that was asked for; None for a block, which left.
        kept: How many channels were kept; 0 for a block.
        width: How many there were; 0 for a block.
        macs: Share of the network's multiply-adds that goes with it.
        clean: Accuracy that is left, in [0, 1].
        robust: Accuracy under attack that is left.
        loss: Accuracy under attack that was lost, on the same images; negative where it rose.
        low: Lower end of the 95 % interval of that loss.
        high: Upper end.
        clean_loss: Accuracy without an attack that was lost.
    """

    part: str
    share: float | None
    kept: int
    width: int
    macs: float
    clean: float
    robust: float
    loss: float
    low: float
    high: float
    clean_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What `sensitivity()` found.

    Attributes:
        cuts: In the network's order, the smallest cuts of each group first; blocks at the end.
        clean: Accuracy of the whole network, in [0, 1].
        robust: The same under attack.
        low: Lower end of the 95 % interval of that.
        high: Upper end.
        n: Images that all are judged on.
        attack: What they are attacked with, each network anew.
        threat: What the attack may do.
        data: Name of the data.
        split: Which of its images: "val" or "test".
        recalibrated: Whether batch-norm statistics were estimated anew in every network, the whole one included.
        warnings: Reasons to doubt the numbers.
    """

    cuts: tuple[Cut, ...]
    clean: float
    robust: float
    low: float
    high: float
    n: int
    attack: str
    threat: ThreatModel
    data: str
    split: str
    recalibrated: bool
    warnings: tuple[str, ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares that were tried, the largest first."""
        return tuple(sorted({cut.share for cut in self.cuts if cut.share is not None}, reverse=True))

    @property
    def groups(self) -> tuple[str, ...]:
        """The channel groups, in the network's order."""
        return tuple(dict.fromkeys(cut.part for cut in self.cuts if cut.share is not None))

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that can leave, in the network's order."""
        return tuple(cut.part for cut in self.cuts if cut.share is None)

    def cut(self, part: str, share: float | None = None) -> Cut | None:
        """One cut; None where the group is too narrow for it."""
        return next((cut for cut in self.cuts if cut.part == part and cut.share == share), None)

    def ranked(self) -> tuple[str, ...]:
        """The groups, the most sensitive first: by the robust accuracy lost, on the mean over the shares."""
        losses = {group: [cut.loss for cut in self.cuts if cut.part == group] for group in self.groups}
        return tuple(sorted(self.groups, key=lambda group: -sum(losses[group]) / len(losses[group])))

    def ranked_blocks(self) -> tuple[str, ...]:
        """The blocks, the most sensitive first."""
        return tuple(cut.part for cut in sorted((c for c in self.cuts if c.share is None), key=lambda cut: -cut.loss))

    @property
    def title(self) -> str:
        """What is measured, in a line."""
        anew = ", batch-norm statistics estimated anew" if self.recalibrated else ""
        return (
            f"{self.attack} accuracy of the whole network: {100 * self.robust:.1f} % ({100 * self.low:.1f} to "
            f"{100 * self.high:.1f}), clean {100 * self.clean:.1f} %; {self.n} {self.split} images of {self.data}, "
            f"{self.threat.label()}{anew}"
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings of `rows`."""
        shares = [f"lost at {share:g}" for share in self.shares]
        return ("group", "width", "MACs %", *shares, "95 % interval", "clean lost")

    def rows(self) -> list[tuple[str, ...]]:
        """The groups as a table, the most sensitive first: percentage points of robust accuracy lost at each share."""
        rows = []
        for group in self.ranked():
            cuts = [self.cut(group, share) for share in self.shares]
            last = next(cut for cut in reversed(cuts) if cut is not None)
            lost = ["-" if cut is None else f"{100 * cut.loss:+.1f}" for cut in cuts]
            whole = next(cut for cut in cuts if cut is not None)
            rows.append((group, str(whole.width), f"{100 * last.macs:.1f}", *lost, *_ends(last)))
        return rows

    @property
    def block_columns(self) -> tuple[str, ...]:
        """Headings of `block_rows`."""
        return ("block", "MACs %", "lost without it", "95 % interval", "clean lost")

    def block_rows(self) -> list[tuple[str, ...]]:
        """The blocks as a table, the most sensitive first."""
        found = [cut for block in self.ranked_blocks() if (cut := self.cut(block)) is not None]
        return [(cut.part, f"{100 * cut.macs:.1f}", f"{100 * cut.loss:+.1f}", *_ends(cut)) for cut in found]

    def notes(self) -> list[str]:
        """What has to be read with the numbers."""
        notes = [f"warning: {warning}" for warning in self.warnings]
        return [
            *notes,
            "Percentage points; interval and clean accuracy at the smallest share. Nothing was trained again.",
        ]

    def __str__(self) -> str:
        lines = [self.title]
        for table in ([self.columns, *self.rows()], [self.block_columns, *self.block_rows()]):
            if len(table) > 1:
                widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
                lines += [
                    "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))])
                    for r in table
                ]
        return "\n".join([*lines, *self.notes()])

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        record = asdict(self) | {"threat": self.threat.to_json(), "cuts": [asdict(cut) for cut in self.cuts]}
        ranked = {"ranked": list(self.ranked()), "ranked_blocks": list(self.ranked_blocks())}
        return {"format": FORMAT, **record, "warnings": list(self.warnings), **ranked}


def _ends(cut: Cut) -> tuple[str, str]:
    return f"{100 * cut.low:+.1f} to {100 * cut.high:+.1f}", f"{100 * cut.clean_loss:+.1f}"
