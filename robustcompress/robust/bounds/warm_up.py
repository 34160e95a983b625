"""What keeps bounds trainable while the radius grows: they shall not widen, nor shall ReLUs die."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustcompress.robust.bounds.interval import Interval

TOLERANCE = 0.5
"""What is fine: bounds twice as wide as those of the images, one side of the ReLUs with half of the other's weight."""


def widening(images: Interval, trail: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How many times wider than twice the images' bounds become on their way: the mean of the logarithms, at least 0.

    After L_tightness of Shi et al. (2021, section 4.3), whose term is `max(0, tau - r) / tau` of the inverse ratio `r`.
    Behind a few batch norms bounds begin thousands of times wider than those of the images; there that term is 1, and
    has no slope to speak of. The logarithm's slope is the same wherever bounds are too wide. Radii are means over all
    entries of a layer; those of the images count in standard deviations of their pixels, as they do in the paper.

    Args:
        images: The box that the network was given.
        trail: Bounds before each activation, of any shapes; see `margins`.
    """
    start = images.radius.mean() / images.value.std().clamp(min=_TINY)
    widths = [TOLERANCE * (upper - lower).mean() / 2 for lower, upper in trail]
    terms = [(width / start.clamp(min=_TINY)).clamp(min=_TINY).log().relu() for width in widths]
    return torch.stack(terms).mean() if terms else images.value.new_zeros(())


def imbalance(trail: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """How unlike are units that are always active and those that never are, from 0 for fine to 2: L_relu of the paper.

    Compared are the sums of the centres of either kind, and the sums of their squared distances from the mean centre.
    A layer that lacks a kind counts as wholly unbalanced, and has no gradient.

    Args:
        trail: See `widening`.
    """
    terms = []
    for lower, upper in trail:
        centre = (lower + upper) / 2
        # Shares do not know the scale, and squares of the bounds of deep networks would not be finite.
        centre = centre / centre.detach().abs().amax().clamp(min=torch.finfo(centre.dtype).tiny)
        active, inactive = (lower > 0).to(centre.dtype), (upper < 0).to(centre.dtype)
        apart = (centre - centre.mean()).square()
        terms.append(
            _below(_likeness((centre * active).mean(), -(centre * inactive).mean()))
            + _below(_likeness((apart * active).mean(), (apart * inactive).mean()))
        )
    return torch.stack(terms).mean() if terms else torch.zeros(())


_TINY = 1e-12


def _below(value: Tensor) -> Tensor:
    return (TOLERANCE - value).relu() / TOLERANCE


def _likeness(one: Tensor, other: Tensor) -> Tensor:
    """The smaller of two numbers that are not negative, as a share of the larger."""
    return torch.minimum(one, other) / torch.maximum(one, other).clamp(min=_TINY)
