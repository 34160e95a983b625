"""Where in a network a part can be inserted: behind what ends the residual branch of a block, before the sum.

As for blocks that can leave (see `depth`), nothing is read off the code of a block. One pass is recorded by autograd.
From what a block returns the record is followed back, through operations of one operand such as activations, to a sum
of two. Both lead back to what the block was given, the residual branch through more layers than the shortcut. What
the branch ends with must be what a module returned: behind that module is the place.
"""

from __future__ import annotations

import copy
import functools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.errors import first_line, nearest
from robustcompress.structure.auxiliary import expose, tensors_of
from robustcompress.structure.branch import inputs_of
from robustcompress.structure.copies import undrawn
from robustcompress.structure.groups import inside
from robustcompress.structure.identity import draw_anew, equal
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.parts import Extended, Part, containers_of, parts_of, put_behind

Place = tuple[Any, int]
"""A value: autograd's node, and which of its outputs."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a part can stand.

    Attributes:
        layer: The module behind which it would; its container, where parts stand there already.
        channels: What comes out there.
        kinds: Of the parts that stand there, or stood there and have left.
    """

    layer: str
    channels: int
    kinds: tuple[str, ...]


class Sites:
    """Looks for the places where parts can be inserted, in one recorded pass of a copy.

    Args:
        model: The network; not touched.
        image_shape: (C, H, W).
        auxiliary: Layers that only training calls; they must compute what they computed, too.
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int], auxiliary: Sequence[str] = ()) -> None:
        self._net = copy.deepcopy(model).double()
        self._auxiliary = auxiliary
        for parameter in self._net.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)
        draw_anew(self._net, 1.0, seed=1)
        generator = torch.Generator().manual_seed(0)
        images = torch.rand((2, *image_shape), generator=generator, dtype=torch.float64)
        self._images = images.to(next(self._net.parameters()).device)
        self._given: dict[str, Place | None] = {}
        self._returned: dict[str, tuple[Place, tuple[int, ...]] | None] = {}
        self._makers: dict[Place, str] = {}
        self._counts: Counter[str] = Counter()
        self._failure = ""
        try:
            self._record()
        except Exception as error:  # such as a cast to single precision in forward()
            self._failure = f"the network does not run in double precision ({first_line(error, 120)})"
        self._containers, self._parts = containers_of(self._net), list(parts_of(self._net))
        self._from_parts = {self._place(name) for name in self._parts} - {None}
        self._layers = {
            place: name
            for name, module in self._net.named_modules()
            if kind_of(module) is not None and (place := self._place(name)) is not None
        }

    @functools.cached_property
    def innermost(self) -> tuple[str, ...]:
        """Every block with such a place that holds no other such block, in the model's order."""
        names = [name for name, _ in self._net.named_modules()]
        found: list[str] = []
        for name in reversed(names):  # what lies in a module comes behind it
            if not any(inside(other, [name]) for other in found) and isinstance(self._find(name), Site):
                found.append(name)
        return tuple(reversed(found))

    def site(self, name: str) -> Site | str:
        """Where a part can stand in a block, or why none can."""
        modules = dict(self._net.named_modules())
        if name not in modules:
            return f"there is no module {name!r}{nearest(name, self.innermost)}"
        found = self._find(name)
        if isinstance(found, Site):
            others = [other for other in self.innermost if other != name and inside(other, [name])]
            found = f"it consists of blocks; name one of them: {', '.join(others)}" if others else found
        return found if isinstance(found, Site) else f"{name or 'the model'} ({type(modules[name]).__name__}): {found}"

    @torch.no_grad()
    def complaint(self, parts: Sequence[tuple[Site, str, Part]]) -> str:
        """What changes in the network, in evaluation or in training mode, when parts are inserted; empty when nothing.

        Args:
            parts: Where each stands, its kind, and a part; copied.
        """
        before, after = copy.deepcopy(self._net), copy.deepcopy(self._net)
        calls: Counter[str] = Counter()
        for site, kind, part in parts:
            twin = copy.deepcopy(part).to(self._images)
            twin.register_forward_hook(lambda *_, kind=kind, site=site: calls.update([f"{site.layer}.{kind}"]))
            put_behind(after, site.layer, kind, twin)
        for training in (False, True):
            wanted = self._run(before, training=training)
            calls.clear()
            try:
                found = self._run(after, training=training)
            except Exception as error:  # the model's own code may raise anything where a layer is not what it was
                return f"the model does not run with it ({first_line(error, 120)})"
            once = len(calls) == len(parts) and all(count == 1 for count in calls.values())
            if not once and not training:  # training may leave whole blocks out
                return "the model does not call what stands in the place of its layer"
            if len(found) != len(wanted) or not all(map(equal, found, wanted)):
                return "with it the model does not compute what it computes without"
        return ""

    def _run(self, net: nn.Module, *, training: bool) -> tuple[Tensor, ...]:
        expose(net, self._auxiliary)
        if training:
            net.train()
        with undrawn(net):
            torch.manual_seed(0)
            random.seed(0)
            return tensors_of(net(self._images))

    def _place(self, name: str) -> Place | None:
        returned = self._returned.get(name)
        return None if returned is None else returned[0]

    def _find(self, name: str) -> Site | str:
        module = self._net.get_submodule(name)
        if self._failure:
            return self._failure
        if name == "":
            return "it is the whole model; name a residual block"
        if name in self._containers or inside(name, self._parts):
            return "it is a part that was inserted, or a layer with one; name the block"
        if kind_of(module) is not None:
            return "it is a single layer; name the residual block that it is a part of"
        if not any(kind_of(inner) is not None for inner in module.modules()):
            return "it holds no layer"
        if self._counts[name] != 1:
            return f"it is called {self._counts[name]} times in one forward pass"
        given, returned = self._given.get(name), self._returned.get(name)
        if given is None or returned is None:
            return "it must be given one tensor, by position, and return one"
        return self._behind(name, given, returned[0])

    def _behind(self, name: str, given: Place, place: Place) -> Site | str:
        while True:
            operands = inputs_of(place[0])
            if place == given or place in self._from_parts or place in self._layers or not operands:
                return "what it returns is no sum of a branch and a shortcut"
            if place[0].name().startswith("AddBackward") and len(operands) == 2:
                break
            if len(operands) != 1:
                return f"what it returns is no sum of two, but the result of {place[0].name()}"
            place = operands[0]
        ways = [self._way(operand, given) for operand in operands]
        if None in ways:
            return "what it adds does not come from what it is given"
        lengths = [len(way or ()) for way in ways]
        if lengths[0] == lengths[1]:
            return f"both ways to its sum pass {lengths[0]} layers, so that none of them is the residual branch"
        layer = self._makers.get(operands[lengths.index(max(lengths))])
        if layer is None or not inside(layer, [name]):
            return "what its residual branch ends with is what no module returns; give it a module of its own"
        returned = self._returned[layer]
        assert returned is not None
        if len(returned[1]) != 4:
            return f"its residual branch gives {list(returned[1][1:])}, and parts are for images [C, H, W]"
        parent = layer.rpartition(".")[0]
        holder = self._net.get_submodule(parent)
        if isinstance(holder, Extended):
            return Site(parent, returned[1][1], holder.kinds)
        return Site(layer, returned[1][1], ())

    def _way(self, place: Place, given: Place) -> set[str] | None:
        """The layers on the ways from what a block is given to a value; None where there is no way."""
        layers, seen, stack, reached = set[str](), {place}, [place], False
        while stack:
            now = stack.pop()
            if now == given:
                reached = True
                continue
            if now in self._layers:
                layers.add(self._layers[now])
            for before in inputs_of(now[0]):
                if before not in seen:
                    seen.add(before)
                    stack.append(before)
        return layers if reached else None

    def _record(self) -> None:
        def place_of(value: Any) -> Place | None:
            known = isinstance(value, Tensor) and value.grad_fn is not None
            return (value.grad_fn, value.output_nr) if known else None

        def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._counts[name] += 1
            self._given[name] = place_of(args[0]) if len(args) == 1 and not kwargs else None

        def after(name: str, output: Any) -> None:
            place = place_of(output)
            self._returned[name] = None if place is None else (place, tuple(output.shape))
            if place is not None:
                self._makers.setdefault(place, name)

        handles = []
        for name, module in self._net.named_modules():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: after(name, output)))
        try:
            expose(self._net, self._auxiliary)
            with torch.enable_grad(), undrawn(self._net):
                torch.manual_seed(0)
                self._net(self._images.clone().requires_grad_().clone())  # a clone may be written to in place
        finally:
            for handle in handles:
                handle.remove()
