"""How much the loss rises when scores are moved as far as S2AP moves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustcompress.errors import InputError
from robustcompress.robust.attacks import kept_buffers
from robustcompress.structure.masks import ScoreMasks
from robustcompress.train import ScoreAscent


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharpness:
    """A loss at scores, and above them.

    Attributes:
        gamma: Radius of the ball, relative to the norm of each group's or layer's scores; 0 where no radius flips a
            bit.
        flips: Share of all mask bits that differ between the two places.
        loss_before: At the scores.
        loss_after: Above them.
    """

    gamma: float
    flips: float
    loss_before: float
    loss_after: float

    @property
    def rise(self) -> float:
        """L(s + z) - L(s). Negative where the gradient, which ignores what a swap does, led downwards."""
        return self.loss_after - self.loss_before


def sharpness(
    gates: ScoreMasks, loss: Callable[[], Tensor], *, gamma: float | None = None, flips: float = 0.01
) -> Sharpness:
    """L(s + z) - L(s) for the z of one ascent as S2AP makes it, of ||z|| = gamma ||s|| for each group or layer.

    It asks the same of scores that were learnt under S2AP and of scores that were not, so that both can be compared.

    Args:
        gates: Open gates; their scores get every bit back.
        loss: Computes a scalar loss through the network whose gates these are, on images attacked beforehand
            (`attacked_loss`); called twice, in the mode of the network.
        gamma: Radius, in (0, 1]; None for the smallest that flips the share `flips`.
        flips: Share of mask bits to flip, in (0, 1]; at least one unit is swapped for another.

    Returns:
        Both losses, with the radius and the share that it did flip.

    Raises:
        InputError: A radius or a share out of range.
    """
    if isinstance(flips, bool) or not isinstance(flips, int | float) or not 0 < flips <= 1:
        raise InputError(f"flips={flips!r}: must be a share in (0, 1], such as 0.01")
    ascent = ScoreAscent(gates, gamma=gamma, flips=flips)
    with kept_buffers(gates.model), ascent.raised(gates.model, loss), torch.no_grad():
        ascent.note(loss())
    return Sharpness(**ascent.read())
