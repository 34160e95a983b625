"""The loss that diagnostics look at: on images that are attacked once, so that only the gates move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustcompress.robust.objective import Objective
from robustcompress.robust.threat import ThreatModel


def attacked_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    threat: ThreatModel,
    *,
    generator: torch.Generator,
) -> Callable[[], Tensor]:
    """Attack images now; later give the loss on them, at whatever gates and in whatever mode the network then has.

    Args:
        model: The network, with its gates open.
        x: Images within `threat.bounds`, [N, C, H, W].
        y: Labels, int64 [N].
        objective: Says how to attack and what the loss is.
        threat: What the adversary may do.
        generator: The attack's randomness.

    Returns:
        Computes the scalar loss with its graph; running statistics move in train mode.

    Raises:
        InputError: The objective has no parts.
    """
    objective.require_parts()
    x_adv = objective.attack(model, x, y, threat, generator=generator)
    return lambda: objective.loss_on(model, x, x_adv, y).loss
