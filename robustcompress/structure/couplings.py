"""Which positions of which layers are one channel.

The graph is autograd's, of a pass that torch-pruning runs. What torch-pruning's own graph says of *where* a channel
lies is not used: its index mapping infers sizes from neighbouring layers, gets a concat in front of a flatten wrong,
and does not come to an end on windows. Here every layer's output is labelled with the units it writes, and the labels
go forward through each recorded operation (see `flow`), once, in the network's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from robustcompress.structure.attention import Heads
from robustcompress.structure.flow import carry
from robustcompress.structure.groups import Axis
from robustcompress.structure.kinds import holds, kind_of, width_of
from robustcompress.structure.labels import NONE, Label, Shape, positions_of
from robustcompress.structure.layer_kind import LayerKind
from robustcompress.structure.steps import Labels, Operand, Step

MOST = 4_000_000
"""Entries of a plain parameter that are told apart; one with more holds no channels that could be resized."""

Place = tuple[Any, int]
"""A value: autograd's node, and which of its outputs."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer in the graph.

    Attributes:
        name: Its qualified name.
        module: The layer.
        function: The node that is its last.
        number: Which of the node's outputs it returned.
        given: The value it was given; None for one that autograd does not know.
    """

    name: str
    module: nn.Module
    function: Any
    number: int
    given: Place | None


@dataclass(frozen=True, slots=True)
class Graph:
    """What autograd recorded of one forward pass.

    Attributes:
        outputs: The values the network returned; the first holds the logits.
        layers: Each layer by the node that is its last.
        parameters: The qualified names of plain parameters, by identity.
        calls: How often each layer was called.
        auxiliary: The layers among them that only training calls.
    """

    outputs: tuple[Place, ...]
    layers: Mapping[Any, Layer]
    parameters: Mapping[int, str]
    calls: Mapping[str, int]
    auxiliary: tuple[str, ...] = ()


@dataclass
class Couplings:
    """What the labels found.

    Attributes:
        positions: Per axis, int64 `[positions]`: the unit at each, or -1.
        logits: Units that reach the network's logits.
        outputs: Units that reach these or other outputs, which only training has.
        parted: Units that pass through a chunk, a split or a slice.
        opaque: Units that went where they cannot be followed.
        param_dims: Per plain parameter that holds channels, the dimension they lie along.
        channel_dims: Per axis of a norm, the dimension of its input that holds the channels.
        across: Per layer that works along another dimension than these units', int64 `[positions]` for each such
            dimension: the layer is applied once for each of them.
    """

    positions: dict[Axis, torch.Tensor] = field(default_factory=dict)
    logits: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)
    parted: set[int] = field(default_factory=set)
    opaque: set[int] = field(default_factory=set)
    param_dims: dict[str, int] = field(default_factory=dict)
    channel_dims: dict[Axis, int] = field(default_factory=dict)
    across: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)


def find_couplings(graph: Graph, heads: Sequence[Heads] = ()) -> Couplings:
    """Label everything and say what is coupled.

    Args:
        graph: Of a copy whose parameters all require gradients.
        heads: Attention heads: their writers write one unit a head, not one a row.
    """
    walk = _Walk(graph, heads)
    return walk.settled(walk.run())


class _Walk:
    """One pass over the graph. It is the ledger that `flow` writes in."""

    def __init__(self, graph: Graph, heads: Sequence[Heads]) -> None:
        self._graph = graph
        self._count = 0
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._parted: list[torch.Tensor] = []
        self._hidden: list[torch.Tensor] = []
        self._parameters: dict[str, Label] = {}
        self._axes: dict[Axis, torch.Tensor] = {}
        self._dims: dict[Axis, int] = {}
        self._across: dict[str, list[torch.Tensor]] = {}
        self._heads: dict[Axis, torch.Tensor] = {}
        for found in heads:
            units = self._born(found.width)
            for axis, segments in found.axes.items():
                self._heads[axis] = torch.cat([units.repeat_interleave(s.copies) for s in segments])

    def couple(self, one: torch.Tensor, other: torch.Tensor) -> None:
        if one is not other:
            one, other = torch.broadcast_tensors(one, other)  # type: ignore[no-untyped-call]
            both = (one != NONE) & (other != NONE) & (one != other)
            self._pairs.append((one[both], other[both]))

    def part(self, units: torch.Tensor) -> None:
        self._parted.append(units)

    def hide(self, units: torch.Tensor) -> None:
        self._hidden.append(units)

    def run(self) -> list[Labels]:
        """Label every value in the network's order, and return the labels of each output."""
        known: dict[Place, Labels] = {}
        shapes_of: dict[Any, tuple[Shape, ...]] = {}  # autograd lists them anew at every access
        for function in _in_order(self._graph):
            shapes_of[function] = shapes = _shapes(function)
            if function in self._graph.layers:
                layer = self._graph.layers[function]
                known[(function, layer.number)] = self._layer(layer, known)
            elif hasattr(function, "variable"):
                known[(function, 0)] = self._leaf(function.variable)
            else:
                operands = tuple(
                    Operand((), None) if f is None else Operand(known.get((f, number), ()), shapes_of[f][number])
                    for f, number in function.next_functions
                )
                for number in range(len(shapes)):
                    known[(function, number)] = carry(Step(function, operands, shapes, number, self))
        return [known.get(output, ()) for output in self._graph.outputs]

    def settled(self, outputs: Sequence[Labels]) -> Couplings:
        """Join what is coupled, and say where each unit lies."""
        roots = _components(self._count, self._pairs)

        def joined(units: torch.Tensor) -> torch.Tensor:
            return torch.where(units == NONE, NONE, roots[units.clamp_min(0)])

        found = Couplings(channel_dims=self._dims)
        for axis, units in (self._axes | self._heads).items():
            found.positions[axis] = joined(units)
        found.across = {name: tuple(map(joined, several)) for name, several in self._across.items()}
        in_layers = torch.zeros(self._count, dtype=torch.bool)
        for units in found.positions.values():
            in_layers[units[units != NONE]] = True
        hidden = list(self._hidden)
        for name, label in self._parameters.items():
            units = roots[label.ids]
            units = torch.where(in_layers[units], units, NONE)
            if not bool((units != NONE).any()):
                continue
            dim = next((d for d in sorted(label.live) if _lies_along(units, d)), None)
            if dim is None:
                hidden.append(units[units != NONE])
            else:
                found.param_dims[name] = dim
                found.positions[Axis(name, "param")] = units.movedim(dim, -1).reshape(-1, units.shape[dim])[0]
        ends = [[label.units() for label in labels] for labels in outputs]
        found.logits, found.outputs, found.parted, found.opaque = (
            set(roots[torch.cat(units)].tolist()) if units else set[int]()
            for units in (ends[0], [units for end in ends for units in end], self._parted, hidden)
        )
        return found

    def _born(self, count: int) -> torch.Tensor:
        self._count += count
        return torch.arange(self._count - count, self._count)

    def _leaf(self, tensor: torch.Tensor) -> Labels:
        """A plain parameter, all entries told apart: what they meet says which of its dimensions holds channels."""
        name = self._graph.parameters.get(id(tensor))
        if name is None or not 2 <= tensor.numel() <= MOST:
            return ()
        self._parameters[name] = label = positions_of(tuple(tensor.shape), self._count)
        self._count += tensor.numel()
        return (label,)

    def _layer(self, layer: Layer, known: Mapping[Place, Labels]) -> Labels:
        module, name = layer.module, layer.name
        kind = kind_of(module)
        assert kind is not None
        labels = known.get(layer.given, ()) if layer.given is not None else ()
        if "both" in kind.widths:
            return self._pass(layer, kind, labels)
        read, rest = self._read(labels, kind.channel_dim, width_of(module, "in"))
        axis = Axis(name, "out")
        written = self._heads.get(axis)
        if written is None:
            written = self._born(width_of(module, "out"))
        if read is not None:
            self._axes[Axis(name, "in")] = read
        self._axes[axis] = written
        if kind.parts is not None:
            self._tie(written, read, kind.parts(module))
        if kind.channel_dim == 1:  # a convolution mixes what lies along any other dimension
            for label in rest:
                self.hide(label.units())
            rest = ()
        for label in rest:
            if len(label.live) == 1:
                self._across.setdefault(name, []).append(label.ids.flatten())
        if axis in self._heads and bool((written == written[0]).all()):
            return rest  # behind reshapes a single head cannot be told from any other dimension of size 1
        rank = len(shape_of((layer.function, layer.number)))
        dim = kind.channel_dim % rank
        ids = written.reshape([-1 if d == dim else 1 for d in range(rank)])
        return (Label(ids, frozenset({dim})), *rest)

    def _read(self, labels: Labels, channel_dim: int, width: int) -> tuple[torch.Tensor | None, Labels]:
        """The units a layer reads, int64 `[width]`, and the labels along other dimensions."""
        for label in labels:
            dim = channel_dim % label.ids.dim()
            if dim in label.live:
                for other in labels:
                    if other is not label and dim in other.live:  # summed over, with nothing to say what it is
                        self.hide(other.units())
                rest = tuple(other for other in labels if dim not in other.live)
                columns = label.ids.movedim(dim, -1).reshape(-1, label.ids.shape[dim])
                self.couple(columns, columns[:1])
                return columns[0].expand(width), rest
        return None, labels

    def _pass(self, layer: Layer, kind: LayerKind, labels: Labels) -> Labels:
        """Through a layer that treats each channel, or each whole group of them, by itself."""
        module, axis = layer.module, Axis(layer.name, "both")
        shape = shape_of((layer.function, layer.number))
        width = width_of(module, "both")
        dims = [kind.channel_dim % len(shape)]
        if kind.anywhere:  # subclasses of layer norm may normalise images, with channels second
            dims = [d for d, size in enumerate(shape) if size == width]
        for dim in dims if holds(module, "both") else ():
            read, _ = self._read(labels, dim, width)
            if read is not None:
                self._axes[axis], self._dims[axis] = read, dim
                if kind.parts is not None and not kind.mixes(module):
                    self._tie(read, None, kind.parts(module))
                break
        kept: list[Label] = []
        for label in labels:
            if len(shape) == label.ids.dim() and all(label.ids.shape[d] in (1, shape[d]) for d in label.live):
                kept.append(label)
            else:
                self.hide(label.units())
        return tuple(kept)

    def _tie(self, units: torch.Tensor, others: torch.Tensor | None, parts: int) -> None:
        """Channels that a layer treats in whole groups can only change together."""
        one = units.reshape(parts, -1)
        self.couple(one, one[:, :1])
        if others is None:
            return
        other = others.reshape(parts, -1)
        self.couple(other, other[:, :1])
        self.couple(one[:, :1], other[:, :1])
        self.hide(one[(other == NONE).any(1)].flatten())


