"""Adversarial training towards classes that are far from the truth in a hierarchy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.errors import InputError
from robustcompress.robust.hierarchy import Hierarchy, hierarchy_from
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives.parts import AttackMode, attacking, check_options
from robustcompress.robust.threat import ThreatModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticAT(Objective):
    """Cross-entropy at the end of a PGD attack that aims at distant classes (after Abreu et al. 2022); reconstructed.

    The idea is the paper's (arXiv 2211.11880): networks that withstand attacks towards semantically distant classes
    make milder mistakes. Ours: each image gets a target drawn among the classes that are farthest from its own in
    the hierarchy, and PGD lowers the cross-entropy to it. The other images are attacked as by `pgd-at`.

    Attributes:
        hierarchy: A `Hierarchy`, a name ("cifar10", "digits"), a JSON file, or what it holds: see `hierarchy_from`.
        share: Share of the images that get a target, in (0, 1]; drawn anew for each batch.
        steps: PGD steps, from a uniform random start.
        step_size: Length of a step; None means eps/4.
        label_smoothing: Share of each label given to all classes alike (in the loss, not in the attack).
        attack_mode: "eval", the field's habit, or "train": batch statistics in the attack, running ones kept.
    """

    name: ClassVar[str] = "semantic-at"
    hierarchy: Hierarchy
    share: float = 1.0
    steps: int = 10
    step_size: float | None = None
    label_smoothing: float = 0.0
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "hierarchy", hierarchy_from(self.hierarchy))

    def check_classes(self, classes: Sequence[str]) -> None:
        """See `Objective.check_classes`."""
        if self.hierarchy.ordered(classes) != self.hierarchy:
            raise InputError(
                f"hierarchy {self.hierarchy.name!r} has the classes in another order than the labels of the data: "
                f"its 'classes' must be {list(classes)!r}"
            )

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`.

        Raises:
            InputError: The model has another number of classes than the hierarchy.
        """
        step = threat.eps / 4 if self.step_size is None else self.step_size
        aimed, towards = self._targets(y, generator)
        goal = torch.where(aimed, towards, y)
        sign = 1.0 - 2.0 * aimed.float()  # towards a target its cross-entropy falls, away from a label it rises
        with attacking(model, self.attack_mode):
            x_adv = threat.random_start(x.detach(), generator)
            for _ in range(self.steps):
                gradient = self._gradient(model, x_adv, goal, sign)
                x_adv = threat.project(threat.ascend(x_adv, gradient, step), x)
        return x_adv

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        logits = model(x_adv)
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        return ObjectiveStep(loss, logits.detach(), x_adv)

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`; the whole hierarchy is written, so that no file is needed to read it."""
        return {
            "name": self.name,
            "hierarchy": self.hierarchy.to_json(),
            "share": self.share,
            "steps": self.steps,
            "step_size": self.step_size,
            "label_smoothing": self.label_smoothing,
            "attack_mode": self.attack_mode,
        }

    def _targets(self, y: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Which images get a target, bool [N], and a farthest class for each, int64 [N]."""
        device = y.device if generator is None else generator.device
        table = self.hierarchy.distances.to(device)
        if len(y) and int(y.max()) >= len(table):
            raise InputError(
                f"label {int(y.max())}, but the hierarchy {self.hierarchy.name!r} has {len(table)} classes"
            )
        farthest = (table == table.amax(1, keepdim=True)).float()
        towards = torch.multinomial(farthest[y.to(device)], 1, generator=generator).squeeze(1)
        aimed = torch.rand(len(y), device=device, generator=generator) < self.share
        return aimed.to(y.device), towards.to(y.device)

    def _gradient(self, model: nn.Module, x: Tensor, goal: Tensor, sign: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = model(x)
            if logits.shape[1] != len(self.hierarchy.classes):
                raise InputError(
                    f"hierarchy {self.hierarchy.name!r} has {len(self.hierarchy.classes)} classes, the model "
                    f"{logits.shape[1]} logits: give the hierarchy of these data"
                )
            climbed = (sign * F.cross_entropy(logits, goal, reduction="none")).sum()
            return torch.autograd.grad(climbed, x)[0]
