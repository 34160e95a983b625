"""Copies of a network with other tensors in them."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def copied(model: nn.Module, of: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """A copy of a network with other parameters and buffers; the network's own are not copied on the way.

    Args:
        model: The network.
        of: Gives the tensor that takes the place of a parameter or a buffer. What stands for a parameter becomes one,
            with gradients.

    Returns:
        The copy. A tensor in use in two places stays one.
    """
    memo: dict[int, Any] = {id(buffer): of(buffer) for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(of(p), requires_grad=True) for p in model.parameters()}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()  # a result that a forward left behind: torch does not copy it
            elif type(value) is OrderedDict and not value:
                memo[id(value)] = OrderedDict()  # ten kinds of hooks a module: half of the time of a copy
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin


LIGHT = (2_000_000, 3 * 64 * 64)
"""Parameters and positions of an image up to which a forward pass costs less than one that computes shapes alone."""


def sketches(model: nn.Module, example: torch.Tensor) -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Copies to look at, each with an example that fits it: the cheapest first, the last one with values.

    A forward that looks at values fails on tensors without any: then the next one is the one to ask. Parameters of the
    copies have gradients.
    """
    params, places = LIGHT
    if sum(p.numel() for p in model.parameters()) > params or example[0].numel() > places:
        for tables in (True, False):
            yield hollow(model, tables=tables), torch.empty_like(example, device="meta")
    yield copied(model, lambda tensor: tensor.detach().clone()), example


def hollow(model: nn.Module, *, tables: bool = True) -> nn.Module:
    """A copy without values, on torch's meta device: its forward computes shapes alone, and takes no memory.

    Args:
        model: The network.
        tables: Leave tensors of whole numbers their values: tables of indices say which position becomes which.
    """

    def of(tensor: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if tables and not tensor.is_floating_point():
                return tensor.detach().cpu()
            return torch.empty_like(tensor, device="meta")

    twin = copied(model, of)
    for module in twin.modules():
        if type(module) in _BATCH_NORMS:  # known to keep shapes, and the dearest layer of all there
            module.forward = _kept
    return twin


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _kept(x: torch.Tensor) -> torch.Tensor:
    return x.clone()  # of what keeps shapes and leaves a note with autograd, by far the cheapest there


@contextlib.contextmanager
def undrawn(model: nn.Module) -> Iterator[None]:
    """Whatever a forward draws, random numbers are afterwards as they were: looking at a model changes no run."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)
