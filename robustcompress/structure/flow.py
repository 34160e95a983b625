"""What each operation that autograd recorded does to labels.

Nothing here knows of layers: `Couplings` gives a layer's output its labels, and asks for everything in between. An
operation without a rule of its own passes the labels of operands that broadcast to its result, or of one whose labelled
dimensions keep their size; what else it does to channels shows when the trace is proven. Where labels cannot be
followed, their units are set aside as opaque.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from robustcompress.structure.labels import (
    NONE,
    Label,
    Shape,
    aligned,
    padded,
    permuted,
    reshaped,
    taken,
    without,
)

Labels = tuple[Label, ...]


class Ledger(Protocol):
    """What is found out on the way."""

    def couple(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Note that the units at the same places of two tensors of ids (broadcast) can only change together."""

    def part(self, units: torch.Tensor) -> None:
        """Note that units passed a chunk, a split or a slice along their own dimension."""

    def hide(self, units: torch.Tensor) -> None:
        """Note that units went where they cannot be followed."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One input of an operation: its labels, and its shape; None for a tensor that autograd does not know."""

    labels: Labels
    shape: Shape | None


@dataclass(frozen=True, slots=True)
class Step:
    """One operation.

    Attributes:
        function: Autograd's node, whose saved attributes are read.
        operands: Its inputs, in order.
        shapes: The shape of each output.
        number: The output that is asked for.
        ledger: Where findings go.
    """

    function: Any
    operands: tuple[Operand, ...]
    shapes: tuple[Shape, ...]
    number: int
    ledger: Ledger

    @property
    def shape(self) -> Shape:
        """The shape of the output that is asked for."""
        return self.shapes[self.number]

    @property
    def first(self) -> Operand:
        """The only operand of most operations."""
        return self.operands[0]

    def saved(self, name: str) -> Any:
        """An argument that autograd kept."""
        return getattr(self.function, f"_saved_{name}")

    def dim(self, value: int, rank: int) -> int:
        """A dimension counted from the front; autograd keeps negative ones unsigned."""
        value = _signed(value)
        return value + rank if value < 0 else value


def carry(step: Step) -> Labels:
    """The labels of an operation's output."""
    if not any(operand.labels for operand in step.operands):
        return ()
    name = step.function.name()
    rule = next((rule for prefixes, rule in _RULES if name.startswith(prefixes)), _default)
    return tuple(label for label in rule(step) if label.live)  # a lone unit may have lost its dimension


def join(operands: Sequence[Operand], shape: Shape, ledger: Ledger) -> Labels:
    """Labels of an elementwise result: units at the same place are coupled; what is broadcast along its units is not."""
    found: list[Label] = []
    for operand in operands:
        for label in operand.labels:
            label = aligned(label, len(shape))
            inside = (1,) * (len(shape) - len(operand.shape or ())) + (operand.shape or ())
            if any(inside[d] == 1 < shape[d] for d in label.live):
                continue
            for number, other in enumerate(found):
                if not other.live.isdisjoint(label.live):
                    found[number] = _met(other, label, ledger)
                    break
            else:
                found.append(label)
    return tuple(found)


def _met(one: Label, other: Label, ledger: Ledger) -> Label:
    ledger.couple(one.ids, other.ids)
    whole = [label for label in (one, other) if bool((label.ids != NONE).all())]
    if whole:  # the other's units are the same ones
        return min(whole, key=lambda label: label.ids.numel())
    return Label(torch.where(one.ids != NONE, one.ids, other.ids), one.live | other.live)


def _default(step: Step) -> Labels:
    given = [operand for operand in step.operands if operand.labels]
    if all(_broadcasts(operand.shape, step.shape) for operand in given):
        return join(given, step.shape, step.ledger)
    kept: list[Label] = []
    for operand in given:
        for label in operand.labels:
            shape = operand.shape or ()
            same = len(shape) == len(step.shape) and all(shape[d] == step.shape[d] for d in label.live)
            if same and len(given) == 1:
                kept.append(label)
            else:
                step.ledger.hide(label.units())
    return tuple(kept)


