"""How each kind of layer holds its channels: which tensors, along which dimension, and which attributes count them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from robustcompress.structure.groups import Side

Slots = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """One kind of layer.

    Attributes:
        name: The role its tensors play when channels are born: "dense" and "grouped" (random weights), "norm" (scale
            one, shift zero), "depthwise", "prelu".
        slots: Per side, the tensors and the dimension along which that side's channels lie.
        widths: Per side, the attributes that count the channels: "in" and "out" of a layer that mixes what it reads,
            "both" of one through which each channel passes by itself.
        refuse: Returns why this very layer cannot be edited, or an empty string.
        channel_dim: Dimension of the *input* activation that holds the channels.
        anywhere: The channels may lie along any dimension that is as long as the layer is wide.
        parts: Into how many equal groups the layer divides its channels, which come and go as a whole; None where
            channels come and go one by one.
        counts: Attributes that hold the number of those groups.
        mixes: Whether the layer's statistics are taken over the channels, so that all depend on each.
    """

    name: str
    slots: dict[Side, Slots]
    widths: dict[Side, tuple[str, ...]]
    refuse: Callable[[nn.Module], str] = lambda module: ""
    channel_dim: int = 1
    anywhere: bool = False
    parts: Callable[[nn.Module], int] | None = None
    counts: tuple[str, ...] = ()
    mixes: Callable[[nn.Module], bool] = lambda module: False


def _refuse_layer_norm(module: nn.Module) -> str:
    assert isinstance(module, nn.LayerNorm)
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


CONV = LayerKind(
    name="dense",
    slots={"out": (("weight", 0), ("bias", 0)), "in": (("weight", 1),)},
    widths={"out": ("out_channels",), "in": ("in_channels",)},
)
GROUPED = LayerKind(
    name="grouped",
    slots={"out": (("weight", 0), ("bias", 0)), "in": ()},
    widths=CONV.widths,
    parts=lambda m: _count(m, "groups"),
    counts=("groups",),
)
TRANSPOSED = LayerKind(
    name="dense",
    slots={"out": (("weight", 1), ("bias", 0)), "in": (("weight", 0),)},
    widths=CONV.widths,
    refuse=lambda m: "" if m.groups == 1 else "grouped transposed convolution cannot be edited yet; use groups=1",
)
DEPTHWISE = LayerKind(
    name="depthwise",
    slots={"both": (("weight", 0), ("bias", 0))},
    widths={"both": ("in_channels", "out_channels", "groups")},
)
LINEAR = LayerKind(
    name="dense",
    slots={"out": (("weight", 0), ("bias", 0)), "in": (("weight", 1),)},
    widths={"out": ("out_features",), "in": ("in_features",)},
    channel_dim=-1,
)
BATCH_NORM = LayerKind(
    name="norm",
    slots={"both": (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))},
    widths={"both": ("num_features",)},
)
LAYER_NORM = LayerKind(
    name="norm",
    slots={"both": (("weight", 0), ("bias", 0))},
    widths={"both": ("normalized_shape",)},
    refuse=_refuse_layer_norm,
    channel_dim=-1,
    anywhere=True,
    mixes=lambda m: True,
)
GROUP_NORM = LayerKind(
    name="norm",
    slots={"both": (("weight", 0), ("bias", 0))},
    widths={"both": ("num_channels",)},
    parts=lambda m: _count(m, "num_groups"),
    counts=("num_groups",),
    mixes=lambda m: _count(m, "num_groups") == 1,
)
PRELU = LayerKind(name="prelu", slots={"both": (("weight", 0),)}, widths={"both": ("num_parameters",)})

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


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a layer, or None for a type the editor has not been taught."""
    if isinstance(module, nn.modules.conv._ConvNd) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return DEPTHWISE if is_depthwise(module) else CONV if module.groups == 1 else GROUPED
    for layer_type, kind in KINDS.items():
        if isinstance(module, layer_type):
            return kind
    return None


def slots_of(module: nn.Module, side: Side) -> Slots:
    """The tensors of `module` that really hold channels on `side` (a missing bias and a shared PReLU slope do not)."""
    kind = kind_of(module)
    assert kind is not None
    if _is_shared(module):
        return ()
    return tuple((name, dim) for name, dim in kind.slots[side] if getattr(module, name, None) is not None)


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
    count = getattr(module, kind.widths[side][0])
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
    if kind.parts is not None and side != "out":  # both sides of a layer divide into as many groups
        count = getattr(module, kind.widths[side][0])
        each = int(count[0] if isinstance(count, tuple) else count) // kind.parts(module)
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
    index = index.to(tensor.device)
    fresh = index < 0
    if tensor.shape[dim] == 0:
        shape = list(tensor.shape)
        shape[dim] = len(index)
        return tensor.new_zeros(shape)
    out = tensor.index_select(dim, index.clamp_min(0))
    if bool(fresh.any()):
        out.index_fill_(dim, fresh.nonzero().flatten(), 0)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        out = out.contiguous(memory_format=torch.channels_last)
    return out
