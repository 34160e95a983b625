"""Model to groups. The only file that imports torch_pruning, and only its dependency graph is used."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from robustcompress.structure.attention import Heads, find_heads
from robustcompress.structure.couplings import Couplings, Unit
from robustcompress.structure.groups import Axis, ChannelGroup, Kind, Segment
from robustcompress.structure.kinds import kind_of, width_of
from robustcompress.structure.layout import Layout, runs


def trace(model: nn.Module, example: torch.Tensor) -> Layout:
    """Find the channel groups of a network.

    The graph is built on a copy: tracing follows autograd, so frozen parameters would vanish, and torch-pruning leaves
    the model it traces in eval mode.

    Args:
        model: A network that `check_supported` accepts. It is not touched.
        example: One input batch, `[N, 3, H, W]`.

    Returns:
        The groups and where they lie. Groups that cannot be edited say why.
    """
    twin = copy.deepcopy(model)
    for tensor in twin.parameters():
        tensor.grad = None
        tensor.requires_grad_(True)
    heads = tuple(find_heads(twin))
    return _layout(Couplings(_dependency_graph(twin, example), twin, heads), twin, heads)


def _dependency_graph(twin: nn.Module, example: torch.Tensor) -> Any:
    import torch_pruning

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # about plain parameters, whose dimension is checked when the trace is verified
        # With a gradient the image itself is a node of the graph, so that its share of a concatenation is known.
        example = example.detach().clone().requires_grad_()
        return torch_pruning.DependencyGraph().build_dependency(twin, example_inputs=example, verbose=False)


def _layout(couplings: Couplings, twin: nn.Module, heads: Sequence[Heads]) -> Layout:
    outputs = {couplings.find(unit) for unit in couplings.outputs}
    # Units with the same members are interchangeable: together they are one group.
    by_signature: dict[tuple[object, ...], list[tuple[Unit, dict[Axis, list[int]]]]] = {}
    for unit, places in couplings.units():
        signature = (*sorted((a.module, a.side, len(p)) for a, p in places.items()), unit in outputs)
        by_signature.setdefault(signature, []).append((unit, places))
    parted = {couplings.find(unit) for unit in couplings.parted}
    families = _tie_parts(list(by_signature.values()), parted)

    order = {name: number for number, (name, _) in enumerate(twin.named_modules())}
    channel_of: dict[Unit, tuple[str, int]] = {}
    widths: dict[str, int] = {}
    described: list[tuple[str, bool, list[Axis], bool]] = []
    for family in families:
        axes = sorted({axis for places in family[0][1] for axis in places}, key=lambda a: order.get(a.module, -1))
        writer = next(axis for axis in axes if axis.side == "out")
        name, serial = writer.module, 1
        while name in widths:
            serial += 1
            name = f"{writer.module}#{serial}"
        widths[name] = len(family)
        for channel, (units, _) in enumerate(family):
            channel_of.update({unit: (name, channel) for unit in units})
        described.append((name, any(u in outputs for units, _ in family for u in units), axes, len(family[0][0]) > 1))

    axes_runs, irregular = _axes(couplings, channel_of, widths, twin)
    for found in heads:
        axes_runs.update(found.axes)  # with a single head its runs cannot be told apart by looking
    attention = {found.group: found.module for found in heads}
    opaque = {channel_of[couplings.find(unit)][0] for unit in couplings.opaque}
    groups: dict[str, ChannelGroup] = {}
    output = ""
    for name, is_output, axes, is_split in sorted(described, key=lambda d: order[d[0].split("#")[0]]):
        group = _describe(name, widths[name], axes, is_output, is_split, axes_runs, irregular | opaque, twin)
        told = name in attention and group.editable  # and so one head is as plain as many
        groups[name] = replace(group, kind="heads", min_width=1) if told else group
        output = name if is_output else output
    return Layout(groups, axes_runs, couplings.param_dims, output, attention)


def _tie_parts(
    families: list[list[tuple[Unit, dict[Axis, list[int]]]]], parted: set[Unit]
) -> list[list[tuple[tuple[Unit, ...], tuple[dict[Axis, list[int]], ...]]]]:
    """Tie equal parts of one writer (chunk, split): their widths may only change together.

    Returns:
        Families of channels; each channel is the units it ties and the places of each.
    """
    merged: list[list[tuple[tuple[Unit, ...], tuple[dict[Axis, list[int]], ...]]]] = []
    part_of: dict[tuple[Axis, int], int] = {}
    for family in families:
        split = all(unit in parted for unit, _ in family)
        writers = [axis for axis in family[0][1] if axis.side == "out" and split]
        partner = next((part_of[(w, len(family))] for w in writers if (w, len(family)) in part_of), None)
        if partner is None:
            for writer in writers:
                part_of[(writer, len(family))] = len(merged)
            merged.append([((unit,), (places,)) for unit, places in family])
        else:
            merged[partner] = [
                ((*units, unit), (*parts, places))
                for (units, parts), (unit, places) in zip(merged[partner], family, strict=True)
            ]
    return merged


def _axes(
    couplings: Couplings, channel_of: dict[Unit, tuple[str, int]], widths: dict[str, int], twin: nn.Module
) -> tuple[dict[Axis, tuple[Segment, ...]], set[str]]:
    modules = dict(twin.named_modules())
    parameters = dict(twin.named_parameters())
    segments: dict[Axis, tuple[Segment, ...]] = {}
    irregular: set[str] = set()
    for axis, positions in couplings.unit_at.items():
        if axis.side == "param":
            length = parameters[axis.module].shape[couplings.param_dims[axis.module]]
        else:
            length = width_of(modules[axis.module], axis.side)
        owners = [channel_of[couplings.find(positions[p])] if p in positions else None for p in range(length)]
        read = runs(owners, widths)
        if read is None:
            irregular.update(owner[0] for owner in owners if owner is not None)
            read = (Segment(None, fixed=length),)
        segments[axis] = read
    return segments, irregular


def _describe(
    name: str,
    width: int,
    axes: list[Axis],
    is_output: bool,
    is_split: bool,
    segments: dict[Axis, tuple[Segment, ...]],
    irregular: set[str],
    twin: nn.Module,
) -> ChannelGroup:
    writers = tuple(a for a in axes if a.side == "out")
    readers = tuple(a for a in axes if a.side == "in")
    passers = tuple(a for a in axes if a.side in ("both", "param"))
    kind: Kind = "hidden"
    reason = ""
    if is_output:
        kind, reason = "output", "holds the model's output"
    elif any(isinstance(twin.get_submodule(a.module), nn.LayerNorm) for a in passers if a.side == "both"):
        kind, reason = "frozen", "a layer norm takes its mean and variance over these channels: all depend on each"
    elif name in irregular:
        kind, reason = "frozen", "its channels pass through an operation in which they cannot be followed"
    elif not readers:
        kind, reason = "frozen", "nothing reads it"
    elif is_split:
        kind = "split"
    elif any(len({s.group for s in segments[a]} - {None}) > 1 for a in (*writers, *readers)):
        kind = "concat"
    elif len(writers) > 1:
        kind = "residual"
    # A depthwise convolution or a PReLU of one channel is indistinguishable from an ordinary or a shared one.
    min_width = 2 if any(_is_per_channel(axis, twin) for axis in passers) else 1
    return ChannelGroup(name, width, kind, writers, readers, passers, min_width, reason)


def _is_per_channel(axis: Axis, twin: nn.Module) -> bool:
    if axis.side == "param":
        return True
    kind = kind_of(twin.get_submodule(axis.module))
    return kind is not None and kind.name in ("depthwise", "prelu")