def _broadcasts(inside: Shape | None, outside: Shape) -> bool:
    if inside is None or len(inside) > len(outside):
        return False
    return all(a in (1, b) for a, b in zip(reversed(inside), reversed(outside), strict=False))


def _each(step: Step, change: Callable[[Label], Label | None]) -> Labels:
    changed = [change(label) for label in step.first.labels]
    return tuple(label for label in changed if label is not None)


def _view(step: Step) -> Labels:
    old = step.first.shape or ()
    return _each(step, lambda label: reshaped(label, old, step.shape))


def _permute(step: Step) -> Labels:
    rank = len(step.shape)
    dims = [step.dim(d, rank) for d in step.saved("dims")]
    return _each(step, lambda label: permuted(label, dims))


def _transpose(step: Step) -> Labels:
    rank = len(step.shape)
    dims = list(range(rank))
    one, other = (step.dim(step.saved(name), rank) for name in ("dim0", "dim1"))
    dims[one], dims[other] = dims[other], dims[one]
    return _each(step, lambda label: permuted(label, dims))


def _turn(step: Step) -> Labels:
    return _each(step, lambda label: permuted(label, [1, 0]))


def _expand(step: Step) -> Labels:
    return join(step.operands, step.shape, step.ledger)


def _reduce(step: Step) -> Labels:
    dims, rank = getattr(step.function, "_saved_dim", None), len(step.first.shape or ())
    if dims is None:  # over everything
        return ()
    gone = [step.dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)] or list(range(rank))
    keep = bool(step.saved("keepdim"))

    def change(label: Label) -> Label | None:
        met = label.live.intersection(gone)
        if met:  # units that meet in the result go together, where there are others beside them
            first = label.ids[tuple(slice(1) if d in met else slice(None) for d in range(rank))]
            if met == label.live:
                return None
            step.ledger.couple(label.ids, first)
            label = Label(first, label.live - met)
        return without(label, gone, keep=keep)

    return _each(step, change)


def _cat(step: Step) -> Labels:
    dim = step.dim(step.saved("dim"), len(step.shape))
    sizes = _sizes_along(step, dim)
    if sizes is None:
        return _hide(step)
    across = [[label for label in operand.labels if dim not in label.live] for operand in step.operands]
    elsewhere = frozenset[int]().union(*(label.live for labels in across for label in labels))
    along: list[Label | None] = []
    for operand, others in zip(step.operands, across, strict=True):
        mine = next((label for label in operand.labels if dim in label.live), None)
        if mine is not None and not elsewhere.isdisjoint(mine.live):
            # All entries of a plain parameter are told apart; beside tokens, say, they are channels as those are.
            first = mine.ids.narrow(dim, 0, 1)
            step.ledger.couple(mine.ids, first)
            others.append(Label(first, mine.live - {dim}))
            mine = None
        along.append(mine)
    one = (*step.shape[:dim], 1, *step.shape[dim + 1 :])
    joined = join([Operand(tuple(labels), one) for labels in across], one, step.ledger)
    return (*joined, *_concatenated(along, sizes, dim, len(step.shape)))


def _sizes_along(step: Step, dim: int) -> list[int] | None:
    """How long each operand of a concatenation is; None where that cannot be told."""
    known = [operand.shape[dim] for operand in step.operands if operand.shape is not None]
    if len(known) < len(step.operands) - 1:
        return None
    rest = step.shape[dim] - sum(known)  # a tensor without gradient, such as a buffer, takes what the others leave
    return [rest if operand.shape is None else operand.shape[dim] for operand in step.operands]


