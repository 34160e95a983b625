"""A ReLU whose gradient is that of its linear bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BoundedReLU(torch.autograd.Function):
    """The ReLU going forwards; going backwards, the line below or above it, whichever bounds from below (CROWN).

    Zhang et al. 2018 (section 3.2), with their adaptive lower line: slope 1 where the interval reaches further above
    zero than below, else 0. With `a` the coefficient of an output in what is bounded from below, the lower line is
    taken where `a >= 0` and the upper one where `a < 0`; then `a * relu(z)` is nowhere below `a * line(z)`. By how much
    it is above at the `z` of the forward pass goes, summed, to the gradient of `slack`. As all else is linear, the
    gradients at the images and at `slack` say the whole bound:

        f(x) >= f(x0) - gradient(slack) + gradient(x0) . (x - x0).

    The gradients can be differentiated again. What comes forwards must not be: its graph holds lines, not ReLUs. So
    `f(x0)`, and the `z` that gaps are taken at, come from a pass with real ReLUs.
    """

    @staticmethod
    def forward(ctx: Any, point: Tensor, z: Tensor, lower: Tensor, upper: Tensor, slack: Tensor) -> Tensor:
        """`relu(point)`, given `z`, which is equal to `point`, and its bounds, all [N, ...], and `slack`, [N]."""
        ctx.save_for_backward(z, lower, upper)
        return point.relu()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, Tensor]:
        """Gradients of `point` and of `slack`."""
        (a,) = gradients
        z, lower, upper = ctx.saved_tensors
        above, below = upper.clamp(min=0), lower.clamp(max=0)
        steep = torch.where(lower >= 0, torch.ones_like(above), above / (above - below).clamp(min=1e-30))
        offset = -steep * below
        flat = (upper > -lower).to(z.dtype)
        up = a >= 0
        slope = torch.where(up, flat, steep)
        line = slope * z + torch.where(up, torch.zeros_like(offset), offset)
        gap = a * (z.relu() - line)
        return a * slope, None, None, None, gap.flatten(1).sum(1)
