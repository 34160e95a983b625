"""Training some parameters of a network while the others rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Freeze parameters; on exit thaw those that were frozen here, also after an error."""
    thawed = [p for p in parameters if p.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


@contextmanager
def frozen_but(model: nn.Module, moving: Iterable[nn.Parameter]) -> Iterator[None]:
    """Freeze all parameters of a model but these, as `frozen` does."""
    known = {id(p) for p in moving}
    with frozen(p for p in model.parameters() if id(p) not in known):
        yield