def _concatenated(labels: Sequence[Label | None], sizes: Sequence[int], dim: int, rank: int) -> Labels:
    present = [label for label in labels if label is not None]
    if not present:
        return ()
    lengths = [max(label.ids.shape[d] for label in present) for d in range(rank)]
    pieces = []
    for label, size in zip(labels, sizes, strict=True):
        ids = torch.full((1,) * rank, NONE) if label is None else label.ids
        pieces.append(ids.expand([size if d == dim else length for d, length in enumerate(lengths)]))
    return (Label(torch.cat(pieces, dim), frozenset[int]().union(*(label.live for label in present))),)


def _stack(step: Step) -> Labels:
    dim = step.dim(step.saved("dim"), len(step.shape))
    shape = (*step.shape[:dim], 1, *step.shape[dim + 1 :])
    inside = (*step.shape[:dim], *step.shape[dim + 1 :])
    wider = [
        Operand(tuple(reshaped(label, inside, shape) for label in operand.labels), shape) for operand in step.operands
    ]
    return join(wider, shape, step.ledger)


def _slice(step: Step) -> Labels:
    old = step.first.shape or ()
    dim = step.dim(step.saved("dim"), len(old))
    start, by = _signed(step.saved("start")), int(step.saved("step"))
    start = max(0, start + old[dim]) if start < 0 else start
    return _parted(step, dim, torch.arange(start, start + step.shape[dim] * by, by))


def _split(step: Step) -> Labels:
    dim = step.dim(step.saved("dim"), len(step.shape))
    start = sum(shape[dim] for shape in step.shapes[: step.number])
    return _parted(step, dim, torch.arange(start, start + step.shape[dim]))


def _select(step: Step) -> Labels:
    old = step.first.shape or ()
    dim = step.dim(step.saved("dim"), len(old))
    index = step.number if step.function.name().startswith("Unbind") else step.dim(step.saved("index"), old[dim])
    one = (*old[:dim], 1, *old[dim + 1 :])
    labels = _parted(step, dim, torch.tensor([index]))
    return tuple(reshaped(Label(label.ids, label.live - {dim}), one, step.shape) for label in labels)


def _parted(step: Step, dim: int, positions: torch.Tensor) -> Labels:
    for label in step.first.labels:
        if dim in label.live:
            step.ledger.part(label.units())
    return _each(step, lambda label: taken(label, dim, positions))


def _index_select(step: Step) -> Labels:
    dim = step.dim(step.saved("dim"), len(step.shape))
    index = step.saved("index")
    return _each(step, lambda label: taken(label, dim, index)) if not index.is_meta else _hide(step)


def _index(step: Step) -> Labels:
    """Indexing by one tensor, as tables of relative positions are read."""
    indices = step.saved("indices")
    chosen = [d for d, index in enumerate(indices) if index is not None]
    index = indices[chosen[0]]
    if len(chosen) != 1 or index.is_meta or index.dtype == torch.bool:
        return _hide(step)
    dim, old = chosen[0], step.first.shape or ()
    flat = (*old[:dim], index.numel(), *old[dim + 1 :])
    return _each(step, lambda label: reshaped(taken(label, dim, index.flatten()), flat, step.shape))


def _roll(step: Step) -> Labels:
    rank = len(step.shape)
    moves = list(zip((step.dim(d, rank) for d in step.saved("dims")), step.saved("shifts"), strict=True))

    def change(label: Label) -> Label:
        along = [(d, int(shift)) for d, shift in moves if d in label.live]
        if not along:
            return label
        return Label(label.ids.roll([shift for _, shift in along], [d for d, _ in along]), label.live)

    return _each(step, change)


def _flip(step: Step) -> Labels:
    dims = {step.dim(d, len(step.shape)) for d in step.saved("dims")}
    return _each(step, lambda label: Label(label.ids.flip(sorted(dims & label.live)), label.live))


def _repeat(step: Step) -> Labels:
    repeats, rank = step.saved("repeats"), len(step.shape)

    def change(label: Label) -> Label:
        label = aligned(label, rank)
        return Label(label.ids.repeat([int(n) if d in label.live else 1 for d, n in enumerate(repeats)]), label.live)

    return _each(step, change)


