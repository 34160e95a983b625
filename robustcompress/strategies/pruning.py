"""What strategies that cut a trained network have in common: their options, and the order of their phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from robustcompress.errors import Problems
from robustcompress.session import Session
from robustcompress.shapes import Widths, floor_widths
from robustcompress.strategies.base import Direction, Granularity, Strategy, check_choices, check_numbers
from robustcompress.strategies.units import Allocation, Channels, Choice, Residual, Scores, Weights, granular
from robustcompress.structure import StructuralEditor
from robustcompress.teacher import appoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning(Strategy):
    """Robust pretraining, a cut, robust fine-tuning. Abstract: who derives from it says by which scores is cut.

    Attributes:
        pretrain: Share of the epochs spent before the cut; the rest fine-tunes. Skipped for a pretrained model.
        finetune_lr: Factor on the recipe's learning rate while fine-tuning.
        granularity: "channel" removes channels and makes the network smaller; "weight" zeroes single weights, which
            leaves its shape, and needs a budget that says a density.
        allocation: "uniform" keeps the same share everywhere, "global" ranks all scores together.
        residual: "coupled" cuts residual streams too, in all layers that write and read them; "freeze" cuts inside
            blocks alone.
    """

    direction: ClassVar[Direction] = "prune"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Of further options that are numbers."""

    pretrain: float = 0.5
    finetune_lr: float = 1.0
    granularity: Granularity = "channel"
    allocation: Allocation = "uniform"
    residual: Residual = "coupled"

    def __post_init__(self) -> None:
        problems = Problems(f"{self.name} cannot run")
        ranges = {"pretrain": (0.0, 0.99), "finetune_lr": (1e-9, 10.0), **self.ranges}
        check_numbers(problems, self, ranges)
        kinds = {"granularity": Granularity, "allocation": Allocation, "residual": Residual}
        check_choices(problems, self, {name: get_args(kind) for name, kind in kinds.items()})
        if self.granularity == "weight" and self.residual == "freeze":
            problems.add("residual='freeze' keeps channels of residual streams: leave it out with granularity='weight'")
        self.check(problems)
        problems.raise_if_any()

    @property
    def finetunes(self) -> bool:
        """Always."""
        return True

    @property
    def pretrains(self) -> bool:
        """Where epochs are spent on it."""
        return self.pretrain > 0

    def check(self, problems: Problems) -> None:
        """Note what else is wrong with the options; nothing by default."""

    def narrowest(self, editor: StructuralEditor, round_to: int) -> Widths:
        """Residual streams stay where they are frozen."""
        floor = floor_widths(editor, round_to)
        if self.residual == "coupled":
            return floor
        return {g.name: g.width if g.kind == "residual" else floor[g.name] for g in editor.editable}

    def units(self, session: Session) -> Channels | Weights:
        """What is chosen among."""
        return granular(session, granularity=self.granularity, allocation=self.allocation, residual=self.residual)

    def begin(self, session: Session) -> float:
        """Pretrain; what comes of it teaches the fine-tuning, where that wants it.

        Returns:
            The share of the epochs that it took.
        """
        share = 0.0 if session.goal.pretrained else self.pretrain
        if share:
            session.train("pretrain", share=share)
            session.settle()
        appoint(session)
        return share


def one_shot(
    strategy: Pruning,
    session: Session,
    score: Callable[[Channels | Weights], Scores],
    *,
    note: Mapping[str, Any] | None = None,
) -> None:
    """Pretrain, cut once, fine-tune.

    Args:
        strategy: Its options are followed.
        session: The network under compression.
        score: Asked after pretraining; what has the largest scores stays.
        note: A record for the history that says what the scores took.
    """
    spent = strategy.begin(session)
    if note is not None:
        session.record(dict(note))
    units = strategy.units(session)
    with cut(session, units, lambda: Choice(score(units))):
        session.finetune(share=1 - spent, lr_scale=strategy.finetune_lr)


@contextmanager
def cut(session: Session, units: Channels | Weights, choose: Callable[[], Choice]) -> Iterator[None]:
    """Cut, re-estimate batch-norm statistics, and note how accurate the network is before it is fine-tuned.

    What was cut stays cut while the context is open.
    """
    with units.cut(choose):
        session.recalibrate()
        if len(session.goal.data.val) and session.goal.recipe.val_images:
            clean, robust = session.decide("accuracy before fine-tuning", session.validate)
            macs = session.cost_model.predict(session.editor.widths)[0]
            record = {"phase": "prune", "event": "mask", "val_clean": clean, "val_robust": robust, "macs": round(macs)}
            session.record(record)
        yield
