"""What images and labels must be, whatever they come from; complaints say what was found and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robustcompress.errors import Problems


def check_pair(images: Tensor, labels: Tensor, problems: Problems, what: str) -> bool:
    """Note everything that is wrong with a pair; return whether it can be used."""
    before = len(problems.items)
    shape = list(images.shape)
    if images.ndim != 4:
        remedy = ": add the channel with unsqueeze(1)" if images.ndim == 3 else ""
        problems.add(f"{what}: images have shape {shape}, expected [N, 3, H, W]{remedy}")
    elif images.shape[1] not in (1, 3):
        channels_last = images.shape[3] in (1, 3)
        remedy = "permute(0, 3, 1, 2) puts the channels first" if channels_last else "pass grey (1) or RGB (3)"
        problems.add(f"{what}: images have shape {shape}, so {images.shape[1]} channels: {remedy}")
    _check_range(images, problems, what)
    if len(images) == 0:
        problems.add(f"{what}: there are no images")
    if labels.ndim != 1:
        remedy = "pass class numbers, as by labels.argmax(1)" if labels.ndim == 2 else "one number per image"
        problems.add(f"{what}: labels have shape {list(labels.shape)}, expected [N]: {remedy}")
    elif len(labels) != len(images):
        problems.add(f"{what}: {len(images)} images and {len(labels)} labels: there must be one per image")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        problems.add(f"{what}: labels are {labels.dtype}: pass integers 0..K-1, as by labels.long()")
    return len(problems.items) == before


def _check_range(images: Tensor, problems: Problems, what: str) -> None:
    if images.dtype == torch.uint8 or images.numel() == 0:
        return
    if not images.is_floating_point():
        problems.add(f"{what}: images are {images.dtype}: pass uint8 (0 to 255) or floats in [0, 1]")
        return
    low, high = (float(v) for v in images.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        problems.add(f"{what}: images hold NaN or infinite values")
    elif low < 0 or high > 1:
        remedy = (
            "divide by 255"
            if low >= 0 and 2 < high <= 255
            else "leave out the normalisation: it belongs into the model (robustcompress.models.Normalize)"
        )
        problems.add(f"{what}: images are outside [0, 1] ({low:.3g} to {high:.3g}): {remedy}")


def check_labels(labels: Sequence[tuple[str, Tensor]], classes: Sequence[str], problems: Problems) -> None:
    """Note labels that no class has, and classes that cannot be learnt.

    Args:
        labels: `(name, int64 [N])` of each pool, "train" first.
        classes: Class names.
        problems: Where it is noted.
    """
    for name, values in labels:
        if len(values) == 0:
            problems.add(f"{name}: there are no images")
        elif int(values.min()) < 0 or int(values.max()) >= len(classes):
            wrong = int(values.min()) if int(values.min()) < 0 else int(values.max())
            last = len(classes) - 1
            problems.add(f"{name}: label {wrong} is out of range: {len(classes)} classes have labels 0..{last}")
    train = labels[0][1]
    present, counts = torch.unique(train, return_counts=True)
    if len(present) == 1:
        problems.add(f"train: all images have label {int(present[0])}: at least two classes are needed")
        return
    count = dict(zip(present.tolist(), counts.tolist(), strict=True))
    sizes = [(name, count.get(label, 0)) for label, name in enumerate(classes)]
    few = [f"{name!r} ({size})" for name, size in sizes if size < 2]
    if few and len(present):
        listed = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        problems.add(f"train: fewer than 2 images of class {listed}: add some, or renumber the labels 0..K-1")
