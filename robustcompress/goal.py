"""What a run of compress() is for."""

from __future__ import annotations

from dataclasses import dataclass

from robustcompress.budget import Budget, Cost
from robustcompress.data import DataSplits
from robustcompress.robust.objectives import Objective
from robustcompress.robust.threat import ThreatModel
from robustcompress.train import Recipe


@dataclass(frozen=True, slots=True)
class Goal:
    """What the run is for; a strategy reads it and cannot change it.

    Attributes:
        data: The three splits; strategies see `train` and `val` alone.
        threat: What the network must withstand.
        objective: The loss of every phase.
        budget: What the compact network may cost.
        reference: What the reference costs.
        epochs: Passes over the training images, all phases together.
        recipe: Training settings.
        seed: Seeds everything random.
        pretrained: Whether the reference already is robust, so that pretraining is skipped.
        round_to: Widths are multiples of this wherever a group is that wide.
        finetune: The loss of the fine-tuning after a cut (see `Session.finetune`); None for `objective`.
    """

    data: DataSplits
    threat: ThreatModel
    objective: Objective
    budget: Budget
    reference: Cost
    epochs: float
    recipe: Recipe
    seed: int
    pretrained: bool
    round_to: int
    finetune: Objective | None = None

    @property
    def kept_weights(self) -> int:
        """How many weights of convolutions and linear layers may be other than zero."""
        density = 1.0 if self.budget.density is None else self.budget.density
        return max(1, int(density * (self.reference.weights or 0)))
