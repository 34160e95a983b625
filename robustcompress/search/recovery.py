"""How a candidate recovers for a few steps: against a cheap attack, towards its teacher."""

from __future__ import annotations

from torch import nn

from robustcompress.robust.objective import Objective
from robustcompress.robust.objectives import FGSMRS, RobustDistillation
from robustcompress.robust.threat import ThreatModel


def distilled(teacher: nn.Module, threat: ThreatModel) -> Objective:
    """What the teacher says of the clean image is what the student is to say of the attacked one.

    `KL(teacher(x) || student(x'))`, the outer loss of RSLAD (Zi et al. 2021) without its clean part, with x' from the
    one step of FGSM-RS on the labels in place of PGD: it is to be cheap.

    Args:
        teacher: A robust network, frozen.
        threat: What the adversary may do.
    """
    step_size = FGSMRS().step_scale * threat.eps
    kind = RobustDistillation(inner="ce", adversarial=1.0, natural=0.0, steps=1, step_size=step_size)
    return kind.taught_by(teacher)
