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
        name: The role its tensors play when channels are born: "dense", "norm", "depthwise" or "prelu"; "layer norm"
            passes channels that are never resized.
        slots: Per side, the tensors and the dimension along which that side's channels lie.
        widths: Per side, the attributes that count the channels.
        refuse: Returns why this very layer cannot be edited, or an empty string.
        channel_dim: Dimension of the *input* activation that holds the channels.
    """

    name: str
    slots: dict[Side, Slots]
    widths: dict[Side, tuple[str, ...]]
    refuse: Callable[[nn.Module], str] = lambda module: ""
    channel_dim: int = 1


def _refuse_conv(module: nn.Module) -> str:
    assert isinstance(module, nn.modules.conv._ConvNd)
    if module.groups == 1 or is_depthwise(module):
        return ""
    return f"grouped convolution (groups={module.groups}) cannot be edited yet; use groups=1 or depthwise"


def _refuse_layer_norm(module: nn.Module) -> str:
    assert isinstance(module, nn.LayerNorm)
    if len(module.normalized_shape) == 1:
        return ""
    return "layer norm mixes all it normalises, and over more than the last dimension it cannot be edited yet"


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
    refuse=_refuse_conv,
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
    name="layer norm",
    slots={"both": (("weight", 0), ("bias", 0))},
    widths={"both": ("normalized_shape",)},
    refuse=_refuse_layer_norm,
    channel_dim=-1,
)
PRELU = LayerKind(name="prelu", slots={"both": (("weight", 0),)}, widths={"both": ("num_parameters",)})

KINDS: dict[type[nn.Module], LayerKind] = {
    nn.modules.conv._ConvTransposeNd: TRANSPOSED,
    nn.modules.conv._ConvNd: CONV,
    nn.Linear: LINEAR,
    nn.modules.batchnorm._BatchNorm: BATCH_NORM,
    nn.LayerNorm: LAYER_NORM,
    nn.PReLU: PRELU,
}
"""Looked up in order, by isinstance: put subclasses before their bases."""


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a layer, or None for a type the editor has not been taught."""
    if is_depthwise(module) and not isinstance(module, nn.modules.conv._ConvTransposeNd):
        return DEPTHWISE
    for layer_type, kind in KINDS.items():
        if isinstance(module, layer_type):
            return kind
    return None


def slots_of(module: nn.Module, side: Side) -> Slots:
    """The tensors of `module` that really hold channels on `side` (a missing bias and a shared PReLU slope do not)."""
    kind = kind_of(module)
    assert kind is not None
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return ()
    return tuple((name, dim) for name, dim in kind.slots[side] if getattr(module, name, None) is not None)


def width_of(module: nn.Module, side: Side) -> int:
    """The number of positions along `side` of `module`."""
    kind = kind_of(module)
    assert kind is not None
    count = getattr(module, kind.widths[side][0])
    return int(count[0] if isinstance(count, tuple) else count)


def set_width(module: nn.Module, side: Side, width: int) -> None:
    """Make the layer's own channel counts say `width`."""
    kind = kind_of(module)
    assert kind is not None
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return
    for name in kind.widths[side]:
        setattr(module, name, width)


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
