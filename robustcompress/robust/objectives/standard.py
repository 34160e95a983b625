"""The standard objectives: natural, adversarial (PGD, FGSM-RS) and TRADES losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustcompress.robust.attacks import pgd
from robustcompress.robust.objective import ObjectiveStep
from robustcompress.robust.objectives.labels import LabelLoss
from robustcompress.robust.objectives.parts import AttackMode, attacking, gaussian
from robustcompress.robust.threat import ThreatModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Natural(LabelLoss):
    """Cross-entropy on the clean images; one forward pass."""

    name: ClassVar[str] = "natural"

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`; the threat is not used, and the images come back as they are."""
        return x

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        logits = model(x_adv)
        return ObjectiveStep(self.cross_entropy(logits, y), logits.detach(), x_adv, logits.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class PGDAT(LabelLoss):
    """Adversarial training (Madry et al. 2018, eq. 2.1): cross-entropy at the end of a PGD attack on it.

    Costs `steps` passes for the attack and one for the loss; running statistics move once, by the attacked batch.

    Attributes:
        steps: PGD steps, from a uniform random start.
        step_size: Length of a step; None means eps/4, the field's 2/255 at 8/255.
        attack_mode: "eval", the field's habit, or "train": batch statistics in the attack, running ones kept.
    """

    name: ClassVar[str] = "pgd-at"
    steps: int = 10
    step_size: float | None = None
    attack_mode: AttackMode = "eval"

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`."""
        with attacking(model, self.attack_mode):
            return pgd(model, x, y, threat, steps=self.steps, step_size=self.step_size, generator=generator)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        logits = model(x_adv)
        return ObjectiveStep(self.cross_entropy(logits, y), logits.detach(), x_adv)


@dataclass(frozen=True, slots=True, kw_only=True)
class FGSMRS(LabelLoss):
    """Fast adversarial training (Wong et al. 2020, algorithm 3): one step of 1.25 eps from a uniform start.

    Cheap (one pass for the attack, one for the loss) and prone to catastrophic overfitting: PGD accuracy
    can fall to zero within an epoch while FGSM accuracy rises. Training watches for it (`Recipe.guard`).

    Attributes:
        step_scale: Length of the step in units of eps; the paper's 1.25.
        attack_mode: "eval", as for all objectives here (the paper's code attacks in train mode), or "train".
    """

    name: ClassVar[str] = "fgsm-rs"
    step_scale: float = 1.25
    attack_mode: AttackMode = "eval"

    @property
    def single_step(self) -> float | None:
        """See `Objective.single_step`."""
        return self.step_scale

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`."""
        step_size = self.step_scale * threat.eps
        with attacking(model, self.attack_mode):
            return pgd(model, x, y, threat, steps=1, step_size=step_size, generator=generator)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        logits = model(x_adv)
        return ObjectiveStep(self.cross_entropy(logits, y), logits.detach(), x_adv)


@dataclass(frozen=True, slots=True, kw_only=True)
class TRADES(LabelLoss):
    """Cross-entropy on clean images plus beta times KL(clean || attacked) (Zhang et al. 2019, eq. 5).

    The attack climbs that KL from Gaussian noise of 0.001 around the images, as in the paper's code; its
    target, the clean logits in the attack's mode, is computed once. The loss makes two forward passes,
    clean then attacked, with gradients through both, so running statistics move twice; the paper's code
    makes three (the clean one twice). For l2 the same normalised-gradient attack is used, where the paper's
    code has an SGD on the noise. Costs 1 + `steps` + 2 passes.

    Attributes:
        beta: Weight of the KL (1/lambda of the paper); 6 is the paper's for CIFAR-10.
        steps: Steps of the attack.
        step_size: Length of a step; None means eps/4 (the paper's code: 0.007 at 0.031).
        attack_mode: "eval", the field's habit, or "train": batch statistics in the attack, running ones kept.
    """

    name: ClassVar[str] = "trades"
    beta: float = 6.0
    steps: int = 10
    step_size: float | None = None
    attack_mode: AttackMode = "eval"

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`."""
        with attacking(model, self.attack_mode):
            return pgd(
                model,
                x,
                y,
                threat,
                steps=self.steps,
                step_size=self.step_size,
                loss="kl",
                start=x.detach() + 0.001 * gaussian(x, generator),
            )

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        clean = model(x)
        attacked = model(x_adv)
        loss = self.cross_entropy(clean, y) + self.beta * self.divergence(clean, attacked, y)
        return ObjectiveStep(loss, attacked.detach(), x_adv, clean.detach())
