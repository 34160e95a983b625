"""The named data sets, through torchvision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustcompress.data.pools import Pool, Source, pixel_pool
from robustcompress.distributed import launched
from robustcompress.errors import Problems

# The class in torchvision.datasets, and the values of its split argument for training and test.
_SETS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "svhn": ("SVHN", {"split": "train"}, {"split": "test"}),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}),
}

VISION_NAMES = tuple(_SETS)


def vision_source(
    name: str, problems: Problems, *, root: str | Path | None, download: bool, image_size: int | None
) -> Source | None:
    """Open one of `VISION_NAMES`, or add to `problems` how to get it.

    28x28 images get a border of two zeros on each side; grey is repeated in three channels.

    Args:
        name: One of `VISION_NAMES`.
        problems: Where absence is noted.
        root: Directory that holds, or will hold, the files; `data` when None.
        download: Fetch what is absent.
        image_size: Resize to this many pixels a side.
    """
    import torchvision.datasets

    root = Path("data" if root is None else root)
    kind, train, test = _SETS[name]
    dataset_class = getattr(torchvision.datasets, kind)
    try:
        with _in_turn(root) if download else nullcontext():
            opened = [dataset_class(str(root), download=download, **split) for split in (train, test)]
    except ImportError as error:
        problems.add(f"{name} needs a package that is not installed: {error}")
    except (RuntimeError, OSError) as error:
        remedy = (
            f"could not be downloaded to {str(root)!r} ({error})"
            if download
            else f"is not in {str(root)!r}: pass download=True (--download), or root=DIRECTORY"
        )
        problems.add(f"{name} {remedy}")
    else:
        pools = [_pool(dataset, image_size) for dataset in opened]
        return Source(name=name, classes=_classes(opened[0]), train=pools[0], test=pools[1])
    return None


@contextmanager
def _in_turn(root: Path) -> Iterator[None]:
    """Have the processes of a machine fetch one after the other: the first fetches, and the others find it there."""
    if not launched() or sys.platform == "win32":
        yield
        return
    import fcntl

    root.mkdir(parents=True, exist_ok=True)
    with (root / ".download.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _pool(dataset: Any, image_size: int | None) -> Pool:
    pixels = torch.as_tensor(dataset.data)
    labels: Tensor = torch.as_tensor(dataset.labels if hasattr(dataset, "labels") else dataset.targets)
    if pixels.ndim == 3:
        pixels = pixels.unsqueeze(1)
    elif pixels.shape[1] != 3:
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.shape[2:] == (28, 28):
        pixels = F.pad(pixels, (2, 2, 2, 2))
    return pixel_pool(pixels, labels, image_size=image_size)


def _classes(dataset: Any) -> tuple[str, ...]:
    return tuple(getattr(dataset, "classes", [str(digit) for digit in range(10)]))
