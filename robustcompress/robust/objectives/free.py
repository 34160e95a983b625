"""Free adversarial training: one backward pass for the weights and for the perturbation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustcompress.errors import InputError
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives.labels import LabelLoss
from robustcompress.robust.threat import ThreatModel


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeAT(LabelLoss):
    """Free adversarial training (Shafahi et al. 2019, algorithm 1): batches replayed, attacked by their own gradients.

    Every batch is trained on `replays` times. The backward pass of each time moves the weights, and the perturbation of
    the next time: `delta <- clip(delta + step * sign(grad))`, along the normalised gradient for l2. A batch begins with
    the perturbation that the one before it ended with, as in the paper; ours: an epoch begins with none, so that
    checkpoints at the ends of epochs need not hold any.

    A pass costs no attack, and is counted as what it is: an epoch has as many steps as it has batches, and so sees one
    in `replays` of the images, other ones each time. Give it `replays` times the epochs for as many passes over the
    images as other objectives make, at 1 / (steps + 1) of the price of PGD-AT each. Gradients cannot be had apart from
    the step, so nothing that attacks beforehand or evaluates twice goes with it: AWP, SAM, S2AP, HARP, AWT.

    Attributes:
        replays: How often a batch is trained on, the paper's m; 8 is the paper's for CIFAR-10.
        step_scale: Length of a step of the perturbation in units of eps; the paper's 1.
    """

    name: ClassVar[str] = "free-at"
    replays: int = 8
    step_scale: float = 1.0

    @property
    def single_step(self) -> float | None:
        """See `Objective.single_step`."""
        return self.step_scale

    def begin(self) -> Objective:
        """See `Objective.begin`: an epoch's memory of its perturbation, empty."""
        return FreeEpoch(self)

    def loss(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> ObjectiveStep:
        """See `Objective.loss`: the first step of an epoch, whose images are not perturbed yet."""
        return self.begin().loss(model, x, y, threat, generator=generator)

    def require_parts(self, who: str = "AWP, SAM, S2AP and diagnose") -> None:
        """See `Objective.require_parts`: always an error."""
        raise InputError(
            f"objective {self.name!r} attacks with the gradient of its own training step, and has no attack apart from "
            f"it: leave out {who}, or take 'pgd-at' or 'fgsm-rs'"
        )


class FreeEpoch(Objective):
    """`FreeAT` over one epoch: each step goes on from the gradient that was found for the one before.

    Args:
        options: Those of the training.
    """

    name: ClassVar[str] = FreeAT.name

    def __init__(self, options: FreeAT) -> None:
        self._options = options
        self._delta: Tensor | None = None
        self._attacked: Tensor | None = None

    @property
    def replays(self) -> int:
        """See `Objective.replays`."""
        return self._options.replays

    def loss(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> ObjectiveStep:
        """See `Objective.loss`. The caller's backward pass leaves in the attacked images what the next call needs."""
        self._delta = self._next(x, threat)
        # The gradient is that of the clamped images: one of the perturbation would vanish where a pixel is at a bound.
        self._attacked = (x + self._delta).clamp_(*threat.bounds).requires_grad_()
        logits = model(self._attacked)
        return ObjectiveStep(self._options.cross_entropy(logits, y), logits.detach(), self._attacked.detach())

    def memory(self) -> dict[str, Tensor]:
        """See `Objective.memory`: the perturbation, and the gradient that moves it."""
        delta, attacked = self._delta, self._attacked
        if delta is None or attacked is None or attacked.grad is None:
            return {}
        return {"delta": delta, "gradient": attacked.grad}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """See `Objective.remember`."""
        self._delta = self._attacked = None
        if memory:
            self._delta = memory["delta"]
            self._attacked = torch.zeros_like(memory["gradient"], requires_grad=True)  # its gradient is what counts
            self._attacked.grad = memory["gradient"]

    def _next(self, x: Tensor, threat: ThreatModel) -> Tensor:
        """The perturbation after one step; none for a first batch, or one of another shape."""
        delta, attacked = self._delta, self._attacked
        if delta is None or attacked is None or delta.shape != x.shape:
            return torch.zeros_like(x)
        if attacked.grad is None:  # nobody asked for gradients
            return delta
        delta = delta.to(x.device)  # a checkpoint gives it on the CPU
        ball = replace(threat, bounds=(-threat.eps, threat.eps))  # of perturbations; `loss` clamps the pixels
        moved = ball.ascend(delta, attacked.grad.to(x.device), self._options.step_scale * threat.eps)
        return ball.project(moved, torch.zeros_like(delta))

    def require_parts(self, who: str = "AWP, SAM, S2AP and diagnose") -> None:
        """See `FreeAT.require_parts`."""
        self._options.require_parts(who)

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`; the perturbation is not in it."""
        return self._options.to_json()
