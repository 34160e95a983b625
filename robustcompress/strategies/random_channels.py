"""What a cut costs when nothing guides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from robustcompress.errors import Problems
from robustcompress.session import Session
from robustcompress.strategies.base import Direction, Strategy, check_numbers
from robustcompress.strategies.magnitude import ONE_SHOT, one_shot


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomChannels(Strategy):
    """`magnitude` with channels drawn at random: the same widths, the same schedule (Mittal et al. 2018).

    What a criterion is worth is what it gains over this.

    Attributes:
        pretrain: Share of the epochs spent before the cut; the rest fine-tunes. Skipped for a pretrained model.
        finetune_lr: Factor on the recipe's learning rate while fine-tuning.
    """

    name: ClassVar[str] = "random"
    direction: ClassVar[Direction] = "prune"
    pretrain: float = 0.5
    finetune_lr: float = 1.0

    def __post_init__(self) -> None:
        problems = Problems("random cannot run")
        check_numbers(problems, self, ONE_SHOT)
        problems.raise_if_any()

    def run(self, session: Session) -> None:
        """Pretrain, cut, fine-tune."""

        def draw() -> dict[str, torch.Tensor]:
            return {g.name: torch.rand(g.width, generator=session.generator) for g in session.editor.editable}

        one_shot(session, draw, pretrain=self.pretrain, finetune_lr=self.finetune_lr)
