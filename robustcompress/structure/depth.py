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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.errors import nearest
from robustcompress.structure.branch import find_branch, silent
from robustcompress.structure.groups import inside
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.surgery import remove_module

TOLERANCE = 1e-9
"""Relative difference allowed in double precision; a sum with zero is exact, so this is for rounding elsewhere."""

GAIN = 16.0
"""How much larger all weights are on the second copy: bounds such as ReLU6's show there."""

LARGEST = 80.0
"""Decimal digits that all gains together may add: double precision ends at 308."""


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
    """

    def __init__(self, model: nn.Module, image_shape: Sequence[int]) -> None:
        self._quiet = _random_copy(model, 1.0)
        layers = sum(1 for module in model.modules() if any(True for _ in module.parameters(recurse=False)))
        # Turned round as well: what is positive on one copy by chance is negative on the other.
        self._loud = _random_copy(model, -min(GAIN, 10 ** (LARGEST / max(1, layers))))
        device = next(self._quiet.parameters()).device
        self._generator = torch.Generator().manual_seed(0)
        self._images = torch.rand((2, *image_shape), generator=self._generator, dtype=torch.float64).to(device)
        self._failure = ""
        try:
            self._calls, self._counts = self._observe()
        except Exception as error:  # such as a cast to single precision in forward()
            said = (str(error).splitlines() or [repr(error)])[0][:120]
            self._calls, self._counts = {}, Counter()
            self._failure = f"the network does not run in double precision, in which blocks are proven ({said})"

    def innermost(self) -> tuple[str, ...]:
        """Every block that can leave and holds no other that can, in the model's order."""
        names = [name for name, _ in self._quiet.named_modules()]
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
        call = self._calls[name]
        assert call.given is not None
        block = self._quiet.get_submodule(name)
        branch = find_branch(block, call.given)
        if not branch:
            return (
                "every way through it passes one of its layers: it has no identity shortcut, as which neither a "
                "projection counts nor a norm behind the sum"
            )
        # What the network gives a narrow block may be all zeros, which tell nothing.
        positive = torch.rand(call.given, generator=self._generator, dtype=torch.float64).to(self._images.device)
        with silent(block, branch), torch.no_grad():
            returns = _equal(block(positive.clone()), positive)
        silenced: dict[nn.Module, Tensor] = {}
        for network in (self._quiet, self._loud):
            inner = network.get_submodule(name)
            with silent(inner, branch), _watched(inner) as seen:
                silenced[network] = self._run(network)
            returns = returns and _equal(*seen)
        if not returns:
            return (
                "with its residual branch silent it does not return what it was given: something else changes it, "
                "such as an activation behind the sum where the input may be negative"
            )
        with _removed(self._quiet, name) as gone:
            if len(gone) < len(list(block.parameters())):
                return "the model holds some of its parameters elsewhere as well"
            try:
                output = self._run(self._quiet)
            except Exception as error:  # the model's own code may raise anything where a block is not what it was
                return f"the model does not run without it ({(str(error).splitlines() or [repr(error)])[0][:120]})"
        if not _equal(output, silenced[self._quiet]):
            return "without it the model does not compute what it computes with its residual branch silent"
        return ""

    @torch.no_grad()
    def _run(self, network: nn.Module) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            output: Tensor = network(self._images)
        return output

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
            self._run(self._quiet)
        finally:
            for handle in handles:
                handle.remove()
        return calls, counts


def _equal(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """Note what a module returns and what it was given, as it was before the module may have written to it."""
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())),
        module.register_forward_hook(lambda _, __, returned: seen.insert(0, returned.clone())),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


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


@torch.no_grad()
def _random_copy(model: nn.Module, gain: float) -> nn.Module:
    """A double-precision copy in eval mode whose parameters and statistics are random, of either sign.

    Weights of one sign would pass for something that the network always does: behind a scale that happens to be
    positive nothing is negative, until it is trained.
    """
    twin = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(1)

    def draw(tensor: Tensor, scale: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)

    for parameter in twin.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)  # the record of what is frozen ends at it
        draw(parameter, gain * ((2 / max(1, parameter[0].numel())) ** 0.5 if parameter.dim() > 1 else 1.0))
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            draw(module.running_mean, 1.0)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return twin
