"""The default data: real images that come with the package."""

from __future__ import annotations

from importlib.resources import files

import torch
from safetensors.torch import load
from torch import Tensor

from robustcompress.data.pools import Source, pixel_pool
from robustcompress.data.splits import stratified, without

NOTE = "using scikit-learn's handwritten digits (1,797 real 8x8 images, shown as 3x32x32)"
LEVELS = 16


def read_digits() -> tuple[Tensor, Tensor]:
    """Read the embedded digits.

    Source: "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (Alpaydin and Kaynak
    1998; CC BY 4.0), the 1,797 test images as scikit-learn distributes them.

    Returns:
        Grey levels 0 to 16, uint8 `[1797, 8, 8]`, and labels 0 to 9, int64 `[1797]`.
    """
    data = load((files("robustcompress.data") / "digits.safetensors").read_bytes())
    return data["images"], data["labels"].long()


def digits_source(*, default: bool, image_size: int | None) -> Source:
    """Return the digits with their fixed test fifth (359 images, stratified, the same for every seed).

    Each 8x8 pixel becomes a block of 4x4 equal ones, and 17 grey levels become 0 to 255 in three equal
    channels: nothing is interpolated, so the original image can be read back.
    """
    levels, labels = read_digits()
    pixels = (levels.float() * (255 / LEVELS)).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    test = stratified(labels, round(len(labels) / 5), seed=0)
    train = without(len(labels), test)
    return Source(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train=pixel_pool(pixels[train], labels[train], image_size=image_size),
        test=pixel_pool(pixels[test], labels[test], image_size=image_size),
        notes=((f"no data given: {NOTE}" if default else NOTE),),
    )
