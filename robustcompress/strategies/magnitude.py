"""The honest baseline: remove the channels with the smallest weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from robustcompress.errors import Problems
from robustcompress.session import Session
from robustcompress.strategies.base import (
    Direction,
    Strategy,
    check_numbers,
    group_norms,
    prune_to,
    uniform_widths,
)

ONE_SHOT = {"pretrain": (0.0, 0.99), "finetune_lr": (1e-9, 10.0)}
"""The ranges of the options that `one_shot` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude(Strategy):
    """Robust pretraining, one cut by group norm (Li et al. 2017, over coupled channels), robust fine-tuning.

    Every group keeps the same share of its channels, the largest that meets the budget. Also what HYDRA does when it
    searches for zero epochs ("LWM" in Sehwag et al. 2020).

    Attributes:
        pretrain: Share of the epochs spent before the cut; the rest fine-tunes. Skipped for a pretrained model.
        finetune_lr: Factor on the recipe's learning rate while fine-tuning.
    """

    name: ClassVar[str] = "magnitude"
    direction: ClassVar[Direction] = "prune"
    pretrain: float = 0.5
    finetune_lr: float = 1.0

    def __post_init__(self) -> None:
        problems = Problems("magnitude cannot run")
        check_numbers(problems, self, ONE_SHOT)
        problems.raise_if_any()

    def run(self, session: Session) -> None:
        """Pretrain, cut, fine-tune."""
        one_shot(session, lambda: group_norms(session.editor), pretrain=self.pretrain, finetune_lr=self.finetune_lr)


def one_shot(
    session: Session, score: Callable[[], dict[str, torch.Tensor]], *, pretrain: float, finetune_lr: float
) -> None:
    """Pretrain, cut every group by the same share, fine-tune.

    Args:
        session: The network under compression.
        score: Asked once, after pretraining: per editable group, `[C]`; the channels with the largest scores stay.
        pretrain: Share of the epochs before the cut; skipped for a pretrained model.
        finetune_lr: Factor on the recipe's learning rate while fine-tuning.
    """
    pretrain = 0.0 if session.goal.pretrained else pretrain
    if pretrain:
        session.train("pretrain", share=pretrain)
        session.settle()
    prune_to(session, uniform_widths(session), score())
    session.recalibrate()
    session.train("finetune", share=1 - pretrain, lr_scale=finetune_lr, select=True)
