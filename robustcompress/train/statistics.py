"""Batch-norm statistics of a network as it is now, in place of those that it came with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from robustcompress.robust.attacks import kept_modes

BATCHES = 20
"""How many batches are averaged over, wherever nothing else is said: networks must be comparable."""


def estimate_statistics(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, count: int = BATCHES
) -> None:
    """Re-estimate batch-norm statistics on clean images: plain means over batches; modes are as before afterwards.

    Args:
        model: Its running statistics are replaced.
        batches: Images `[B, C, H, W]` with labels, on its device.
        count: How many batches are taken, at most.
    """
    with kept_modes(model):
        update_bn((x for _, (x, _) in zip(range(count), batches, strict=False)), model)
