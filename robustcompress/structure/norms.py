"""Norms that take their statistics over channels: what they compute when only some of the channels are there.

Removing a channel from in front of a layer norm changes what all others become. So it is no silencing of readers; but
it is exactly the norm with that channel left out of mean and variance, which is what gates and proofs compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from robustcompress.structure.groups import Axis
from robustcompress.structure.layout import Layout, spread


def masked(module: nn.Module, x: torch.Tensor, dim: int, mask: torch.Tensor) -> torch.Tensor:
    """The norm's output where each channel counts as much as `mask` says in the statistics of all.

    Args:
        module: A layer norm, an RMS norm, or a group norm of one group.
        x: Its input.
        dim: The dimension of the channels.
        mask: `[channels]`, from 0 (left out) to 1; gradients pass.

    Returns:
        Of the shape of `x`; what it holds at channels that are left out has no meaning.
    """
    shape = [1] * x.dim()
    shape[dim] = -1
    weights = mask.to(x).view(shape)
    dims = list(range(1, x.dim())) if isinstance(module, nn.GroupNorm) else [dim]
    others = x[0].numel() // x.shape[dim] if isinstance(module, nn.GroupNorm) else 1
    total = weights.sum() * others
    eps = module.eps if isinstance(module.eps, float) else torch.finfo(x.dtype).eps
    centred = x if isinstance(module, nn.RMSNorm) else x - (weights * x).sum(dims, keepdim=True) / total
    out = centred * torch.rsqrt((weights * centred.square()).sum(dims, keepdim=True) / total + eps)
    for name, apply in (("weight", torch.mul), ("bias", torch.add)):
        if (tensor := getattr(module, name, None)) is not None:
            out = apply(out, tensor.view(shape))
    for name in ("drop", "act"):  # timm's norms with an activation inside
        if isinstance(part := getattr(module, name, None), nn.Module):
            out = part(out)
    return out


def mask_norm(
    module: nn.Module,
    layout: Layout,
    axis: Axis,
    widths: Mapping[str, int],
    mask_of: Callable[[str], torch.Tensor | None],
) -> torch.utils.hooks.RemovableHandle:
    """Have a norm leave channels out until the handle is removed.

    Args:
        module: The norm.
        layout: The network's structure.
        axis: The norm's axis.
        widths: The present width of every group; read at each call.
        mask_of: The mask `[channels]` of a group at each call; None for one of which all are there.
    """

    def hook(norm: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        pieces = []
        for segment in layout.axes[axis]:
            mask = None if segment.group is None else mask_of(segment.group)
            if mask is None:
                width = 0 if segment.group is None else widths[segment.group]
                mask = args[0].new_ones(segment.positions(width))
                pieces.append(mask)
            else:
                pieces.append(spread(mask, segment))
        return masked(norm, args[0], layout.norm_dims[axis] % args[0].dim(), torch.cat([p.to(args[0]) for p in pieces]))

    return module.register_forward_hook(hook)


def norms_over(layout: Layout, group: str) -> tuple[Axis, ...]:
    """The norms whose statistics are taken over channels of a group."""
    return tuple(axis for axis in layout.groups[group].passers if axis in layout.norm_dims)
