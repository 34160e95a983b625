"""Which blocks can leave a network: those that are the identity once their residual branch is silent.

For y = x + f(x) that is so by construction; behind an activation, y = relu(x + f(x)), only where x is known not to be
negative. Nothing of this is read off the code of a block. Its *branch* is what autograd recorded between what goes out
and what came in: the parameters met first on the way back. With these at zero the branch is silent, and then a block
that can leave must return what it was given, for any weights elsewhere; and the network must compute the same with the
identity in its place.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.errors import first_line, nearest
from robustcompress.structure.auxiliary import expose, tensors_of
from robustcompress.structure.branch import find_branch, silent
from robustcompress.structure.groups import inside
from robustcompress.structure.identity import Candidate, draw_anew, equal, identities
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.parts import containers_of, parts_of
from robustcompress.structure.surgery import remove_module


@dataclass(frozen=True, slots=True)
class Call:
    """How a module is called in one forward pass.

    Attributes:
        given: Shape of its only argument, the batch first; None where it has others, or none.
        returned: Shape of what it returns; None where that is no tensor.
    """

    given: tuple[int, ...] | None
    returned: tuple[int, ...] | None


class BypassProof:
    """Looks for blocks that can leave a network, and proves it, on copies with random weights.

    Args:
        model: The network; not touched.
        image_shape: (C, H, W).
        auxiliary: Layers that only training calls; they must compute what they computed, too.
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int], auxiliary: Sequence[str] = ()) -> None:
        self._quiet = expose(copy.deepcopy(model).double(), auxiliary)
        for parameter in self._quiet.parameters():
            parameter.grad = None
            parameter.requires_grad_(True)  # the record of what is frozen ends at it
        draw_anew(self._quiet, 1.0, seed=1)
        device = next(self._quiet.parameters()).device
        self._generator = torch.Generator().manual_seed(0)
        self._images = torch.rand((2, *image_shape), generator=self._generator, dtype=torch.float64).to(device)
        self._containers, self._parts = containers_of(self._quiet), list(parts_of(self._quiet))
        self._branches: dict[str, frozenset[str]] = {}
        self._identities: frozenset[str] = frozenset()
        self._failure = ""
        try:
            self._calls, self._counts = self._observe()
        except Exception as error:  # such as a cast to single precision in forward()
            self._calls, self._counts = {}, Counter()
            self._failure = (
                f"the network does not run in double precision, in which blocks are proven ({first_line(error, 120)})"
            )

    def innermost(self) -> tuple[str, ...]:
        """Every block that can leave and holds no other that can, in the model's order."""
        names = [name for name, _ in self._quiet.named_modules() if not self._inserted(name)]
        if not self._failure:
            self._judge(name for name in names if not self._unlike_a_block(name))
        found: list[str] = []
        for name in reversed(names):  # what lies in a module comes behind it
            if not any(inside(other, [name]) for other in found) and not self.complaint(name):
                found.append(name)
        return tuple(reversed(found))

    def complaint(self, name: str) -> str:
        """Why a module cannot leave; empty when it can."""
        modules = dict(self._quiet.named_modules())
        if name not in modules:
            blocks = (other for other in modules if not self._unlike_a_block(other))
            return f"there is no module {name!r}{nearest(name, blocks)}"
        reason = self._failure or self._unlike_a_block(name) or self._not_residual(name)
        return f"{name or 'the model'} ({type(modules[name]).__name__}) cannot be bypassed: {reason}" if reason else ""

    def _inserted(self, name: str) -> bool:
        """Whether it came with a part: a part that adds to what it is given is no block of the network's own."""
        return name in self._containers or inside(name, self._parts)

    def _unlike_a_block(self, name: str) -> str:
        module = self._quiet.get_submodule(name)
        if name == "":
            return "it is the whole model"
        if kind_of(module) is not None:
            return "it is a single layer; name the residual block that it is a part of"
        if not any(kind_of(inner) is not None for inner in module.modules()):
            return "it holds no layer"
        count = self._counts[name]
        if count != 1:
            return f"it is called {count} times in one forward pass; only a block that is called once can leave"
        call = self._calls[name]
        if call.given is None or call.returned is None:
            return "it must be given one tensor, by position, and return one"
        if call.given != call.returned:
            return (
                f"it turns a shape of {list(call.given[1:])} into {list(call.returned[1:])} (a stride or another "
                "width); only a block that keeps the shape can leave"
            )
        return ""

    def _not_residual(self, name: str) -> str:
        if name not in self._branches:
            self._judge([name])
        block, branch = self._quiet.get_submodule(name), self._branches[name]
        if not branch:
            return (
                "every way through it passes one of its layers: it has no identity shortcut, as which neither a "
                "projection counts nor a norm behind the sum"
            )
        if name not in self._identities:
            return (
                "with its residual branch silent it does not return what it was given: something else changes it, "
                "such as an activation behind the sum where the input may be negative"
            )
        with silent(block, branch):
            silenced = self._run()
        with _removed(self._quiet, name) as gone:
            if len(gone) < len(list(block.parameters())):
                return "the model holds some of its parameters elsewhere as well"
            try:
                output = self._run()
            except Exception as error:  # the model's own code may raise anything where a block is not what it was
                return f"the model does not run without it ({first_line(error, 120)})"
        if not equal(output, silenced):
            return "without it the model does not compute what it computes with its residual branch silent"
        return ""

    def _judge(self, names: Iterable[str]) -> None:
        candidates = {}
        for name in names:
            given = self._calls[name].given
            assert given is not None
            self._branches[name] = find_branch(self._quiet.get_submodule(name), given)
            if self._branches[name]:
                candidates[name] = Candidate(self._branches[name], given)
        self._identities |= identities(self._quiet, self._images, candidates)

    @torch.no_grad()
    def _run(self) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return torch.cat([output.flatten() for output in tensors_of(self._quiet(self._images))])

    def _observe(self) -> tuple[dict[str, Call], Counter[str]]:
        calls: dict[str, Call] = {}
        counts: Counter[str] = Counter()

        def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> None:
            counts[name] += 1
            only = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            calls[name] = Call(
                tuple(args[0].shape) if only else None, tuple(returned.shape) if isinstance(returned, Tensor) else None
            )

        handles = [
            module.register_forward_hook(
                lambda _, args, kwargs, returned, name=name: note(name, args, kwargs, returned), with_kwargs=True
            )
            for name, module in self._quiet.named_modules()
        ]
        try:
            self._run()
        finally:
            for handle in handles:
                handle.remove()
        return calls, counts


@contextmanager
def _removed(model: nn.Module, name: str) -> Iterator[list[nn.Parameter]]:
    """Have the identity in the place of a module; tells which parameters the model holds no longer."""
    old = model.get_submodule(name)
    places = [
        (parent, child) for parent in model.modules() for child, module in parent._modules.items() if module is old
    ]
    try:
        yield remove_module(model, name)
    finally:
        for parent, child in places:
            parent._modules[child] = old
