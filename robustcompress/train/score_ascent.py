"""One step up in scores, over the masks they stand for: what S2AP searches under, and what sharpness is measured by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustcompress.structure.masks import ScoreMasks
from robustcompress.train.ascent import Ascent

SMALLEST, LARGEST = 1e-6, 1.0
"""Between these radii one is looked for that flips the wanted share of the masks."""


class ScoreAscent(Ascent):
    """An ascent in the scores of gates, one ball a tensor, which counts the mask bits that it flips.

    Args:
        gates: Whose scores to move; their rule says what the masks are.
        gamma: Radius, in (0, 1]; None to choose it anew each epoch.
        flips: Share of mask bits to flip, where `gamma` is None.
        begins: As in `Ascent`.
    """

    label: ClassVar[str] = "gamma"
    _summed: ClassVar[tuple[str, ...]] = (*Ascent._summed, "_flipped")

    def __init__(self, gates: ScoreMasks, *, gamma: float | None, flips: float, begins: float = 0.0) -> None:
        super().__init__(gates.parameters(), LARGEST if gamma is None else gamma, begins=begins)
        self._gates = gates
        self._target = flips if gamma is None else None
        self._chosen = gamma is not None
        self._flipped: Tensor | float = 0.0

    def radius(self, steps: Sequence[Tensor]) -> float:
        """The radius given, or the one that flips the wanted share along the epoch's first `steps`."""
        if self._target is not None and not self._chosen:
            # On the step's first part, which is the first process's.
            self.gamma = self.world.broadcast(calibrate(lambda gamma: float(self._share(steps, gamma)), self._target))
            self._chosen = self.gamma > 0
        self._flipped = self._flipped + self._share(steps, self.gamma)
        return self.gamma

    def state_dict(self) -> dict[str, Any]:
        """As `Ascent.state_dict`, with the radius that the epoch has chosen."""
        return super().state_dict() | {"flipped": self._flipped, "gamma": self.gamma, "chosen": self._chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        super().load_state_dict(state)
        self._flipped, self.gamma, self._chosen = state["flipped"], float(state["gamma"]), bool(state["chosen"])

    def read(self) -> dict[str, Any]:
        """As `Ascent.read`, with the mean share of mask bits flipped; the next epoch chooses its radius anew."""
        count, flipped = int(self._count), float(self._flipped)
        record = super().read()
        self._flipped = 0.0
        self._chosen = self._target is None
        return record | {"flips": flipped / count} if record else {}

    def _share(self, steps: Sequence[Tensor], gamma: float) -> Tensor:
        """The share of mask bits, over all groups, that differ between the scores and `gamma * steps` above them."""
        scores = self._gates.scores
        moved = {name: s + gamma * step for (name, s), step in zip(scores.items(), steps, strict=True)}
        here, there = self._gates.kept(), self._gates.kept(moved)
        changed = [(here[name] != there[name]).sum() for name in scores]
        return torch.stack(changed).sum() / sum(values.numel() for values in scores.values())


def calibrate(share: Callable[[float], float], target: float) -> float:
    """The smallest radius that flips the target share of the masks.

    Args:
        share: From radius to share flipped; taken to rise with the radius.
        target: The share wanted; where no radius reaches it, as much as the largest radius flips.

    Returns:
        A radius from 1e-6 to 1 to five digits; 0 where the largest radius flips nothing.
    """
    most = share(LARGEST)
    if most == 0:
        return 0.0
    low, high = math.log(SMALLEST), math.log(LARGEST)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if share(math.exp(middle)) >= min(target, most) else (middle, high)
    return math.exp(high)
