"""Inception-style crops (Szegedy et al., CVPR 2015): a part of random area and shape, scaled, and mirrored or not.

Which part is a pure function of numbers drawn ahead, so that it does not depend on who cuts it out, or when.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

AREA = (0.08, 1.0)
"""Share of the image that a crop covers."""

RATIO = (3 / 4, 4 / 3)
"""Width over height of a crop."""

TRIES = 10
DRAWN = 2 * TRIES + 3
"""Numbers drawn for each image: area and shape of each try, place of the crop, and whether it is mirrored."""


def draw_crops(count: int, generator: torch.Generator) -> Tensor:
    """Draw what `crop_box` needs for `count` images: float64 `[count, DRAWN]` in [0, 1)."""
    return torch.rand(count, DRAWN, generator=generator, dtype=torch.float64)


def crop_box(width: int, height: int, drawn: Sequence[float]) -> tuple[int, int, int, int]:
    """Left, top, right and lower edge of the crop of an image of this size, in pixels.

    As torchvision's `RandomResizedCrop` draws it: area and logarithm of the shape are uniform; what does not fit into
    the image is drawn again, and after `TRIES` the largest central part of an allowed shape is taken.

    Args:
        width: Of the image.
        height: Of the image.
        drawn: `DRAWN` numbers in [0, 1).
    """
    low, high = (math.log(ratio) for ratio in RATIO)
    for at in range(0, 2 * TRIES, 2):
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * drawn[at])
        shape = math.exp(low + (high - low) * drawn[at + 1])
        wide, tall = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int((width - wide + 1) * drawn[-3]), int((height - tall + 1) * drawn[-2])
            return left, top, left + wide, top + tall
    wide, tall = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


def mirrored(drawn: Sequence[float]) -> bool:
    """Whether an image is mirrored left to right, which half of them are."""
    return drawn[-1] < 0.5


def resized_crops(pixels: Tensor, drawn: Tensor) -> Tensor:
    """Cut a crop out of each of equally large images in memory, scaled to their own size (bilinear).

    Args:
        pixels: uint8 `[B, C, H, W]`.
        drawn: float64 `[B, DRAWN]`, on the CPU.

    Returns:
        uint8 `[B, C, H, W]`.
    """
    if not len(pixels):
        return pixels
    height, width = pixels.shape[2:]
    rows = drawn.tolist()
    edges = torch.tensor([crop_box(width, height, row) for row in rows], dtype=torch.float32, device=pixels.device)
    flip = torch.tensor([mirrored(row) for row in rows], device=pixels.device)
    # Places of the crop's pixel centres in the image, of which grid_sample wants -1 to 1 from edge to edge.
    across = (torch.arange(width, device=pixels.device) + 0.5) / width
    across = torch.where(flip[:, None], 1 - across, across)
    down = ((torch.arange(height, device=pixels.device) + 0.5) / height).expand(len(rows), -1)
    x = 2 * (edges[:, :1] + across * (edges[:, 2:3] - edges[:, :1])) / width - 1
    y = 2 * (edges[:, 1:2] + down * (edges[:, 3:] - edges[:, 1:2])) / height - 1
    grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1)
    cut = F.grid_sample(pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return cut.round_().clamp_(0, 255).to(torch.uint8)
