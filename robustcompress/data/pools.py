"""A source before it is divided: labels are known, pixels are read only for the images that are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robustcompress.data.images import Images
from robustcompress.data.splits import deal
from robustcompress.data.stored import Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Labelled images that may not have been read yet.

    Attributes:
        labels: int64 `[N]`.
        read: Maps int64 indices `[M]` to uint8 pixels `[M, 3, H, W]`.
        stored: The same images where they lie, if that is on the disk.
    """

    labels: Tensor
    read: Callable[[Tensor], Tensor]
    stored: Stored | None = None

    def take(self, indices: Tensor) -> Images:
        """Read the images at `indices`, in an order that mixes the classes where they come class by class."""
        indices = indices[deal(self.labels[indices])]
        return Images(self.read(indices), self.labels[indices])

    def leave(self, indices: Tensor) -> Stored:
        """The images at `indices` in the same order as `take` has them, left on the disk, where they must be."""
        assert self.stored is not None
        return self.stored.part(indices[deal(self.labels[indices])])


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a name, directory or object gave: the pools it holds and what to say about them.

    Attributes:
        name: As in `DataSplits`.
        classes: Class names.
        train: Training images, from which missing pools are taken.
        val: Validation images where the source has its own.
        test: Test images where the source has its own.
        notes: As in `DataSplits`.
    """

    name: str
    classes: tuple[str, ...]
    train: Pool
    val: Pool | None = None
    test: Pool | None = None
    notes: tuple[str, ...] = ()


def stored_pool(images: Stored) -> Pool:
    """Make a pool of images on the disk."""
    return Pool(labels=images.labels, read=lambda indices: images.subset(indices).pixels, stored=images)


def pixel_pool(pixels: Tensor, labels: Tensor, *, image_size: int | None = None) -> Pool:
    """Make a pool of pixels in memory.

    Args:
        pixels: `[N, 1 or 3, H, W]`, uint8 or float in [0, 1]; floats are rounded to n/255, grey is repeated.
        labels: Integers `[N]`.
        image_size: Resize to this many pixels a side.
    """

    def read(indices: Tensor) -> Tensor:
        chosen = to_bytes(pixels[indices]).expand(-1, 3, -1, -1).contiguous()
        return chosen if image_size is None else resized(chosen, image_size)

    return Pool(labels=labels.long(), read=read)


def to_bytes(pixels: Tensor) -> Tensor:
    """Round floats in [0, 1] to bytes; bytes pass as they are."""
    if pixels.dtype == torch.uint8:
        return pixels
    return pixels.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def resized(pixels: Tensor, size: int) -> Tensor:
    """Scale uint8 `[N, C, H, W]` to a short side of `size` (bilinear, antialiased), and crop the centre."""
    height, width = pixels.shape[2:]
    if (height, width) == (size, size):
        return pixels
    short = min(height, width)
    shape = [round(height * size / short), round(width * size / short)]
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    parts = []
    for start in range(0, len(pixels), 1024):  # a data set in floats may not fit where its bytes do
        part = pixels[start : start + 1024].float()
        big = F.interpolate(part, size=shape, mode="bilinear", antialias=True, align_corners=False)
        crop = big[:, :, top : top + size, left : left + size]
        parts.append(crop.round().clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts) if parts else pixels.new_empty((0, pixels.shape[1], size, size))
