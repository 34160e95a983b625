"""Training for randomized smoothing: cross-entropy under Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robustcompress.robust.objective import ObjectiveStep
from robustcompress.robust.objectives.labels import LabelLoss
from robustcompress.robust.objectives.parts import gaussian
from robustcompress.robust.threat import ThreatModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing(LabelLoss):
    """Cross-entropy on images under Gaussian noise (Cohen et al. 2019, section 3.3): for `certify(method="smoothing")`.

    What is certified is the network's majority vote under noise of one sigma: train with the sigma that certifies. The
    noise is drawn anew for each step and not clipped to the range of pixels, as in certification. One forward pass; the
    threat is not used. HYDRA's own objective for smoothing is stability training (Sehwag et al. 2020, section 4); for
    ImageNet it trains with noise alone, as here.

    Attributes:
        sigma: Standard deviation of the noise, in the unit of the pixels; 0.25, 0.5 and 1.0 are usual for CIFAR-10.
    """

    name: ClassVar[str] = "smoothing"
    sigma: float = 0.25

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`: the images under noise, which respects neither the threat's ball nor its bounds."""
        return x.detach() + self.sigma * gaussian(x, generator)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        logits = model(x_adv)
        return ObjectiveStep(self.cross_entropy(logits, y), logits.detach(), x_adv)

    def withstood(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.withstood`: the images that are right under one draw of the noise."""
        with torch.no_grad():
            right: Tensor = model(self.attack(model, x, y, threat, generator=generator)).argmax(1) == y
        return right
