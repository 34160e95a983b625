"""How each kind of layer holds its channels: which tensors, along which dimension, and which attributes count them."""

from __future__ import annotations

import torch
from torch import nn

from robustcompress.structure.groups import Side
from robustcompress.structure.layer_kind import First, LayerKind, Slots


def _refuse_layer_norm(module: nn.Module) -> str:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    if len(module.normalized_shape) == 1:
        return ""
    return "layer norm mixes all it normalises, and over more than the last dimension it cannot be edited yet"


def _count(module: nn.Module, name: str) -> int:
    count = getattr(module, name)
    assert isinstance(count, int)
    return count


def is_depthwise(module: nn.Module) -> bool:
    """Whether each channel of this convolution passes by itself."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


_WEIGHT: dict[str, First] = {"weight": "random", "bias": 0.0}
_SCALE: dict[str, First] = {"weight": 1.0, "bias": 0.0}

CONV = LayerKind(
    slots={"out": (("weight", 0), ("bias", 0)), "in": (("weight", 1),)},
    widths={"out": ("out_channels",), "in": ("in_channels",)},
    fill=_WEIGHT,
)
GROUPED = LayerKind(
    slots={"out": (("weight", 0), ("bias", 0)), "in": ()},
    widths=CONV.widths,
    fill=_WEIGHT,
    parts=lambda m: _count(m, "groups"),
    counts=("groups",),
)
TRANSPOSED = LayerKind(
    slots={"out": (("weight", 1), ("bias", 0)), "in": (("weight", 0),)},
    widths=CONV.widths,
    fill=_WEIGHT,
    refuse=lambda m: "" if m.groups == 1 else "grouped transposed convolution cannot be edited yet; use groups=1",
)
DEPTHWISE = LayerKind(
    slots={"both": (("weight", 0), ("bias", 0))},
    widths={"both": ("in_channels", "out_channels", "groups")},
    fill=_WEIGHT,
    role="depthwise",
)
LINEAR = LayerKind(
    slots={"out": (("weight", 0), ("bias", 0)), "in": (("weight", 1),)},
    widths={"out": ("out_features",), "in": ("in_features",)},
    fill=_WEIGHT,
    channel_dim=-1,
)
BATCH_NORM = LayerKind(
    slots={"both": (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))},
    widths={"both": ("num_features",)},
    fill={**_SCALE, "running_mean": 0.0, "running_var": 1.0},
)
LAYER_NORM = LayerKind(
    slots={"both": (("weight", 0), ("bias", 0))},
    widths={"both": ("normalized_shape",)},
    fill=_SCALE,
    refuse=_refuse_layer_norm,
    channel_dim=-1,
    anywhere=True,
    mixes=lambda m: True,
)
GROUP_NORM = LayerKind(
    slots={"both": (("weight", 0), ("bias", 0))},
    widths={"both": ("num_channels",)},
    fill=_SCALE,
    parts=lambda m: _count(m, "num_groups"),
    counts=("num_groups",),
    mixes=lambda m: _count(m, "num_groups") == 1,
)
PRELU = LayerKind(
    slots={"both": (("weight", 0),)}, widths={"both": ("num_parameters",)}, fill={"weight": "mean"}, role="prelu"
)

KINDS: dict[type[nn.Module], LayerKind] = {
    nn.modules.conv._ConvTransposeNd: TRANSPOSED,
    nn.modules.conv._ConvNd: CONV,
    nn.Linear: LINEAR,
    nn.modules.batchnorm._BatchNorm: BATCH_NORM,
    nn.modules.instancenorm._InstanceNorm: BATCH_NORM,
    nn.LayerNorm: LAYER_NORM,
    nn.RMSNorm: LAYER_NORM,
    nn.GroupNorm: GROUP_NORM,
    nn.PReLU: PRELU,
}
"""Looked up in order, by isinstance: put subclasses before their bases."""


_TAUGHT: dict[type[nn.Module], LayerKind] = {}


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a layer, or None for a type that the editor does not know."""
    if (taught := taught_kind(module)) is not None:
        return taught
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return DEPTHWISE if is_depthwise(module) else CONV if module.groups == 1 else GROUPED
    for layer_type, kind in KINDS.items():
        if isinstance(module, layer_type):
            return kind
    return None


