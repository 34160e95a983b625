"""Which epoch of a phase is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

SELECTIONS = 8
"""About so many epochs of a selecting phase are attacked on the validation split: from 8 to 15, and all of fewer."""


class Selection:
    """Keeps the best epoch of a phase by its robust accuracy on the validation split.

    Args:
        epochs: How many epochs the phase has.
        averaged: The network that is judged and kept.
        validate: Its clean and robust accuracy; None where there are no images for it, and then nothing is selected.

    Attributes:
        best: Robust and clean accuracy of the best epoch so far.
        state: Its weights; None before the first look.
    """

    def __init__(
        self,
        epochs: int,
        averaged: Callable[[], nn.Module],
        validate: Callable[[], tuple[float, float]] | None,
    ) -> None:
        self._epochs = epochs
        self._averaged = averaged
        self._validate = validate
        self.best: tuple[float, ...] = (-1.0, -1.0)
        self.state: dict[str, torch.Tensor] | None = None

    def look(self, record: dict[str, Any]) -> None:
        """Judge the network as it is at the end of an epoch; what is found goes into the epoch's record."""
        remaining = self._epochs - record["epoch"]
        every = max(1, self._epochs // SELECTIONS)
        if self._validate is None or remaining % every:
            return
        clean, robust = self._validate()
        record |= {"val_clean": clean, "val_robust": robust}
        if (robust, clean) >= self.best:  # the later of equals: it has been averaged longer
            self.best = (robust, clean)
            self.state = copy.deepcopy(self._averaged().state_dict())

    def restore(self) -> None:
        """Give the network the weights of the best epoch."""
        if self.state is not None:
            self._averaged().load_state_dict(self.state)
