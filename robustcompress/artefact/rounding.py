"""What a file sees of an image, and adversarial images that stay in the ball after it has been rounded."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustcompress.errors import InputError
from robustcompress.robust import ThreatModel

PixelType = Literal["float32", "float16", "uint8"]

LEVELS = 255
"""Steps between black and white in a file that reads bytes."""


def seen(images: Tensor, kind: PixelType) -> Tensor:
    """The images as a file with this type of pixels sees them.

    Args:
        images: Float [N, C, H, W] in [0, 1].
        kind: What the file reads.

    Returns:
        Float32, same shape.
    """
    images = images.float()
    if kind == "uint8":
        return images.mul(LEVELS).round_().clamp_(0, LEVELS).div_(LEVELS)
    return images.half().float() if kind == "float16" else images


def within(x_adv: Tensor, x: Tensor, threat: ThreatModel, kind: PixelType) -> Tensor:
    """Bring adversarial images into the ball so that what the file sees of them lies in it, too.

    Rounding to the nearest value may leave the ball; where it does, values are rounded towards the original.

    Args:
        x_adv: Any images, [N, C, H, W]; a value that is not finite is replaced by the original's.
        x: The originals, as the file sees them.
        threat: What the adversary may do.
        kind: What the file reads.

    Returns:
        Float32 [N, C, H, W]: fed to the file, they are not changed any more.
    """
    x_adv = threat.project(torch.where(x_adv.isfinite(), x_adv, x), x)
    if kind == "uint8":
        steps = (x_adv - x).mul_(LEVELS)
        origin = x.mul(LEVELS).round_()
        near = steps.round()
        if threat.norm == "linf":
            most = int(threat.limit * LEVELS)
            near = near.clamp_(-most, most)
        else:
            outside = threat.size(x + near / LEVELS, x) > threat.limit
            near[outside] = steps[outside].trunc()
        return origin.add_(near).clamp_(0, LEVELS).div_(LEVELS)
    if kind == "float16":
        near = x_adv.half()
        further = (near.float() - x).abs() > (x_adv - x).abs()
        back = torch.where(x > near.float(), 1, -1).to(torch.int16)
        # Of numbers that are not negative the next one has the next bit pattern.
        return torch.where(further, (near.view(torch.int16) + back).view(torch.half), near).float()
    return x_adv


def check_visible(threat: ThreatModel, kind: PixelType) -> None:
    """Raise InputError where a file that reads bytes cannot see any perturbation of this threat."""
    if kind == "uint8" and threat.eps * (1 + 1e-5) < 1 / LEVELS:
        raise InputError(f"eps={threat.eps:g}: the file reads bytes, which differ by 1/255 at least; give eps of 1/255")
