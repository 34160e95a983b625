"""Networks that a file asks for: whether they fit into memory is known before they are built."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robustcompress.errors import ResultError
from robustcompress.models import ModelSpec
from robustcompress.structure import AnyEdit, StructuralEditor
from robustcompress.untrusted import room

PLENTY = 1 << 26
"""Numbers that a reference may hold whatever is left of it: a quarter of a gigabyte."""

SHRUNK = 100
"""A larger reference has at most so many times the numbers of the network that is left."""

GROWN = 4
"""On the way no network has more than so many times the numbers of the reference, or of the network that is left."""

MOST_EDITS = 10_000

MOST_TENSORS = 10_000


def build_bounded(spec: ModelSpec, image_shape: Sequence[int], kept: int) -> nn.Module:
    """Build the network that a file names, if it fits.

    It is built without memory first (on the meta device), and shown two images there. What cannot be built so, because
    it computes with its tensors, is only counted while it is built.

    Args:
        spec: As the file says it; imports no code.
        image_shape: (C, H, W), as the file says it.
        kept: Numbers in the file with the weights.

    Raises:
        ResultError: It holds so many more that it cannot have been the reference, or to look at such images takes more
            memory than there is.
    """
    most = min(max(PLENTY, SHRUNK * kept), room() // 4)
    said = f"it has more than {most} numbers, or {MOST_TENSORS} tensors, and {kept} numbers are left of it"
    with contextlib.suppress(_UnknownError), _meta(), _counted(most, said):
        twin = spec.build()
        with torch.no_grad(), _Counting(room()):
            twin.eval()(torch.empty(2, *image_shape))
    with _counted(most, said):
        return spec.build()


def check_model(spec: ModelSpec) -> None:
    """Refuse a network that a recipe names and that cannot be built, or does not fit into memory.

    Raises:
        InputError: The name or an argument does not exist.
        ResultError: It is too large.
    """
    most = room() // 4
    said = f"it has more than {most} numbers, which is more than fits into memory, or {MOST_TENSORS} tensors"
    with contextlib.suppress(_UnknownError), _meta(), _counted(most, said):
        spec.build()
        return
    with _counted(most, said):
        spec.build()


def replay_bounded(model: nn.Module, image_shape: Sequence[int], edits: Sequence[AnyEdit], kept: int | None) -> None:
    """Carry out the edits that a file names on the reference, in place.

    Args:
        model: The reference.
        image_shape: (C, H, W).
        edits: In their order.
        kept: Numbers in the file with the weights; None for no limit.

    Raises:
        ResultError: There are too many edits.
        InputError: An edit does not fit, or asks for more channels than such a network has on its way.
    """
    if len(edits) > MOST_EDITS:
        raise ResultError(f"there are {len(edits)} edits, more than {MOST_EDITS}")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    most = None if kept is None else GROWN * max(numbers, kept)
    with torch.random.fork_rng(devices=[]):
        StructuralEditor.replay(model, torch.zeros(2, *image_shape), edits, most=most)


class _UnknownError(Exception):
    """It cannot be done without memory; whatever is wrong shows when it is done with."""


@contextmanager
def _meta() -> Iterator[None]:
    try:
        with torch.device("meta"):
            yield
    except ResultError:
        raise
    except Exception as error:
        raise _UnknownError from error


@contextmanager
def _counted(most: int, said: str) -> Iterator[None]:
    """Stop the building of a network that holds too many numbers with an error that says so.

    Layers register a parameter before they fill it, and memory that was not written to is not taken yet.
    """
    numbers = tensors = 0

    def hook(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal numbers, tensors
        del module
        if parameter is None:
            return
        numbers, tensors = numbers + parameter.numel(), tensors + 1
        if numbers > most or tensors > MOST_TENSORS:
            raise ResultError(said)

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what operations give, all of which tracing keeps."""

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            self._left -= sum(t.numel() * t.element_size() for t in tree_leaves(found) if isinstance(t, Tensor))
        if self._left < 0:
            raise ResultError("to look at two images of its size takes more memory than is free")
        return found
