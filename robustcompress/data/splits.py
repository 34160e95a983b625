"""Which image goes where: stratified, seeded choices over labels alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def stratified(labels: Tensor, count: int, *, seed: int, at_least: int = 0, leave: int = 0) -> Tensor:
    """Choose `count` images so that every class keeps its share.

    Classes get the whole part of their share; what is then missing goes to the largest remainders, ties
    drawn by seed.

    Args:
        labels: int64 `[N]`.
        count: How many to choose; all are chosen where there are not more.
        seed: Equal seeds choose equal images.
        at_least: Images that each class gets (or all it has), at the cost of the largest classes.
        leave: Images of each class that are never chosen.

    Returns:
        int64 indices, ascending; fewer than `count` only where `leave` holds images back.
    """
    generator = torch.Generator().manual_seed(seed)
    position, sizes = _count(labels)
    available = (sizes - leave).clamp(min=0)
    quotas = _quotas(sizes, available, count, torch.rand(len(sizes), generator=generator), at_least)
    shuffled = torch.randperm(len(labels), generator=generator)
    grouped = shuffled[torch.sort(position[shuffled], stable=True).indices]
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(labels)) - starts[position[grouped]]
    return grouped[rank < quotas[position[grouped]]].sort().values


def _count(labels: Tensor) -> tuple[Tensor, Tensor]:
    # Twenty times as fast as torch.unique on the CPU.
    _, position, sizes = np.unique(labels.numpy(), return_inverse=True, return_counts=True)
    return torch.from_numpy(position), torch.from_numpy(sizes)


def _quotas(sizes: Tensor, available: Tensor, count: int, ties: Tensor, at_least: int) -> Tensor:
    shares = sizes * (min(count, int(sizes.sum())) / max(1, int(sizes.sum())))
    # The product of integers and a quotient may miss a whole number by one rounding.
    quotas = (shares + 1e-9).floor().long()
    missing = min(count, int(sizes.sum())) - int(quotas.sum())
    remainder = (shares - quotas).clamp(min=0).mul(1e6).round() + ties
    quotas[remainder.argsort(descending=True)[:missing]] += 1
    floor = sizes.clamp(max=at_least)
    owed = int((floor - quotas).clamp(min=0).sum())
    quotas = torch.maximum(quotas, floor)
    for _ in range(owed):
        surplus = quotas - floor
        if int(surplus.max()) <= 0:
            break
        quotas[int(surplus.argmax())] -= 1
    return torch.minimum(quotas, available)


def without(length: int, chosen: Tensor) -> Tensor:
    """Return the indices below `length` that are not in `chosen`, ascending."""
    keep = torch.ones(length, dtype=torch.bool)
    keep[chosen] = False
    return keep.nonzero().squeeze(1)


def deal(labels: Tensor) -> Tensor:
    """Return an order in which the first n images are a fair sample, where `labels` come class by class.

    Directories and many data sets list one class after the other, and evaluations take the first n images.
    Labels that are in no such order are left alone.
    """
    if len(labels) < 2 or bool((labels[1:] < labels[:-1]).any()):
        return torch.arange(len(labels))
    _, position, sizes = torch.unique_consecutive(labels, return_inverse=True, return_counts=True)
    rank = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[position]
    return torch.sort((rank + 0.5) / sizes[position], stable=True).indices
