"""Attention heads: which layers of an attention module hold them, and how.

A trace cannot find heads: queries meet keys in a product over the positions of a head, behind reshapes that leave no
channel where it was. So a type of module is *taught*: which linear layers write its heads, which one reads them, how
wide a head is. What is taught is proven with everything else before it is relied on (see `verify`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from robustcompress.errors import InputError, Problems
from robustcompress.structure.groups import Axis, Segment, Side


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
        params: Parameters that hold heads beside the layers, each with the dimension that they lie along: a table of
            biases `[positions, heads]`, a scale `[heads, 1, 1]`, a bias `[heads * head_dim]`. Each head takes as many
            neighbouring entries as any other. One that a module does not have is passed over.
        rows: Linear layers with as many neighbouring rows for each head, whatever `head_dim` is: the last of a network
            that makes such a table has one. One that a module does not have is passed over.
    """

    writers: tuple[tuple[str, int], ...] = (("qkv", 3), ("gate", 1))
    reader: str = "proj"
    head_dim: str = "head_dim"
    heads: tuple[str, ...] = ("num_heads",)
    channels: tuple[str, ...] = ("attn_dim",)
    params: tuple[tuple[str, int], ...] = ()
    rows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("this kind of attention makes no sense")
        if not self.writers or any(runs < 1 for _, runs in self.writers):
            problems.add(f"writers={self.writers!r}: name at least one linear layer, each with one run or more")
        if any(dim < 0 for _, dim in self.params):
            problems.add(f"params={self.params!r}: count dimensions from the first, which is 0")
        problems.raise_if_any()


_PARAMS = (("relative_position_bias_table", 1), ("logit_scale", 0), ("q_bias", 0), ("v_bias", 0))
_ROWS = ("cpb_mlp.2",)  # of the network that makes the table in Swin V2

FUSED = AttentionKind(params=_PARAMS, rows=_ROWS)
"""What a module without a kind of its own is held for, where it has the layers: timm's Attention, for example."""

APART = AttentionKind(
    writers=(("q_proj", 1), ("k_proj", 1), ("v_proj", 1), ("gate", 1)),
    heads=("num_heads", "num_kv_heads"),
    channels=("attn_dim", "kv_dim"),
    params=_PARAMS,
    rows=_ROWS,
)
"""The same for a module with a layer each for queries, keys and values, as some of timm's have."""

MERGED = AttentionKind(writers=(("to_qkv", 3),), reader="merge", heads=("n_heads",), params=_PARAMS)
"""The same for a module with the names of torchvision's MaxViT."""

_TAUGHT: dict[type[nn.Module], AttentionKind] = {}


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one attention module, found in a network.

    Attributes:
        module: The module's name.
        group: The name of their group, which is that of the first layer that writes them, in the model's order.
        width: The number of heads.
        axes: Per axis that holds them, its runs.
        param_dims: Per plain parameter among the axes, the dimension the heads lie along.
    """

    module: str
    group: str
    width: int
    axes: dict[Axis, tuple[Segment, ...]]
    param_dims: dict[str, int] = field(default_factory=dict)


def teach_attention(module_type: type[nn.Module], kind: AttentionKind) -> None:
    """Say how modules of a type, and of its subclasses, hold their heads; the last word on a type counts.

    Modules with linear layers `qkv` and `proj`, or `q_proj`, `k_proj`, `v_proj` and `proj`, or `to_qkv` and `merge`,
    and an attribute `head_dim` need not be taught.

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
    """What the module's type was taught, the most derived class first; else the built-in kind whose layers it has."""
    if (taught := next((_TAUGHT[base] for base in type(module).__mro__ if base in _TAUGHT), None)) is not None:
        return taught
    fitting = (kind for kind in (FUSED, APART, MERGED) if isinstance(_inner(module, kind.writers[0][0]), nn.Linear))
    return next(fitting, FUSED)


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
    reader, head_dim = _inner(module, kind.reader), getattr(module, kind.head_dim, None)
    for layer in (kind.writers[0][0], kind.reader):  # further writers may be absent
        if not isinstance(_inner(module, layer), nn.Linear):
            problems.add(f"it has no linear layer {layer!r}")
    if not isinstance(head_dim, int):
        problems.add(f"it has no whole number {kind.head_dim!r}")
    elif isinstance(reader, nn.Linear) and (width := reader.in_features // max(1, head_dim)):
        for path, _, shape, dim in _further(module, kind):
            if not _copies(shape, dim, width):
                problems.add(f"{path!r} of shape {list(shape)} does not hold {width} heads along dimension {dim}")
    problems.raise_if_any()


def _heads(name: str, module: nn.Module) -> Heads | None:
    kind = kind_of_attention(module)
    head_dim, reader = getattr(module, kind.head_dim, None), _inner(module, kind.reader)
    named = [(writer, _inner(module, writer), runs) for writer, runs in kind.writers]
    present = [(writer, layer, runs) for writer, layer, runs in named if isinstance(layer, nn.Linear)]
    if not isinstance(head_dim, int) or head_dim < 1 or not isinstance(reader, nn.Linear) or not present:
        return None
    width = reader.in_features // head_dim
    wide = all(layer.out_features == runs * width * head_dim for _, layer, runs in present)
    if width < 1 or width * head_dim != reader.in_features or not wide or named[0][1] is not present[0][1]:
        return None
    prefix = f"{name}." if name else ""
    further = [
        (path, side, n, dim) for path, side, shape, dim in _further(module, kind) if (n := _copies(shape, dim, width))
    ]
    order = [child for child, _ in module.named_modules()]
    rows = [path for path, side, _, _ in further if side == "out"]
    group = prefix + min([writer for writer, _, _ in present] + rows, key=order.index)
    run = Segment(group, head_dim)
    axes = {Axis(prefix + writer, "out"): (run,) * runs for writer, _, runs in present}
    axes[Axis(prefix + kind.reader, "in")] = (run,)
    axes |= {Axis(prefix + path, side): (Segment(group, n),) for path, side, n, _ in further}
    param_dims = {prefix + path: dim for path, side, _, dim in further if side == "param"}
    return Heads(name, group, width, axes, param_dims)


def _further(module: nn.Module, kind: AttentionKind) -> Iterator[tuple[str, Side, tuple[int, ...], int]]:
    """What else holds heads, where the module has it: its name, side, shape, and the dimension of the heads."""
    for name, dim in kind.params:
        if isinstance(found := _inner(module, name), nn.Parameter):
            yield name, "param", tuple(found.shape), dim
    for name in kind.rows:
        if isinstance(found := _inner(module, name), nn.Linear):
            yield name, "out", tuple(found.weight.shape), 0


def _copies(shape: tuple[int, ...], dim: int, width: int) -> int:
    """How many neighbouring entries each of `width` heads takes; 0 where they cannot lie along that dimension."""
    return shape[dim] // width if dim < len(shape) and shape[dim] % width == 0 else 0


def _inner(module: nn.Module, path: str) -> Any:
    """What lies at a dotted path under a module, or None."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def set_heads(module: nn.Module, width: int) -> None:
    """Make an attention module's own counts say `width` heads."""
    kind = kind_of_attention(module)
    for names, count in ((kind.heads, width), (kind.channels, width * int(getattr(module, kind.head_dim)))):
        for name in names:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, count)
