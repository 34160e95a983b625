"""Proves a traced structure on a copy before anyone relies on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from robustcompress.structure.groups import NEW, Edit
from robustcompress.structure.initial import fill
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.layout import Layout
from robustcompress.structure.surgery import apply_gathers, plan_edit

TOLERANCE = 1e-7
"""Relative difference allowed in double precision; a wrong channel differs by 1e-3 or more."""

GROWTH = 3
"""Channels by which every group is grown; odd, so that halves taken by a literal or a floor division show."""


def find_broken(model: nn.Module, layout: Layout, example: torch.Tensor) -> dict[str, str]:
    """Name the groups that cannot be resized without changing what the network computes.

    On one copy with random weights, in double precision, all groups are pruned at once, and must compute what the copy
    computes when the readers ignore the dropped channels; then all are grown at once, with new channels that nothing
    reads, and must compute what the copy computes. Only when that fails is each group tried alone.

    Args:
        model: The network; not touched.
        layout: Its traced structure.
        example: One input batch, `[N, 3, H, W]`.

    Returns:
        For each group that fails, the reason.
    """
    names = [name for name, group in layout.groups.items() if group.editable]
    twin = _random_twin(model)
    inputs = torch.rand((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = inputs.to(next(twin.parameters()).device)
    if not _complaint(twin, layout, inputs, names):
        return {}
    broken: dict[str, str] = {}
    for name in names:
        if complaint := _complaint(twin, layout, inputs, [name]):
            broken[name] = complaint
    sound = [name for name in names if name not in broken]
    if complaint := _complaint(twin, layout, inputs, sound):
        broken.update(dict.fromkeys(sound, f"together with other groups: {complaint}"))
    return broken


def _complaint(twin: nn.Module, layout: Layout, inputs: torch.Tensor, names: Iterable[str]) -> str:
    """What is wrong with resizing these groups together; empty when nothing is."""
    widths = layout.widths()
    silenced = copy.deepcopy(twin)
    edits = []
    for name in names:
        keep = _keep(widths[name], layout.groups[name].min_width)
        silence_readers(silenced, layout, name, keep, widths)
        edits.append(Edit(name, tuple(keep)))
    # Pruning the silenced copy gives the same network as pruning the original, and spares a third copy.
    if complaint := _difference(silenced, layout, inputs, edits):
        return complaint
    grown = [Edit(name, (*range(widths[name]), *[NEW] * GROWTH), "zero_out") for name in names]
    return _difference(copy.deepcopy(twin), layout, inputs, grown)


@torch.no_grad()
def _difference(net: nn.Module, layout: Layout, inputs: torch.Tensor, edits: list[Edit]) -> str:
    """Carry edits out that should change no output, and complain when they do."""
    wanted = net(inputs)
    widths, generator = layout.widths(), torch.Generator().manual_seed(2)
    for edit in edits:
        tensors = plan_edit(net, layout, widths, edit)
        apply_gathers(net, layout, widths, edit)
        widths[edit.group] = len(edit.sources)
        fill(net, layout, widths, edit, tensors, generator)
    try:
        found = net(inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"forward() assumes its width ({str(error).splitlines()[0][:120]})"
    if found.shape != wanted.shape:
        return f"resizing it changes the output's shape from {tuple(wanted.shape)} to {tuple(found.shape)}"
    difference = float((found - wanted).abs().max()) / (float(wanted.abs().max()) + 1e-12)
    if not difference <= TOLERANCE:
        return f"forward() mixes its channels (relative difference {difference:.1g} when it is resized)"
    return ""


def _keep(width: int, min_width: int) -> list[int]:
    """Drop every third channel, the second first, but leave as many as the group needs."""
    dropped = [c for c in range(width) if c % 3 == 1][: width - min_width]
    return [c for c in range(width) if c not in dropped]


@torch.no_grad()
def silence_readers(model: nn.Module, layout: Layout, group: str, keep: Iterable[int], widths: dict[str, int]) -> None:
    """Zero, in every reader, the weights that read a channel of `group` outside `keep`: what pruning must equal."""
    kept = set(keep)
    dropped = torch.tensor([c for c in range(widths[group]) if c not in kept], dtype=torch.long)
    for axis in layout.groups[group].readers:
        module = model.get_submodule(axis.module)
        positions = torch.isin(layout.owners(axis, group, widths), dropped).nonzero().flatten()
        kind = kind_of(module)
        assert kind is not None
        for name, dim in kind.slots["in"]:
            weight = getattr(module, name)
            weight.index_fill_(dim, positions.to(weight.device), 0)


@torch.no_grad()
def _random_twin(model: nn.Module) -> nn.Module:
    """A double-precision copy in eval mode with random weights and statistics.

    A zero-initialised layer, a dead unit or a fresh batch norm would hide what an edit does wrong until it is trained.
    """
    twin = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in twin.named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias"):
            fan_in = max(1, parameter[0].numel())
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * (2 / fan_in) ** 0.5
        else:
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
        parameter.copy_(values)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var):
                if tensor is not None:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    return twin
