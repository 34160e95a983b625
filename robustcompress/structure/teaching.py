"""Layers of other makers: the editor learns a type from one description, and checks each layer against it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from robustcompress.errors import InputError, nearest
from robustcompress.structure.groups import Side
from robustcompress.structure.kinds import _TAUGHT, counted, kind_of, taught_kind
from robustcompress.structure.layer_kind import LayerKind

_VERBS: dict[Side, str] = {"out": "writes", "in": "reads", "both": "passes"}


def teach_layer(module_type: type[nn.Module], kind: LayerKind) -> None:
    """Say how layers of a type, and of its subclasses, hold their channels; the last word on a type counts.

    Subclasses of torch's layers need not be taught unless they hold channels in further tensors. Editors that are made
    from now on, here and in whatever loads a saved result, know the type. What is taught is proven on each network like
    everything else: a group whose channels a layer does not treat as told cannot be edited, and says why.

    Args:
        module_type: The class of the layer. Its forward takes one tensor by position and returns one.
        kind: How it holds its channels.

    Raises:
        InputError: Not a class of modules, or not a kind. Whether a layer has the tensors and attributes that are named
            is seen when a network with one is edited.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise InputError(f"module_type={module_type!r}: give the class of the layer, not its name or one of it")
    if module_type is nn.Module:
        raise InputError("module_type=nn.Module: every layer is one; give the class of one type of layer")
    if not isinstance(kind, LayerKind):
        raise InputError(f"kind={kind!r}: give a LayerKind")
    _TAUGHT[module_type] = kind


def misfits(module: nn.Module) -> Iterator[str]:
    """What a layer of a taught type lacks of what was told of it; nothing for other layers."""
    if (kind := taught_kind(module)) is None:
        return
    if held := [name for name, inner in module.named_modules() if inner is not module and kind_of(inner) is not None]:
        yield f"its type was taught, and it holds layers that are edited by themselves ({', '.join(held)}); teach one"
    if kind.mixes(module):
        yield "norms over the channels are torch's own alone (layer, RMS and group norm); do not say that it mixes"
    complaints = [complaint for side in kind.slots for complaint in _on_side(module, kind, side)]
    yield from complaints
    if complaints or kind.parts is None:
        return
    for attribute in kind.counts:
        yield from _uncounted(module, attribute)
    parts = kind.parts(module)
    for side, (width, *_) in ((side, list(_widths(module, kind, side).values()) or [0]) for side in kind.slots):
        if parts < 1 or width % parts:
            yield f"it {_VERBS[side]} {width} channels, which are not {parts} equal groups"


def _on_side(module: nn.Module, kind: LayerKind, side: Side) -> Iterator[str]:
    complaints = [complaint for name, dim in kind.slots[side] for complaint in _missing(module, name, dim)]
    complaints += [complaint for attribute in kind.widths[side] for complaint in _uncounted(module, attribute)]
    yield from complaints
    if complaints:
        return
    widths = _widths(module, kind, side)
    if not widths:
        yield f"nothing says how many channels it {_VERBS[side]}: name a tensor that it has, or an attribute"
    elif len(set(widths.values())) > 1:
        said = ", ".join(f"{name} says {width}" for name, width in widths.items())
        yield f"it is unclear how many channels it {_VERBS[side]}: {said}"


def _missing(module: nn.Module, name: str, dim: int) -> Iterator[str]:
    known = {*module._parameters, *module._buffers}
    if parametrize.is_parametrized(module, name):  # the remedy is said elsewhere
        return
    tensor = getattr(module, name, None)
    if tensor is None and hasattr(module, name):
        return
    if tensor is None or name not in known:
        yield f"it has no parameter or buffer {name!r}{nearest(name, known)}"
    elif dim >= tensor.dim():
        yield f"{name!r} of shape {list(tensor.shape)} has no dimension {dim}"


def _uncounted(module: nn.Module, attribute: str) -> Iterator[str]:
    count = getattr(module, attribute, None)
    if isinstance(count, tuple) and len(count) == 1:
        count = count[0]
    if not isinstance(count, int) or isinstance(count, bool):
        yield f"it has no whole number {attribute!r}"


def _widths(module: nn.Module, kind: LayerKind, side: Side) -> dict[str, int]:
    """How many channels a side has, as each tensor and each attribute says."""
    tensors = {name: getattr(module, name).shape[dim] for name, dim in kind.slots[side] if _has(module, name)}
    return {attribute: counted(module, attribute) for attribute in kind.widths[side]} | tensors


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), torch.Tensor)
