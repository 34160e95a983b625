"""For which image size a network was made, and whether it takes another."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from robustcompress.errors import InputError

OURS, IMAGENET, INCEPTION = 32, 224, 299


@dataclass(frozen=True, slots=True)
class ImageSize:
    """The image size that a network was made for.

    Attributes:
        height: In pixels.
        width: In pixels.
        argument: The argument of the factory that builds the network for another size; empty where a network does not
            depend on it.
    """

    height: int
    width: int
    argument: str = ""

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def image_size(model: nn.Module) -> ImageSize:
    """Return the size that a network was made for.

    That of a network of timm is what timm says of it, or what it was built for. Networks of torchvision take the size
    at which their accuracy is usually given, 224 (Inception 299). All others are taken to be made for 32.
    """
    origin = type(model).__module__.partition(".")[0]
    if origin == "timm":
        return _of_timm(model)
    if origin == "torchvision":
        built_for = getattr(model, "image_size", None)
        if isinstance(built_for, int):  # a vision transformer, which learns as many positions as it has patches
            return ImageSize(built_for, built_for, "image_size")
        size = INCEPTION if type(model).__name__ == "Inception3" else IMAGENET
        return ImageSize(size, size)
    return ImageSize(OURS, OURS)


def _of_timm(model: nn.Module) -> ImageSize:
    config = getattr(model, "pretrained_cfg", None) or {}
    argument = "img_size" if config.get("fixed_input_size") else ""
    for owner in (getattr(model, "patch_embed", None), model):
        built_for = getattr(owner, "img_size", None)
        if isinstance(built_for, tuple | list) and len(built_for) == 2:
            return ImageSize(int(built_for[0]), int(built_for[1]), argument)
    height, width = (config.get("input_size") or (3, IMAGENET, IMAGENET))[1:]
    return ImageSize(int(height), int(width), argument)


def check_image_size(model: nn.Module, height: int, width: int) -> None:
    """Refuse a network that was built for another image size and does not run on this one.

    Args:
        model: The network; a copy is run on one image.
        height: Of the images, in pixels.
        width: Of the images, in pixels.

    Raises:
        InputError: It does not run; the message names the argument of the factory that builds it for this size. Other
            reasons for which a network may not run are left to whoever runs it.
    """
    made_for = image_size(model)
    if not made_for.argument or (made_for.height, made_for.width) == (height, width):
        return
    parameter = next(model.parameters())
    image = torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad():
            copy.deepcopy(model).eval()(image)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        change = f"{made_for.argument}={height if height == width else (height, width)}"
        raise InputError(
            f"the model was built for images of {made_for} and does not run on {height}x{width}: build it with "
            f"{change} (--model-arg {change}), or give it images of {made_for}"
        ) from error
