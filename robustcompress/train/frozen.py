"""Training some parameters of a network while the others rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen_but(model: nn.Module, moving: Iterable[nn.Parameter]) -> Iterator[None]:
    """Freeze all parameters of a model but these; on exit thaw those that were frozen here, also after an error."""
    known = {id(p) for p in moving}
    frozen = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
