"""What the tests of opened attention share: random weights, and heads gathered by hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def shaken(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Every parameter random, also those that begin at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def _layers(module: nn.Module) -> tuple[str, str]:
    return ("to_qkv", "merge") if hasattr(module, "to_qkv") else ("qkv", "proj")


@torch.no_grad()
def gathered(module: nn.Module, sources: Sequence[int]) -> nn.Module:
    """A copy whose head `i` is the head `sources[i]` of the module, written out for every tensor."""
    twin, index = copy.deepcopy(module), torch.tensor(list(sources))
    writer, reader = (getattr(twin, name) for name in _layers(twin))
    width = reader.in_features // twin.head_dim

    def take(owner: nn.Module, name: str, shape: tuple[int, ...], dim: int, end: tuple[int, ...]) -> None:
        old = getattr(owner, name)
        new = old.view(shape).index_select(dim, index).reshape(end)
        setattr(owner, name, nn.Parameter(new, requires_grad=old.requires_grad))

    take(writer, "weight", (3, width, twin.head_dim, -1), 1, (-1, writer.in_features))
    if writer.bias is not None:
        take(writer, "bias", (3, width, twin.head_dim), 1, (-1,))
    take(reader, "weight", (reader.out_features, width, twin.head_dim), 1, (reader.out_features, -1))
    if getattr(twin, "relative_position_bias_table", None) is not None:
        table = twin.relative_position_bias_table
        take(twin, "relative_position_bias_table", tuple(table.shape), 1, (len(table), -1))
    if hasattr(twin, "logit_scale"):
        take(twin, "logit_scale", (width, 1, 1), 0, (-1, 1, 1))
        take(twin.cpb_mlp[2], "weight", (width, -1), 0, (len(index), -1))
    for name in ("q_bias", "v_bias"):
        if getattr(twin, name, None) is not None:
            take(twin, name, (width, twin.head_dim), 0, (-1,))
    return twin


@torch.no_grad()
def scaled(module: nn.Module, factors: Sequence[float]) -> nn.Module:
    """A copy in which what each head says is multiplied by its factor."""
    twin = copy.deepcopy(module)
    reader = getattr(twin, _layers(twin)[1])
    reader.weight *= torch.tensor(list(factors), dtype=reader.weight.dtype).repeat_interleave(twin.head_dim)
    return twin
