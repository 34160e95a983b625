"""The residual branch of a block: found on the way back from what goes out, silenced, and let sound again."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SUMS = ("AddBackward", "SubBackward", "AddcmulBackward", "AddcdivBackward")
"""What is added to a parameter goes on where that parameter is zero; what is multiplied by it does not."""


def find_branch(block: nn.Module, shape: tuple[int, ...]) -> frozenset[str]:
    """Name the parameters that, at zero, silence everything but the identity shortcut.

    Autograd's record of one pass is walked back from the output, along what depends on the input. Each way ends at the
    first operation that takes parameters (a norm behind the last convolution, that convolution, a layer scale), and
    they belong to the branch; or it comes out at the input, around all of them.

    Args:
        block: A module on a copy of the network, in double precision; called once.
        shape: Of the tensor it is given.

    Returns:
        Names within the block; empty where no way leads around the layers, or nothing else does.
    """
    names = {id(parameter): name for name, parameter in block.named_parameters()}
    with torch.enable_grad():
        leaf = torch.rand(shape, dtype=torch.float64, device=next(block.parameters()).device).requires_grad_()
        returned: Tensor = block(leaf.clone())  # a clone may be written to in place
    if returned.grad_fn is None:
        return frozenset()
    reaching = _reaching(returned.grad_fn, leaf)
    found: set[str] = set()
    around = False
    seen, stack = {returned.grad_fn}, [returned.grad_fn]
    while stack:
        node = stack.pop()
        if _variable(node) is leaf:
            around = True
            continue
        own = [p for child in _inputs(node) if child not in reaching for p in _leaves(child)]
        met = {names[id(p)] for p in own if id(p) in names}
        found |= met
        if met and not node.name().startswith(_SUMS):
            continue
        for child in _inputs(node):
            if child in reaching and child not in seen:
                seen.add(child)
                stack.append(child)
    return frozenset(found) if around else frozenset()


def inputs_of(node: Any) -> list[tuple[Any, int]]:
    """What goes into one of autograd's nodes: nodes, and which of their outputs."""
    return [(function, number) for function, number in node.next_functions if function is not None]


def _inputs(node: Any) -> list[Any]:
    return [function for function, _ in inputs_of(node)]


def _variable(node: Any) -> Tensor | None:
    variable: Tensor | None = getattr(node, "variable", None)
    return variable


def _reaching(root: Any, leaf: Tensor) -> set[Any]:
    """The nodes through which the output depends on `leaf`."""
    users: dict[Any, list[Any]] = {root: []}
    stack, ends = [root], []
    while stack:
        node = stack.pop()
        if _variable(node) is leaf:
            ends.append(node)
        for child in _inputs(node):
            if child not in users:
                users[child] = []
                stack.append(child)
            users[child].append(node)
    reaching = set(ends)
    while ends:
        for user in users[ends.pop()]:
            if user not in reaching:
                reaching.add(user)
                ends.append(user)
    return reaching


def _leaves(root: Any) -> Iterator[Tensor]:
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if (variable := _variable(node)) is not None:
            yield variable
        for child in _inputs(node):
            if child not in seen:
                seen.add(child)
                stack.append(child)


@contextmanager
def silent(block: nn.Module, branch: Collection[str]) -> Iterator[None]:
    """Set a branch to zero; on exit it is as it was.

    Args:
        block: The block.
        branch: What `find_branch` found in it.
    """
    tensors = [block.get_parameter(name).data for name in branch]
    # Behind a silent convolution a norm without scale and shift still takes its mean away.
    tensors += [
        module.running_mean
        for module in block.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.affine and module.running_mean is not None
    ]
    kept = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    try:
        yield
    finally:
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.copy_(values)
