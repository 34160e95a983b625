"""Layers that read channels in ways of their own: what a forward that is not torch's must still obey.

That removing a channel equals silencing the weights that read it is proven for every layer (see `verify`). Of torch's
own layers two things more are known: they make nothing of a channel that is zero, so that a closed gate is a removed
channel; and weights of opposite sign, or weights shared out among copies, add up to what they were, so that growth
changes no output. Of others both are tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from robustcompress.structure.gates import Gates
from robustcompress.structure.groups import NEW, Edit
from robustcompress.structure.initial import fill
from robustcompress.structure.layout import Layout
from robustcompress.structure.surgery import apply_gathers, plan_edit


def foreign_readers(model: nn.Module, layout: Layout, names: Iterable[str]) -> dict[str, list[str]]:
    """By group, those of its readers whose class is not torch's own, as words; groups without any are left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        for axis in layout.groups[name].readers:
            kind = type(model.get_submodule(axis.module))
            if not kind.__module__.startswith("torch.nn."):
                found.setdefault(name, []).append(f"{axis.module} ({kind.__name__})")
    return found


@torch.no_grad()
def under_gates(net: nn.Module, layout: Layout, kept: Mapping[str, Sequence[int]], image: torch.Tensor) -> torch.Tensor:
    """The network's output with every channel gated off that is not kept."""
    widths, scores = layout.widths(), {}
    for name, keep in kept.items():
        bits = image.new_zeros(widths[name])
        bits[list(keep)] = 1
        scores[name] = nn.Parameter(bits)
    with Gates(net, layout, widths, scores):
        out: torch.Tensor = net(image)
    return out


@torch.no_grad()
def with_newcomers(net: nn.Module, layout: Layout, names: Iterable[str], image: torch.Tensor) -> torch.Tensor:
    """The output of a network, which is edited, after each group has gained a copy, a pair and a single new channel."""
    widths, generator = layout.widths(), torch.Generator().manual_seed(3)
    for name in names:
        edit = Edit(name, (*range(widths[name]), 0, NEW, NEW, NEW), "pair", share=True)
        tensors = plan_edit(net, layout, widths, edit)
        apply_gathers(net, layout, widths, edit)
        widths[name] = len(edit.sources)
        fill(net, layout, widths, edit, tensors, generator)
    out: torch.Tensor = net(image)
    return out
