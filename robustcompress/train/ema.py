"""Averaged weights: the one stabiliser every strategy shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a model's parameters and buffers.

    The decay of update `n` is `min(decay, (1 + n) / (10 + n))`. Structural edits reach the average through
    `StructuralEditor.follow`.

    Args:
        model: The network to follow; call `.update_parameters(model)` after each step.
        decay: Largest decay, in (0, 1).
    """

    def update(averages: Sequence[torch.Tensor], currents: Sequence[torch.Tensor], count: torch.Tensor | int) -> None:
        n = int(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        floating = averages[0].is_floating_point()
        if floating:
            torch._foreach_lerp_(list(averages), list(currents), weight)
        else:  # counters of batch norms
            torch._foreach_copy_(list(averages), list(currents))

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
