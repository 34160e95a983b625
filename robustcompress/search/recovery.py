"""How a candidate recovers for a few steps: against a cheap attack, towards its teacher."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.robust.attacks import eval_mode
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives import FGSMRS
from robustcompress.robust.threat import ThreatModel


class Distilled(Objective):
    """What the teacher says of the clean image is what the student is to say of the attacked one.

    `KL(teacher(x) || student(x'))`, the outer loss of RSLAD (Zi et al. 2021) without its clean part, with x' from one
    step of FGSM-RS on the labels in place of PGD: it is to be cheap.

    Args:
        teacher: A robust network, frozen.
    """

    name: ClassVar[str] = "distilled"

    def __init__(self, teacher: nn.Module) -> None:
        self._teacher = teacher
        self._attack = FGSMRS()

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
        return self._attack.attack(model, x, y, threat, generator=generator)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        with eval_mode(self._teacher), torch.no_grad():
            wanted = F.log_softmax(self._teacher(x).float(), dim=1)
        logits = model(x_adv)
        said = F.log_softmax(logits.float(), dim=1)
        loss = F.kl_div(said, wanted, reduction="batchmean", log_target=True)
        return ObjectiveStep(loss, logits.detach(), x_adv)

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`; the teacher is not in it."""
        return {"name": self.name}
