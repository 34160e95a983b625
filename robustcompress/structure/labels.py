"""Labels: which unit each position of an activation belongs to, and what moving positions about does to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

NONE = -1
"""Stands at positions that belong to no unit: the image's own channels, constants, padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Label:
    """The units of a tensor's positions.

    A tensor may have several labels that know nothing of each other: channels along one dimension, hidden tokens along
    another.

    Attributes:
        ids: Int64, of the tensor's rank; as long as the tensor along dimensions in which units differ, 1 along others.
        live: The dimensions along which units are laid out; also where there is a single one.
    """

    ids: torch.Tensor
    live: frozenset[int]

    def units(self) -> torch.Tensor:
        """All units in it, int64 `[n]`."""
        return self.ids[self.ids != NONE]


def distinct(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The distinct entries of a vector; for each entry which of them it is; and how often each occurs."""
    found, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return found, inverse, counts


def reshaped(label: Label, old: Shape, new: Shape) -> Label:
    """The label after a view of `old` as `new`; positions keep their order."""
    sizes, ids_shape, touched = list(label.ids.shape), [1] * len(new), set[int]()
    for olds, news in _blocks(old, new):
        if not label.live.isdisjoint(olds):
            for d in olds:
                sizes[d] = old[d]
            for d in news:
                ids_shape[d] = new[d]
            touched.update(news)
    ids = label.ids.expand(sizes).reshape(ids_shape)
    live = set[int]()
    for d in sorted(touched):
        first = ids.narrow(d, 0, 1)
        if ids.shape[d] > 1 and torch.equal(first.expand_as(ids), ids):
            ids = first
        elif ids.shape[d] > 1:
            live.add(d)
    if touched and not live:  # a lone unit keeps a dimension of its own, or takes the features it is flattened to
        home = min(touched, key=lambda d: (new[d] > 1, d))
        if new[home] == 1 or len(new) == 2 or any(old[d] > 1 for d in label.live):
            ids, live = ids.expand([new[d] if d == home else 1 for d in range(len(new))]), {home}
    return Label(ids, frozenset(live))


def _blocks(old: Shape, new: Shape) -> Iterable[tuple[list[int], list[int]]]:
    """The shortest runs of dimensions of both shapes that hold as many positions."""
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news, a, b = [], [], 1, 1
        while True:
            if i < len(old) and (a <= b or j >= len(new)):
                a, i = a * old[i], i + 1
                olds.append(i - 1)
            elif j < len(new):
                b, j = b * new[j], j + 1
                news.append(j - 1)
            if a == b and olds and (news or j >= len(new)):
                break
            if i >= len(old) and j >= len(new):
                break
        # Trailing ones belong to the run before them.
        while i >= len(old) and j < len(new) and new[j] == 1:
            news.append(j)
            j += 1
        yield olds, news


def permuted(label: Label, dims: Sequence[int]) -> Label:
    """The label after `permute(dims)`."""
    return Label(label.ids.permute(list(dims)), frozenset(dims.index(d) for d in label.live))


def aligned(label: Label, rank: int) -> Label:
    """The label with dimensions of size 1 in front, as broadcasting adds them."""
    extra = rank - label.ids.dim()
    return Label(label.ids.reshape((1,) * extra + tuple(label.ids.shape)), frozenset(d + extra for d in label.live))


def without(label: Label, dims: Iterable[int], *, keep: bool) -> Label:
    """The label of a tensor that lost these dimensions, or has size 1 along them; it is not live along any of them."""
    gone = set(dims)
    if keep:
        return label
    rest = [d for d in range(label.ids.dim()) if d not in gone]
    return Label(label.ids.reshape([label.ids.shape[d] for d in rest]), frozenset(rest.index(d) for d in label.live))


def taken(label: Label, dim: int, positions: torch.Tensor) -> Label:
    """The label after `index_select(dim, positions)`."""
    return Label(label.ids.index_select(dim, positions), label.live) if dim in label.live else label


def padded(label: Label, pad: Sequence[int]) -> Label:
    """The label after constant padding, given as torch does, the last dimension first."""
    ids = label.ids
    for number in range(len(pad) // 2):
        dim, (before, after) = ids.dim() - 1 - number, pad[2 * number : 2 * number + 2]
        if dim in label.live:
            inside = ids.narrow(dim, max(0, -before), ids.shape[dim] + min(0, before) + min(0, after))
            ends = [
                inside.new_full((*inside.shape[:dim], max(0, n), *inside.shape[dim + 1 :]), NONE)
                for n in (before, after)
            ]
            ids = torch.cat([ends[0], inside, ends[1]], dim)
    return Label(ids, label.live)


def positions_of(shape: Shape, start: int) -> Label:
    """A label that tells all positions of a tensor apart, numbered from `start` in their order."""
    ids = torch.arange(start, start + math.prod(shape)).reshape(shape)
    return Label(ids, frozenset(d for d, size in enumerate(shape) if size > 1))
