"""Operations that move, choose or join positions, and reductions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robustcompress.structure.labels import NONE, Label, aligned, padded, permuted, reshaped, taken, without
from robustcompress.structure.steps import Labels, Operand, Step, each, hide, join, signed


def view(step: Step) -> Labels:
    """Views, squeezes and unsqueezes: positions keep their order."""
    old = step.first.shape or ()
    return each(step, lambda label: reshaped(label, old, step.shape))


def permute(step: Step) -> Labels:
    """`permute`."""
    rank = len(step.shape)
    dims = [step.dim(d, rank) for d in step.saved("dims")]
    return each(step, lambda label: permuted(label, dims))


def transpose(step: Step) -> Labels:
    """`transpose`."""
    rank = len(step.shape)
    dims = list(range(rank))
    one, other = (step.dim(step.saved(name), rank) for name in ("dim0", "dim1"))
    dims[one], dims[other] = dims[other], dims[one]
    return each(step, lambda label: permuted(label, dims))


def turn(step: Step) -> Labels:
    """`t` of a matrix."""
    return each(step, lambda label: permuted(label, [1, 0]))


def expand(step: Step) -> Labels:
    """`expand`."""
    return join(step.operands, step.shape, step.ledger)


def cat(step: Step) -> Labels:
    """`cat`: units side by side along its dimension, coupled along the others."""
    dim = step.dim(step.saved("dim"), len(step.shape))
    sizes = _sizes_along(step, dim)
    if sizes is None:
        return hide(step)
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


def stack(step: Step) -> Labels:
    """`stack`: all operands have the same channels."""
    dim = step.dim(step.saved("dim"), len(step.shape))
    shape = (*step.shape[:dim], 1, *step.shape[dim + 1 :])
    inside = (*step.shape[:dim], *step.shape[dim + 1 :])
    wider = [
        Operand(tuple(reshaped(label, inside, shape) for label in operand.labels), shape) for operand in step.operands
    ]
    return join(wider, shape, step.ledger)


def cut(step: Step) -> Labels:
    """Slices and `narrow`."""
    old = step.first.shape or ()
    dim = step.dim(step.saved("dim"), len(old))
    start, by = signed(step.saved("start")), int(step.saved("step"))
    start = max(0, start + old[dim]) if start < 0 else start
    return _parted(step, dim, torch.arange(start, start + step.shape[dim] * by, by))


def split(step: Step) -> Labels:
    """`split` and `chunk`."""
    dim = step.dim(step.saved("dim"), len(step.shape))
    start = sum(shape[dim] for shape in step.shapes[: step.number])
    return _parted(step, dim, torch.arange(start, start + step.shape[dim]))


def select(step: Step) -> Labels:
    """`select` and `unbind`."""
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
    return each(step, lambda label: taken(label, dim, positions))


def index_select(step: Step) -> Labels:
    """`index_select`."""
    dim = step.dim(step.saved("dim"), len(step.shape))
    index = step.saved("index")
    return each(step, lambda label: taken(label, dim, index)) if not index.is_meta else hide(step)


def index(step: Step) -> Labels:
    """Indexing by one tensor, as tables of relative positions are read."""
    indices = step.saved("indices")
    chosen = [d for d, index in enumerate(indices) if index is not None]
    index = indices[chosen[0]]
    if len(chosen) != 1 or index.is_meta or index.dtype == torch.bool:
        return hide(step)
    dim, old = chosen[0], step.first.shape or ()
    flat = (*old[:dim], index.numel(), *old[dim + 1 :])
    return each(step, lambda label: reshaped(taken(label, dim, index.flatten()), flat, step.shape))


def roll(step: Step) -> Labels:
    """`roll`."""
    rank = len(step.shape)
    turns = list(zip((step.dim(d, rank) for d in step.saved("dims")), step.saved("shifts"), strict=True))

    def change(label: Label) -> Label:
        along = [(d, signed(shift)) for d, shift in turns if d in label.live]
        if not along:
            return label
        return Label(label.ids.roll([shift for _, shift in along], [d for d, _ in along]), label.live)

    return each(step, change)


def flip(step: Step) -> Labels:
    """`flip`."""
    dims = {step.dim(d, len(step.shape)) for d in step.saved("dims")}
    return each(step, lambda label: Label(label.ids.flip(sorted(dims & label.live)), label.live))


def repeat(step: Step) -> Labels:
    """`repeat`."""
    repeats, rank = step.saved("repeats"), len(step.shape)

    def change(label: Label) -> Label:
        label = aligned(label, rank)
        return Label(label.ids.repeat([int(n) if d in label.live else 1 for d, n in enumerate(repeats)]), label.live)

    return each(step, change)


def pad(step: Step) -> Labels:
    """Constant padding."""
    ends = [signed(n) for n in step.saved("pad")]
    return each(step, lambda label: padded(label, ends))


def reduce(step: Step) -> Labels:
    """Reductions: along their own dimension units meet and are lost, or go together where there are others beside."""
    dims, rank = getattr(step.function, "_saved_dim", None), len(step.first.shape or ())
    if dims is None:  # over everything
        return hide(step)
    gone = [step.dim(d, rank) for d in ([dims] if isinstance(dims, int) else dims)] or list(range(rank))
    keep = bool(step.saved("keepdim"))

    def change(label: Label) -> Label | None:
        met = label.live.intersection(gone)
        if met:  # units that meet in the result go together, where there are others beside them
            first = label.ids[tuple(slice(1) if d in met else slice(None) for d in range(rank))]
            if met == label.live:
                step.ledger.hide(label.units())
                return None
            step.ledger.couple(label.ids, first)
            label = Label(first, label.live - met)
        return without(label, gone, keep=keep)

    return each(step, change)
