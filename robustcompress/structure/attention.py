"""Attention heads: which layers of an attention module hold them, and how.

A trace cannot find heads: queries meet keys in a product over the positions of a head, behind reshapes that leave no
channel where it was. So a type of module is *taught*: which linear layers write its heads, which one reads them, how
wide a head is. What is taught is proven with everything else before it is relied on (see `verify`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from robustcompress.errors import InputError, Problems
from robustcompress.structure.groups import Axis, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """How one type of attention module holds its heads. All names are relative to the module.

    The rows of a writer are runs, one after the other (queries, keys, values); in each run every head takes `head_dim`
    neighbouring rows, in the same order of heads, as it does among the columns of the reader.

    Attributes:
        writers: Linear layers whose rows are heads, each with its number of runs: (("qkv", 3),), or (("q", 1),
            ("k", 1), ("v", 1)). One that a module does not have is passed over.
        reader: The linear layer whose columns are heads.
        head_dim: The attribute that says how wide a head is.
        heads: Attributes that count heads, where the module has them; they are kept true.
        channels: Attributes that count the channels of all heads together, where the module has them.
    """

    writers: tuple[tuple[str, int], ...] = (("qkv", 3), ("gate", 1))
    reader: str = "proj"
    head_dim: str = "head_dim"
    heads: tuple[str, ...] = ("num_heads",)
    channels: tuple[str, ...] = ("attn_dim",)

    def __post_init__(self) -> None:
        problems = Problems("this kind of attention makes no sense")
        if not self.writers or any(runs < 1 for _, runs in self.writers):
            problems.add(f"writers={self.writers!r}: name at least one linear layer, each with one run or more")
        problems.raise_if_any()


FUSED = AttentionKind()
"""What a module without a kind of its own is held for, where it has the layers: timm's Attention, for example."""

_TAUGHT: dict[type[nn.Module], AttentionKind] = {}


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one attention module, found in a network.

    Attributes:
        module: The module's name.
        group: The name of their group, which is that of the first layer that writes them, in the model's order.
        width: The number of heads.
        axes: Per axis that holds them, its runs.
    """

    module: str
    group: str
    width: int
    axes: dict[Axis, tuple[Segment, ...]]


def teach_attention(module_type: type[nn.Module], kind: AttentionKind) -> None:
    """Say how modules of a type, and of its subclasses, hold their heads; the last word on a type counts.

    Modules with linear layers `qkv` and `proj` and an attribute `head_dim` need not be taught.

    Args:
        module_type: The class of the attention module.
        kind: How it holds its heads. Its `forward` must take the number of heads from the weights or from the
            attributes named here; otherwise the proof fails, and the group says why it cannot be edited.

    Raises:
        InputError: Not a class of modules, or not a kind.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise InputError(
            f"module_type={module_type!r}: give the class of the attention module, not its name or one of it"
        )
    if not isinstance(kind, AttentionKind):
        raise InputError(f"kind={kind!r}: give an AttentionKind")
    _TAUGHT[module_type] = kind


def kind_of_attention(module: nn.Module) -> AttentionKind:
    """What the module's type was taught, the most derived class first; `FUSED` where it was taught nothing."""
    return next((_TAUGHT[base] for base in type(module).__mro__ if base in _TAUGHT), FUSED)


def find_heads(model: nn.Module) -> Iterator[Heads]:
    """Every attention module of a network that fits its kind, in the model's order.

    Raises:
        InputError: A module whose type was taught a kind has other layers than it names.
    """
    for name, module in model.named_modules():
        if any(base in _TAUGHT for base in type(module).__mro__):
            _check_taught(name, module)
        if (found := _heads(name, module)) is not None:
            yield found


def _check_taught(name: str, module: nn.Module) -> None:
    kind, problems = kind_of_attention(module), Problems(f"{name} does not fit the attention kind of its type")
    for layer in (kind.writers[0][0], kind.reader):  # further writers may be absent
        if not isinstance(getattr(module, layer, None), nn.Linear):
            problems.add(f"it has no linear layer {layer!r}")
    if not isinstance(getattr(module, kind.head_dim, None), int):
        problems.add(f"it has no whole number {kind.head_dim!r}")
    problems.raise_if_any()


def _heads(name: str, module: nn.Module) -> Heads | None:
    kind = kind_of_attention(module)
    head_dim, reader = getattr(module, kind.head_dim, None), getattr(module, kind.reader, None)
    named = [(writer, getattr(module, writer, None), runs) for writer, runs in kind.writers]
    present = [(writer, layer, runs) for writer, layer, runs in named if isinstance(layer, nn.Linear)]
    if not isinstance(head_dim, int) or head_dim < 1 or not isinstance(reader, nn.Linear) or not present:
        return None
    width = reader.in_features // head_dim
    wide = all(layer.out_features == runs * width * head_dim for _, layer, runs in present)
    if width < 1 or width * head_dim != reader.in_features or not wide or named[0][1] is not present[0][1]:
        return None
    prefix = f"{name}." if name else ""
    order = [child for child, _ in module.named_modules()]
    group = prefix + min((writer for writer, _, _ in present), key=order.index)
    run = Segment(group, head_dim)
    axes = {Axis(prefix + writer, "out"): (run,) * runs for writer, _, runs in present}
    return Heads(name, group, width, axes | {Axis(prefix + kind.reader, "in"): (run,)})


def set_heads(module: nn.Module, width: int) -> None:
    """Make an attention module's own counts say `width` heads."""
    kind = kind_of_attention(module)
    for names, count in ((kind.heads, width), (kind.channels, width * int(getattr(module, kind.head_dim)))):
        for name in names:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, count)