def _pad(step: Step) -> Labels:
    pad = [_signed(n) for n in step.saved("pad")]
    return _each(step, lambda label: padded(label, pad))


def _product(step: Step) -> Labels:
    """Matrix products: what is summed over meets its partner; what is not goes on."""
    left, right = step.operands[-2:]
    return _multiplied(step, left, right, shape=step.shape)


def _multiplied(step: Step, left: Operand, right: Operand, *, shape: Shape) -> Labels:
    rank = len(shape)
    rest: list[Operand] = []
    summed: list[Label | None] = []
    for operand, gone in ((left, rank - 1), (right, rank - 2)):
        along = [label for label in operand.labels if gone in label.live]
        summed.append(along[0] if along else None)
        inside = [*(operand.shape or shape)]
        inside[gone] = 1
        rest.append(Operand(tuple(label for label in operand.labels if gone not in label.live), tuple(inside)))
    one, other = summed
    met = one is not None and other is not None and len(one.live) == len(other.live) == 1
    if met and one is not None and other is not None:
        step.ledger.couple(one.ids, other.ids.transpose(-1, -2))
    else:  # a partner without units, such as a weight outside a layer, or units told apart in other dimensions, too
        for label in summed:
            if label is not None:
                step.ledger.hide(label.units())
    return join(rest, shape, step.ledger)


def _attention(step: Step) -> Labels:
    """Fused attention: queries and keys are summed over their width, values go on."""
    query, key, value = step.operands[:3]
    swapped = Operand(
        tuple(
            permuted(label, [*range(len(step.shape) - 2), len(step.shape) - 1, len(step.shape) - 2])
            for label in key.labels
        ),
        None if key.shape is None else (*key.shape[:-2], key.shape[-1], key.shape[-2]),
    )
    weights = (*step.shape[:-1], (key.shape or step.shape)[-2])
    mixed = Operand(_multiplied(step, query, swapped, shape=weights), weights)
    return _multiplied(step, mixed, value, shape=step.shape)


def _hide(step: Step) -> Labels:
    for operand in step.operands:
        for label in operand.labels:
            step.ledger.hide(label.units())
    return ()


def _signed(value: int) -> int:
    return int(value) - (1 << 64) if int(value) >= 1 << 63 else int(value)


_RULES: tuple[tuple[tuple[str, ...], Callable[[Step], Labels]], ...] = (
    (("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "UnsqueezeBackward", "SqueezeBackward"), _view),
    (("PermuteBackward",), _permute),
    (("TransposeBackward",), _transpose),
    (("TBackward",), _turn),
    (("ExpandBackward",), _expand),
    (("MeanBackward", "SumBackward", "AmaxBackward", "AminBackward", "MaxBackward", "MinBackward"), _reduce),
    (("StdBackward", "VarBackward", "VarMeanBackward", "LinalgVectorNormBackward", "LogsumexpBackward"), _reduce),
    (("CatBackward",), _cat),
    (("StackBackward",), _stack),
    (("SliceBackward",), _slice),
    (("SplitBackward", "SplitWithSizesBackward"), _split),
    (("SelectBackward", "UnbindBackward"), _select),
    (("IndexSelectBackward",), _index_select),
    (("IndexBackward",), _index),
    (("RollBackward",), _roll),
    (("FlipBackward",), _flip),
    (("RepeatBackward",), _repeat),
    (("ConstantPadNdBackward",), _pad),
    (("MmBackward", "AddmmBackward", "BmmBackward", "BaddbmmBackward"), _product),
    (("ScaledDotProduct",), _attention),
    (("PixelShuffleBackward", "PixelUnshuffleBackward", "Im2ColBackward", "ConvolutionBackward"), _hide),
    (("TopkBackward", "SortBackward", "GatherBackward", "ScatterBackward", "CumsumBackward"), _hide),
)
"""Looked up in order by the beginning of autograd's own names."""