def shape_of(place: Place) -> Shape:
    """The shape of a value."""
    function, number = place
    return _shapes(function)[number]


def _shapes(function: Any) -> tuple[Shape, ...]:
    if hasattr(function, "variable"):
        return (tuple(function.variable.shape),)
    return tuple(tuple(int(size) for size in meta.shape) for meta in function._input_metadata)


def _in_order(graph: Graph) -> Iterator[Any]:
    """Autograd's nodes from the input to the outputs; of a layer's own nodes only the last."""
    done: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(function, False) for function, _ in reversed(graph.outputs)]
    while stack:
        function, ready = stack.pop()
        if ready:
            yield function
        elif function not in done:
            done.add(function)
            stack.append((function, True))
            stack.extend((f, False) for f in _before(graph, function) if f is not None and f not in done)


def _before(graph: Graph, function: Any) -> list[Any]:
    layer = graph.layers.get(function)
    if layer is not None:
        return [] if layer.given is None else [layer.given[0]]
    return [f for f, _ in function.next_functions]


def _lies_along(units: torch.Tensor, dim: int) -> bool:
    rows = units.movedim(dim, -1).reshape(-1, units.shape[dim])
    return torch.equal(rows, rows[:1].expand_as(rows))


def _components(count: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """For each of `count` units the first one that it is joined with, directly or not."""
    parent = torch.arange(count)
    if not pairs:
        return parent
    one, other = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    while True:
        a, b = parent[one], parent[other]
        if torch.equal(a, b):
            return parent
        low = torch.minimum(a, b)
        parent.scatter_reduce_(0, torch.cat([a, b]), torch.cat([low, low]), "amin")
        while not torch.equal(parent, parent[parent]):
            parent = parent[parent]
