"""How new channels begin.

    pair       twins with equal incoming and opposite outgoing weights: no output changes, and both halves get
               gradients at once (the growing-network literature's (V, V) / (Z, -Z); Wu et al. 2020, GroMo).
    zero_out   random incoming, zero outgoing weights: no output changes; incoming weights wait one step for gradients.
    clone      copies of existing channels that share their readers' weights (Net2Wider, Chen et al. 2016, section 3.2).
    kaiming    random both ways (He et al. 2015): outputs change.

Random weights are scaled to the tensor they join (its own standard deviation), so that newcomers are neither drowned
nor deafening in a trained network; a tensor without survivors gets He et al.'s scale.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import nn

from robustcompress.structure.groups import NEW, Edit
from robustcompress.structure.kinds import gather
from robustcompress.structure.layout import Layout
from robustcompress.structure.surgery import TensorEdit

Init = Literal["pair", "zero_out", "clone", "kaiming"]
INITS: tuple[str, ...] = get_args(Init)
EXACT: frozenset[str] = frozenset({"pair", "zero_out", "clone"})
"""The initialisations that change no output."""


def resolve_clones(sources: tuple[int, ...], generator: torch.Generator) -> tuple[int, ...]:
    """Replace each fresh channel by a randomly drawn existing one."""
    old = sorted({s for s in sources if s != NEW})
    picks = torch.randint(len(old), (len(sources),), generator=generator).tolist()
    return tuple(old[picks[i]] if s == NEW else s for i, s in enumerate(sources))


@torch.no_grad()
def fill(
    model: nn.Module,
    layout: Layout,
    new_widths: dict[str, int],
    edit: Edit,
    tensors: list[TensorEdit],
    generator: torch.Generator,
) -> None:
    """Give the fresh entries of an edited network their first values.

    Args:
        model: The network after `apply_gathers`.
        layout: Its structure.
        new_widths: Widths after the edit.
        edit: The edit, whose `init` is "pair", "zero_out" or "kaiming".
        tensors: The gathers that carried the edit out, in order.
        generator: Source of randomness, on the CPU.
    """
    fresh = [channel for channel, source in enumerate(edit.sources) if source == NEW]
    if not fresh:
        return
    for tensor in tensors:
        target: torch.Tensor = getattr(model.get_submodule(tensor.owner), tensor.tensor)
        owners = layout.owners(tensor.axis, edit.group, new_widths)
        positions = torch.stack([(owners == channel).nonzero().flatten() for channel in fresh])  # [fresh, copies]
        values = _values(target, tensor, edit.init or "kaiming", positions, generator)
        target.index_copy_(tensor.dim, positions.flatten().to(target.device), values.to(target))


def _values(
    target: torch.Tensor, tensor: TensorEdit, init: str, positions: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The fresh slices of one tensor, `positions.numel()` long along its dimension."""
    count, copies = positions.shape
    shape = list(target.shape)
    shape[tensor.dim] = count * copies
    old = gather_old(target, tensor)
    if isinstance(tensor.first, int | float):
        return torch.full(shape, float(tensor.first))
    if tensor.first == "mean":
        mean = old.float().mean(tensor.dim, keepdim=True) if old.shape[tensor.dim] else torch.full((1,), 0.25)
        return mean.cpu().expand(shape).clone()
    reads = tensor.side == "in"
    if reads and init == "zero_out":
        return torch.zeros(shape)
    std = float(old.float().std()) if old.numel() > 1 else 0.0
    if init == "kaiming" or not std > 0:
        std = math.sqrt(2.0 / max(1, target.select(tensor.fan, 0).numel()))
    values = torch.randn(shape, generator=generator) * std
    if init != "pair":
        return values
    values = values.movedim(tensor.dim, 0)
    values = values.reshape(count, copies, *values.shape[1:])
    twins = count // 2 * 2
    values[1:twins:2] = values[0:twins:2] * (-1 if reads else 1)
    if reads and count > twins:
        values[twins:] = 0  # the odd one out has no twin to cancel it
    return values.flatten(0, 1).movedim(0, tensor.dim)


def gather_old(target: torch.Tensor, tensor: TensorEdit) -> torch.Tensor:
    """The slices of an edited tensor that were there before."""
    survivors = (tensor.index >= 0).nonzero().flatten()
    return gather(target, tensor.dim, survivors)
