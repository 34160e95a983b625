"""Training of networks with auxiliary classifiers, which return a tuple in training mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives import LabelLoss
from robustcompress.robust.threat import ThreatModel
from robustcompress.structure import StructuralEditor
from robustcompress.structure.auxiliary import tensors_of

WEIGHT = 0.3
"""What the loss of each auxiliary classifier is multiplied by (Szegedy et al. 2015, section 5)."""

WEIGHTS = {"torchvision.models.inception.Inception3": 0.4}
"""By the full name of a class, where its training code has another one."""


class MainLogits(nn.Module):
    """A network that returns its logits alone, also where it returns a tuple.

    Args:
        network: Its modes, parameters and buffers are shared.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        self._heard: list[tuple[Tensor, ...]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to logits `[N, K]`."""
        logits, *others = tensors_of(self.network(x))
        if self._heard is not None and others:
            self._heard.append(tuple(others))
        return logits

    @contextmanager
    def listened(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """Collect what else each pass returns."""
        heard: list[tuple[Tensor, ...]] = []
        self._heard = heard
        try:
            yield heard
        finally:
            self._heard = None


class WithAuxiliary(Objective):
    """An objective, plus the weighted cross-entropy of every auxiliary classifier.

    Auxiliary classifiers are given the images that the loss is computed on: attacked ones, or (TRADES) clean and
    attacked ones, and then the mean of both counts. The attack sees the logits alone. So does an objective that defines
    `loss` as a whole, and auxiliary classifiers are not trained by it.

    Args:
        inner: The objective.
        weight: Of each auxiliary classifier's loss.
    """

    name: ClassVar[str] = "with-auxiliary"

    def __init__(self, inner: Objective, weight: float = WEIGHT) -> None:
        self._inner, self._weight = inner, weight
        self._whole = type(inner).loss is not Objective.loss

    @property
    def replays(self) -> int:
        """See `Objective.replays`."""
        return self._inner.replays

    def begin(self) -> Objective:
        """See `Objective.begin`."""
        return WithAuxiliary(self._inner.begin(), self._weight)

    @property
    def remembers(self) -> bool:
        """See `Objective.remembers`."""
        return self._inner.remembers

    def memory(self) -> dict[str, Tensor] | None:
        """See `Objective.memory`."""
        return self._inner.memory()

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """See `Objective.remember`."""
        self._inner.remember(memory)

    def at(self, progress: float) -> Objective:
        """See `Objective.at`."""
        return WithAuxiliary(self._inner.at(progress), self._weight)

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
        return self._inner.attack(MainLogits(model), x, y, threat, generator=generator)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        network = MainLogits(model)
        with network.listened() as heard:
            step = self._inner.loss_on(network, x, x_adv, y)
        compare = self._inner.cross_entropy if isinstance(self._inner, LabelLoss) else F.cross_entropy
        losses = [compare(logits, y) / len(heard) for others in heard for logits in others]
        loss = step.loss + self._weight * torch.stack(losses).sum() if losses else step.loss
        return ObjectiveStep(loss, step.logits, step.x_adv, step.clean_logits)

    def loss(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> ObjectiveStep:
        """See `Objective.loss`."""
        if self._whole:
            return self._inner.loss(MainLogits(model), x, y, threat, generator=generator)
        return super().loss(model, x, y, threat, generator=generator)

    def require_parts(self, who: str = "AWP, SAM, S2AP and diagnose") -> None:
        """See `Objective.require_parts`."""
        self._inner.require_parts(who)

    def to_json(self) -> dict[str, Any]:
        """What the objective itself returns: the auxiliary classifiers belong to the network."""
        return self._inner.to_json()


def with_auxiliary(objective: Objective, editor: StructuralEditor) -> Objective:
    """The objective for a network that may have auxiliary classifiers, with the weight that is usual for it."""
    if not editor.layout.auxiliary:
        return objective
    kind = type(editor.model)
    return WithAuxiliary(objective, WEIGHTS.get(f"{kind.__module__}.{kind.__qualname__}", WEIGHT))
