"""Walks torch-pruning's dependency graph and notes which positions of which layers are one channel.

Which layers depend on which is torch-pruning's finding. *Where* a channel lies behind a concat, a chunk, a slice or a
flatten is read here from the shapes autograd recorded: torch-pruning infers those sizes from neighbouring layers and
gets them wrong for a concat in front of a flatten, a chunk behind which two halves meet again, and a concat downstream
of a plain parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from robustcompress.structure.attention import Heads
from robustcompress.structure.groups import Axis, Side
from robustcompress.structure.kinds import kind_of, slots_of, width_of

Unit = int
"""A set of coupled positions, one channel wide."""

Relation = tuple[torch.Tensor, torch.Tensor]
"""Pairs (position at the producer, position at the consumer) along one edge."""


class Couplings:
    """Which positions of which axes are one channel.

    Args:
        graph: A built `torch_pruning.DependencyGraph`.
        twin: The module the graph was built on.
        heads: Attention heads, which are units beforehand: nothing is followed from their writers.

    Attributes:
        unit_at: Per axis, the unit at each position that belongs to one.
        outputs: Units that reach the model's output.
        parted: Units that pass through a chunk, a split or a slice.
        opaque: Units that pass through a reshape whose channels cannot be followed.
        param_dims: Per plain parameter, the dimension its channels lie along.
    """

    def __init__(self, graph: Any, twin: nn.Module, heads: Sequence[Heads] = ()) -> None:
        self.unit_at: dict[Axis, dict[int, Unit]] = defaultdict(dict)
        self.outputs: set[Unit] = set()
        self.parted: set[Unit] = set()
        self.opaque: set[Unit] = set()
        self.param_dims: dict[str, int] = {}
        self._graph = graph
        self._names: dict[Any, str] = {module: name for name, module in twin.named_modules()}
        self._names.update({parameter: name for name, parameter in twin.named_parameters()})
        self._parent: list[Unit] = []
        self._seen: dict[tuple[Any, Any], dict[int, Unit]] = defaultdict(dict)
        self._relations: dict[tuple[Any, Any], Relation | None] = {}
        self._products = _products(graph)
        order = {name: number for number, (name, _) in enumerate(twin.named_modules())}
        told = {axis.module for found in heads for axis in found.axes if axis.side == "out"}
        roots = [m for m in graph.module2node if isinstance(m, nn.Module) and m in self._names and _writes(m)]
        for module in sorted(roots, key=lambda m: order[self._names[m]]):
            if self._names[module] not in told:
                self._walk(module)
        for found in heads:
            self._declare(found)

    def find(self, unit: Unit) -> Unit:
        """The unit that stands for everything `unit` has been joined with."""
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit

    def units(self) -> Iterator[tuple[Unit, dict[Axis, list[int]]]]:
        """Every unit with the positions it takes, in the order in which the model writes them."""
        found: dict[Unit, dict[Axis, list[int]]] = {}
        for axis, positions in self.unit_at.items():
            for position in sorted(positions):
                unit = self.find(positions[position])
                found.setdefault(unit, {}).setdefault(axis, []).append(position)
        yield from found.items()

    def _declare(self, heads: Heads) -> None:
        """Make each head one unit, in place of whatever a walk has brought there."""
        units = list(range(len(self._parent), len(self._parent) + heads.width))
        self._parent.extend(units)
        for axis, segments in heads.axes.items():
            owners = [unit for segment in segments for unit in units for _ in range(segment.copies)]
            self.unit_at[axis] = dict(enumerate(owners))
        self.param_dims.update(heads.param_dims)

    def _walk(self, module: nn.Module) -> None:
        """Follow everything `module` writes that no earlier walk has reached."""
        known = self.unit_at[Axis(self._names[module], "out")]
        channels = torch.tensor([c for c in range(width_of(module, "out")) if c not in known], dtype=torch.long)
        if len(channels) == 0:
            return
        units = torch.arange(len(self._parent), len(self._parent) + len(channels))
        self._parent.extend(units.tolist())
        node, handler = (
            self._graph.module2node[module],
            self._graph.get_pruner_of_module(module).prune_out_channels,
        )
        stack = [(node, handler, *self._arrive(node, handler, channels, units))]
        while stack:
            node, handler, positions, units = stack.pop()
            for dependency in node.dependencies:
                if not dependency.is_triggered_by(handler):
                    continue
                there = self._carry(node, dependency.target, positions, units)
                fresh = self._arrive(dependency.target, dependency.handler, *there)
                if len(fresh[0]):
                    stack.append((dependency.target, dependency.handler, *fresh))

    def _arrive(self, node: Any, handler: Any, positions: torch.Tensor, units: torch.Tensor) -> Relation:
        """Note the units at their positions; return those that are here for the first time."""
        seen, axis = self._seen[(node, handler)], self._axis(node, handler)
        is_output = _kind(node) == "_OutputOp" or (not node.outputs and (axis is None or axis.side != "in"))
        first: list[int] = []
        for number, (position, unit) in enumerate(zip(positions.tolist(), units.tolist(), strict=True)):
            if is_output:
                self.outputs.add(unit)
            if position in seen:
                self._join(seen[position], unit)
                continue
            seen[position] = unit
            first.append(number)
            if axis is not None:
                self._join(self.unit_at[axis].setdefault(position, unit), unit)
        return positions[first], units[first]

    def _join(self, one: Unit, other: Unit) -> None:
        one, other = self.find(one), self.find(other)
        if one != other:
            self._parent[max(one, other)] = min(one, other)

    def _axis(self, node: Any, handler: Any) -> Axis | None:
        target = node.module
        if target not in self._names:
            return None
        name = self._names[target]
        if isinstance(target, nn.Parameter):
            self.param_dims[name] = int(node.pruning_dim)
            return Axis(name, "param")
        if kind_of(target) is None:
            return None
        out, into = (
            self._graph.is_out_channel_pruning_fn(handler),
            self._graph.is_in_channel_pruning_fn(handler),
        )
        side: Side = "both" if out and into else "out" if out else "in"
        return Axis(name, side) if slots_of(target, side) else None

    def _carry(self, source: Any, target: Any, positions: torch.Tensor, units: torch.Tensor) -> Relation:
        """Where positions of `source` lie at `target`, along every edge between the two."""
        forward = target in source.outputs
        edge = (source, target) if forward else (target, source)
        if edge not in self._relations:
            self._relations[edge] = _relate(*edge, self._products)
        relation = self._relations[edge]
        if relation is None:
            self.opaque.update(units.tolist())
            return positions[:0], units[:0]
        there = _follow(positions, units, *(relation if forward else relation[::-1]))
        if _kind(edge[0]) in ("_SplitOp", "_UnbindOp") or _kind(edge[1]) == "_SliceOp":
            self.parted.update(there[1].tolist())
        return there


def _writes(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and "out" in kind.slots


def _follow(positions: torch.Tensor, units: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> Relation:
    """Join positions with the pairs (start, end); one position may lead to several."""
    order = torch.argsort(start, stable=True)
    start, end = start[order].contiguous(), end[order]
    low, high = torch.searchsorted(start, positions), torch.searchsorted(start, positions, right=True)
    counts = high - low
    first = torch.repeat_interleave(low - (counts.cumsum(0) - counts), counts)
    return end[first + torch.arange(int(counts.sum()))], torch.repeat_interleave(units, counts)


def _products(graph: Any) -> dict[Any, int]:
    """The matrix products inside linear layers, each with the number of features its layer reads.

    For inputs of more than two dimensions autograd records a linear layer as several operations, of which torch-pruning
    takes only the last for the layer; what arrives at the others are still the features that the layer reads.
    """
    found: dict[Any, int] = {}
    for module, node in graph.module2node.items():
        if not isinstance(module, nn.Linear) or _is_product(node.grad_fn):
            continue
        inside = [node.grad_fn] if node.grad_fn.name().startswith((*_VIEWS, "AddBackward")) else []  # the bias is added
        while inside:
            for function, _ in inside.pop().next_functions:
                if function is not None and (_is_product(function) or function.name().startswith(_VIEWS)):
                    found[function] = module.in_features
                    inside += [] if _is_product(function) else [function]
    return found


_VIEWS = ("ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward")


def _is_product(function: Any) -> bool:
    return bool(function.name().startswith(("AddmmBackward", "MmBackward", "BmmBackward")))


def _relate(producer: Any, consumer: Any, products: Mapping[Any, int]) -> Relation | None:
    """Pair the producer's positions with the consumer's, or None where the channels cannot be followed."""
    if producer.grad_fn in products:
        here = torch.arange(products[producer.grad_fn])
        return here, here
    pairs: list[Relation] = []
    functions = consumer.grad_fn.next_functions
    for slot, (function, number) in enumerate(functions):
        if function is not producer.grad_fn:
            continue
        inside = _shape(producer, number)
        width = inside[_channel_dim(inside)]
        here = torch.arange(width)
        if consumer.grad_fn in products and _is_product(consumer.grad_fn):
            if function.name() == "TBackward0":  # the layer's own weight
                return here[:0], here[:0]
            return (here, here) if width == products[consumer.grad_fn] else None
        start = sum(_channels(producer, k) for k in range(number)) if _kind(producer) == "_SplitOp" else 0
        there = _through(consumer, slot, here, inside)
        if there is None:
            return None
        pairs.append((there[0] + start, there[1]))
    if not pairs:  # a module that wraps several autograd nodes: its own input is not visible, channels pass as they are
        here = torch.arange(_channels(producer, 0))
        return here, here
    return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


def _through(node: Any, slot: int, here: torch.Tensor, inside: tuple[int, ...]) -> Relation | None:
    """What `node` does to the channels of its input number `slot`, as pairs (input channel, node position)."""
    kind, dim = _kind(node), _channel_dim(inside)
    if isinstance(node.module, nn.Module) and not kind.startswith("_"):
        return here, here
    outside = _shape(node, 0)
    width, out = len(here), outside[_channel_dim(outside)]
    along = kind in ("_ConcatOp", "_SliceOp") and int(node.grad_fn._saved_dim) in (dim, dim - len(inside))
    if kind == "_ConcatOp" and along:
        offset = _offset(node, slot, dim, out)
        return None if offset is None else (here, here + offset)
    if kind == "_SliceOp" and along:
        start, step = int(node.grad_fn._saved_start), int(node.grad_fn._saved_step)
        start -= (1 << 64) if start >= 1 << 63 else 0  # autograd saves a negative start unsigned
        start = max(0, start + width) if start < 0 else start
        taken = torch.arange(start, start + out * step, step)
        return taken, torch.arange(out)
    if width == out:
        return here, here
    if kind in ("_ReshapeOp", "_OutputOp"):
        if len(inside) > len(outside) and out % width == 0:  # flatten: each channel becomes `out / width` features
            return torch.arange(out) // (out // width), torch.arange(out)
        if len(inside) < len(outside) and width % out == 0:  # unflatten: as many features make one channel
            return here, here // (width // out)
        return None
    if kind in ("_SplitOp", "_UnbindOp", "_SliceOp", "_ConcatOp"):
        return here, here  # along another dimension
    if kind == "_ExpandOp" or width == 1:
        return here[:0], here[:0]  # broadcast: not a channel of the result
    return None


def _offset(node: Any, slot: int, dim: int, out: int) -> int | None:
    """Where input number `slot` of a concatenation begins; None when that cannot be told."""
    sizes = [None if f is None else _sizes(f, number)[dim] for f, number in node.grad_fn.next_functions]
    if sizes.count(None) == 1:  # a tensor without gradient, such as a buffer, takes what the others leave
        sizes[sizes.index(None)] = out - sum(size for size in sizes if size is not None)
    before = sizes[:slot]
    return None if None in before else sum(size for size in before if size is not None)


def _kind(node: Any) -> str:
    return type(node.module).__name__


def _sizes(function: Any, number: int) -> tuple[int, ...]:
    if hasattr(function, "variable"):
        return tuple(function.variable.shape)
    return tuple(int(size) for size in function._input_metadata[number].shape)


def _shape(node: Any, number: int) -> tuple[int, ...]:
    """Shape of output `number` of the operation behind `node`."""
    if isinstance(node.module, nn.Parameter):
        # Seen from its channels: the dimension torch-pruning edits comes second, as in an activation.
        return (1, int(node.module.shape[node.pruning_dim]))
    return _sizes(node.grad_fn, number)


def _channel_dim(shape: tuple[int, ...]) -> int:
    """Images and features keep channels second; token sequences `[N, T, C]` last."""
    return len(shape) - 1 if len(shape) in (1, 3) else 1


def _channels(node: Any, number: int) -> int:
    shape = _shape(node, number)
    return shape[_channel_dim(shape)]
