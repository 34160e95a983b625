"""MART: misclassified examples count more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.robust.attacks import pgd
from robustcompress.robust.objective import ObjectiveStep
from robustcompress.robust.objectives.labels import LabelLoss
from robustcompress.robust.objectives.parts import AttackMode, attacking
from robustcompress.robust.threat import ThreatModel


@dataclass(frozen=True, slots=True, kw_only=True)
class MART(LabelLoss):
    """Misclassification-aware adversarial training (Wang et al., ICLR 2020, eq. 11): boosted CE, and a weighted KL.

    With p on clean and p' on attacked images: `-log p'_y - log(1 - max_{k != y} p'_k) + lam * KL(p || p') * (1 - p_y)`.
    The attack is PGD on cross-entropy. Gradients flow through all three factors of the last term, as in the paper's
    code. Its attack starts from Gaussian noise of 0.001, this one uniformly within the ball; the code adds 1e-4 within
    the second logarithm, which is computed from the logits here and needs none. Labels are smoothed in `-log p'_y`. Two
    forward passes, clean then attacked, so running statistics move twice; costs `steps` + 2 passes.

    Attributes:
        lam: Weight of the last term, lambda; 5 is the paper's for CIFAR-10 (its code's default is 6).
        steps: PGD steps, from a uniform random start.
        step_size: Length of a step; None means eps/4 (the paper's code: 0.007 at 0.031).
        attack_mode: "eval", the field's habit, or "train": batch statistics in the attack, running ones kept.
    """

    name: ClassVar[str] = "mart"
    lam: float = 5.0
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
        clean, attacked = model(x), model(x_adv)
        boosted = self.cross_entropy(attacked, y) + self.mean(runner_up(attacked.float(), y), y)
        p, q = clean.float().log_softmax(1), attacked.float().log_softmax(1)
        doubt = 1 - p.gather(1, y[:, None]).squeeze(1).exp()
        divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(1)
        loss = boosted + self.lam * self.mean(divergence * doubt, y)
        return ObjectiveStep(loss, attacked.detach(), x_adv, clean.detach())


def runner_up(logits: Tensor, y: Tensor) -> Tensor:
    """`-log(1 - max_{k != y} p_k)` of each example, [N]: how sure the network is of the likeliest wrong class.

    Computed as logsumexp(all) - logsumexp(all but that class), which stays finite where that probability rounds to one.

    Args:
        logits: [N, K], with K at least 2.
        y: True labels, int64 [N].
    """
    wrong = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    others = logits.scatter(1, wrong[:, None], -torch.inf)
    return logits.logsumexp(1) - others.logsumexp(1)
