"""What an editor has to know of one type of layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from robustcompress.errors import Problems, nearest
from robustcompress.structure.groups import Side

Slots = tuple[tuple[str, int], ...]

First = float | Literal["random", "mean"]
"""How a new channel's entries in a tensor begin."""

ROLES = ("dense", "grouped", "norm", "depthwise", "prelu")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """How one type of layer holds its channels: all that an editor has to know of it.

    A layer either *mixes*: it reads channels ("in") and writes others ("out"), as a convolution does; or each channel
    *passes* through it by itself ("both"), as through batch norm. A linear layer that keeps its weight as
    `[inputs, outputs]` in `kernel`, and a norm with two parameters of shape `[1, channels, 1, 1]`:

        LayerKind(
            slots={"in": (("kernel", 0),), "out": (("kernel", 1), ("bias", 0))},
            widths={"in": ("inputs",), "out": ("outputs",)},
            fill={"bias": 0.0},
            channel_dim=-1,
        )
        LayerKind(slots={"both": (("gamma", 1), ("beta", 1))}, fill={"gamma": 1.0, "beta": 0.0})

    Attributes:
        slots: Per side, the parameters and buffers of the layer that hold its channels, each with the dimension they
            lie along. One tensor may stand on both sides; one that is None in a layer is passed over there.
        widths: Per side, the attributes of the layer that count its channels, if it has any; they are kept true.
        fill: By tensor, how the entries of a new channel begin: a number (what begins at 0 counts as a shift, which
            says nothing of how much a channel matters), "mean" (of the other channels'), or "random" (as large as the
            others', or as He et al. 2015 say where there are none). Of tensors that are not named here, those that
            are not read with and have one entry a channel begin as "mean", others as "random".
        channel_dim: The dimension of what the layer is given, and of what it returns, that holds the channels: 1 for
            images, -1 for features that come last.
        refuse: Returns why this very layer cannot be edited, or an empty string.
        anywhere: The channels may lie along any dimension that is as long as the layer is wide.
        parts: Into how many equal groups the layer divides its channels, which come and go as a whole; None where
            channels come and go one by one.
        counts: Attributes that hold the number of those groups.
        mixes: Whether the layer's statistics are taken over the channels, so that all depend on each.
        role: "dense" mixes what it reads, "grouped" does so within groups of channels, through "norm" each channel
            passes by itself; so it does through "depthwise" and "prelu", which with one channel left would be taken for
            something else. Found from the rest where nothing is said.

    Raises:
        InputError: What is said does not make sense together.
    """

    slots: Mapping[Side, Slots]
    widths: Mapping[Side, tuple[str, ...]] = field(default_factory=dict)
    fill: Mapping[str, First] = field(default_factory=dict)
    channel_dim: int = 1
    refuse: Callable[[nn.Module], str] = lambda module: ""
    anywhere: bool = False
    parts: Callable[[nn.Module], int] | None = None
    counts: tuple[str, ...] = ()
    mixes: Callable[[nn.Module], bool] = lambda module: False
    role: str = ""

    def __post_init__(self) -> None:
        problems = Problems("this kind of layer makes no sense")
        if set(self.slots) not in ({"in", "out"}, {"both"}):
            problems.add(f'slots has the sides {sorted(self.slots)}: give "in" and "out", or "both" alone')
        for side in self.widths.keys() - self.slots.keys():
            problems.add(f"widths counts the side {side!r}, which slots does not have")
        named = [slot for slots in self.slots.values() for slot in slots]
        for slot in named:
            if not (isinstance(slot, tuple) and len(slot) == 2 and isinstance(slot[0], str) and _is_count(slot[1])):
                problems.add(f"slot {slot!r}: give the tensor's name and its dimension, counted from the first, 0")
                break
        else:
            names = {name for name, _ in named}
            for name in self.fill.keys() - names:
                problems.add(f"fill names {name!r}, which no slot does{nearest(name, names)}")
        for name, first in self.fill.items():
            number = isinstance(first, int | float) and not isinstance(first, bool)
            if not number and first not in ("random", "mean"):
                problems.add(f'fill={{{name!r}: {first!r}}}: give a number, "mean" or "random"')
        if self.counts and self.parts is None:
            problems.add(f"counts={self.counts!r} needs parts, which says how many groups of channels there are")
        uncounted = [side for side in self.slots if side != "out" and not self.widths.get(side)]
        if self.counts and uncounted:
            problems.add(f"counts={self.counts!r} needs the attribute that counts the channels, in widths")
        if self.role and self.role not in ROLES:
            problems.add(f"role={self.role!r} does not exist{nearest(self.role, ROLES)}")
        problems.raise_if_any()
        found = "norm" if "both" in self.slots else "dense" if self.parts is None else "grouped"
        object.__setattr__(self, "role", self.role or found)
        object.__setattr__(self, "widths", {side: tuple(self.widths.get(side, ())) for side in self.slots})

    def first(self, name: str, tensor: torch.Tensor, dim: int) -> First:
        """How a new channel's entries begin in the tensor of this name, whose channels lie along `dim`."""
        single = tensor.numel() == tensor.shape[dim] and not self.reads_with(name)
        return self.fill.get(name, "mean" if single else "random")

    def reads_with(self, name: str) -> bool:
        """Whether the tensor of this name holds channels that are read."""
        return any(name == other for other, _ in self.slots.get("in", ()))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
