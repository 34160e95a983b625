"""Proves a traced structure on a copy before anyone relies on it."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from robustcompress.structure.groups import Edit
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.layout import Layout
from robustcompress.structure.surgery import apply_gathers

TOLERANCE = 1e-7
"""Relative difference allowed in double precision; a wrong channel differs by 1e-3 or more."""


def find_broken(model: nn.Module, layout: Layout, example: torch.Tensor) -> dict[str, str]:
    """Name the groups that cannot be resized without changing what the network computes.

    All groups are resized at once on one copy, in double precision, and compared with a copy whose readers ignore the
    dropped channels. Only when that fails is each group tried alone.

    Args:
        model: The network; not touched.
        layout: Its traced structure.
        example: One input batch, `[N, 3, H, W]`.

    Returns:
        For each group that fails, the reason.
    """
    names = [name for name, group in layout.groups.items() if group.editable and group.width > group.min_width]
    twin = _random_twin(model)
    inputs = torch.rand((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        next(twin.parameters()).device
    )
    if not _difference(twin, layout, inputs, names):
        return {}
    broken: dict[str, str] = {}
    for name in names:
        if complaint := _difference(twin, layout, inputs, [name]):
            broken[name] = complaint
    sound = [name for name in names if name not in broken]
    if complaint := _difference(twin, layout, inputs, sound):
        broken.update(dict.fromkeys(sound, f"together with other groups: {complaint}"))
    return broken


def _difference(twin: nn.Module, layout: Layout, inputs: torch.Tensor, names: Iterable[str]) -> str:
    """Complaint about resizing these groups together; empty when the resized network computes the right thing."""
    widths = layout.widths()
    keeps = {name: _keep(widths[name], layout.groups[name].min_width) for name in names}
    changed = copy.deepcopy(twin)
    for name, keep in keeps.items():
        silence_readers(changed, layout, name, keep, widths)
    with torch.no_grad():
        wanted = changed(inputs)
    # Resizing the silenced copy gives the same network as resizing the original, and spares a third copy.
    for name, keep in keeps.items():
        apply_gathers(changed, layout, widths, Edit(name, tuple(keep)))
        widths[name] = len(keep)
    with torch.no_grad():
        try:
            found = changed(inputs)
        except (RuntimeError, ValueError, IndexError) as error:
            return f"forward() assumes its width ({str(error).splitlines()[0][:120]})"
    if found.shape != wanted.shape:
        return f"resizing it changes the output's shape from {tuple(wanted.shape)} to {tuple(found.shape)}"
    scale = float(wanted.abs().max()) + 1e-12
    difference = float((found - wanted).abs().max()) / scale
    if difference > TOLERANCE:
        return f"forward() mixes its channels (relative difference {difference:.1g} when some are removed)"
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
    """A double-precision copy in eval mode whose batch norms shift and scale, so that leaks through them show."""
    twin = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(1)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                    tensor.copy_((noise + 0.5).to(tensor.device))
    return twin