def taught_kind(module: nn.Module) -> LayerKind | None:
    """What was taught of the layer's type or the nearest of its bases, unless a built-in kind is nearer."""
    if not _TAUGHT:
        return None
    known = next((base for base in type(module).__mro__ if base in _TAUGHT or base in KINDS), None)
    return _TAUGHT.get(known) if known is not None else None


def slots_of(module: nn.Module, side: Side) -> Slots:
    """The tensors of `module` that really hold channels on `side` (a missing bias and a shared PReLU slope do not)."""
    kind = kind_of(module)
    assert kind is not None
    if _is_shared(module):
        return ()
    return tuple((name, dim) for name, dim in kind.slots[side] if getattr(module, name, None) is not None)


def weights_of(module: nn.Module) -> tuple[str, ...]:
    """The tensors of a layer that are weights: with these it reads, or new channels begin there at random."""
    kind = kind_of(module)
    if kind is None:
        return ()
    named = {name: dim for side in kind.slots for name, dim in slots_of(module, side) if name not in module._buffers}
    return tuple(
        name
        for name, dim in named.items()
        if kind.reads_with(name) or kind.first(name, getattr(module, name), dim) == "random"
    )


def magnitudes_of(module: nn.Module, side: Side) -> Slots:
    """The parameters on `side` that say how much a channel matters: weights and scales, not shifts."""
    kind = kind_of(module)
    assert kind is not None
    return tuple(
        (name, dim)
        for name, dim in slots_of(module, side)
        if isinstance(tensor := getattr(module, name), nn.Parameter)
        and (kind.reads_with(name) or kind.first(name, tensor, dim) != 0)
    )


def fan_dim(kind: LayerKind, name: str) -> int:
    """The dimension of a weight along which each entry is a sum of its own, over all others."""
    if kind is TRANSPOSED:
        return 0  # as torch counts it
    written = {name: dim for side, slots in kind.slots.items() if side != "in" for name, dim in slots}
    read = dict(kind.slots.get("in", ()))
    return written.get(name, -1 if read.get(name) == 0 else 0)


def holds(module: nn.Module, side: Side) -> bool:
    """Whether the layer has channels of its own on `side`: a slope that all channels share has none."""
    kind = kind_of(module)
    return kind is not None and side in kind.widths and not _is_shared(module)


def _is_shared(module: nn.Module) -> bool:
    """Whether all channels share one slope."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


def width_of(module: nn.Module, side: Side) -> int:
    """The number of positions along `side` of `module`."""
    kind = kind_of(module)
    assert kind is not None
    if kind.widths[side]:
        return counted(module, kind.widths[side][0])
    name, dim = slots_of(module, side)[0]
    return int(getattr(module, name).shape[dim])


def counted(module: nn.Module, attribute: str) -> int:
    """What an attribute counts that is a whole number, or a shape of one dimension."""
    count = getattr(module, attribute)
    return int(count[0] if isinstance(count, tuple) else count)


def set_width(module: nn.Module, kind: LayerKind, side: Side, width: int) -> None:
    """Make the layer's own channel counts say `width`.

    Args:
        module: The layer.
        kind: What it was before the edit: with one side counted and the other not yet, it may look like another.
        side: Which of its sides.
        width: Positions along that side now.
    """
    if side not in kind.widths or _is_shared(module):
        return
    if (
        kind.parts is not None and kind.counts and side != "out" and not kind.mixes(module)
    ):  # both sides of a layer divide into as many groups
        each = counted(module, kind.widths[side][0]) // kind.parts(module)
        for name in kind.counts:
            setattr(module, name, width // each)
    for name in kind.widths[side]:
        setattr(module, name, (width,) if isinstance(getattr(module, name), tuple) else width)


def gather(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Gather `tensor` along `dim`; positions whose index is `NEW` come out as zeros.

    Args:
        tensor: Any tensor.
        dim: The dimension to gather.
        index: Int64 `[n]`; values in `[-1, tensor.shape[dim])`.

    Returns:
        A new tensor with `n` entries along `dim`, in the memory format of `tensor`.
    """
    fresh = (index < 0).nonzero().flatten().to(tensor.device)
    if tensor.shape[dim] == 0 or tensor.is_meta:
        shape = list(tensor.shape)
        shape[dim] = len(index)
        return tensor.new_zeros(shape)
    out = tensor.index_select(dim, index.clamp_min(0).to(tensor.device))
    if len(fresh):
        out.index_fill_(dim, fresh, 0)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out
