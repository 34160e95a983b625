"""Images resident in memory; and the three splits of a data set, whose training images may lie elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robustcompress.errors import InputError, Problems

if TYPE_CHECKING:
    from robustcompress.data.extra import Extra
    from robustcompress.data.stored import Stored


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Labelled colour images, kept as bytes: a quarter of the memory of floats, and exactly what was decoded.

    Attributes:
        pixels: uint8 `[N, 3, H, W]`, contiguous, 0 to 255.
        labels: int64 `[N]`.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        problems = Problems("not a set of images")
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4 or self.pixels.shape[1] != 3:
            shape = list(self.pixels.shape)
            problems.add(f"pixels are {self.pixels.dtype} {shape}: must be uint8 [N, 3, H, W]")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            shape = list(self.labels.shape)
            problems.add(f"labels are {self.labels.dtype} {shape}: must be int64, one per image")
        problems.raise_if_any()
        object.__setattr__(self, "pixels", self.pixels.contiguous())
        object.__setattr__(self, "labels", self.labels.contiguous())

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Images:
        """Return the images at `indices` (int64 `[M]`), in that order."""
        indices = indices.to(self.labels.device)
        return Images(self.pixels[indices], self.labels[indices])

    def first(self, n: int) -> Images:
        """Return the first `n` images, or all when there are fewer.

        Raises:
            InputError: `n` is negative.
        """
        if n < 0:
            raise InputError(f"first({n}): the number of images cannot be negative")
        return Images(self.pixels[:n], self.labels[:n])

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(3, height, width)` of each image."""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def feed(self, digest: hashlib._Hash) -> None:
        """Have a digest take in number, shape, pixels and labels."""
        digest.update(str(list(self.pixels.shape)).encode())
        for tensor in (self.pixels, self.labels):
            digest.update(tensor.cpu().numpy().data)

    @property
    def classes_present(self) -> tuple[int, ...]:
        """The distinct labels, ascending."""
        return tuple(torch.unique(self.labels).tolist())

    def to(self, device: torch.device | str) -> Images:
        """Return the same images on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def as_float(self) -> Tensor:
        """Return float32 `[N, 3, H, W]` in [0, 1]: each byte divided by 255."""
        return self.pixels.to(torch.float32).div_(255)

    def __repr__(self) -> str:
        n, _, height, width = self.pixels.shape
        return f"Images({n} of 3x{height}x{width}, {len(self.classes_present)} classes)"


@dataclass(frozen=True, slots=True, eq=False)
class DataSplits:
    """Training, validation and test images of one data set.

    Attributes:
        name: The name or directory it was asked for by, or what it was made of.
        classes: Class names; label i is `classes[i]`.
        train: What weights are fitted to; in memory, or on the disk where there are too many of them.
        val: Held out of the training images, for any selection.
        test: For the final figures alone.
        notes: Lines that the user should read once, such as which data were taken in place of none.
        extra: More images for training alone, of which every batch has a share; None for none.
        asked: Arguments of `load_data` that give these images again, as plain data; None where nothing plain does.
    """

    name: str
    classes: tuple[str, ...]
    train: Images | Stored
    val: Images
    test: Images
    notes: tuple[str, ...] = ()
    extra: Extra | None = None
    asked: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        sides = {name: getattr(self, name).shape[1:] for name in ("train", "val", "test")}
        if len(set(sides.values())) > 1:
            said = ", ".join(f"{name} {width}x{height}" for name, (height, width) in sides.items())
            smallest = min(min(side) for side in sides.values())
            raise InputError(f"image sizes differ ({said}): pass image_size={smallest} to make them equal")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(3, height, width)` of every image."""
        return self.train.shape

    @property
    def sha256(self) -> str:
        """Hex digest over the pixels and labels of the three splits: equal data, equal digest; extra images apart.

        Of images on the disk names, sizes and labels stand for the pixels.
        """
        digest = hashlib.sha256()
        splits: tuple[tuple[str, Images | Stored], ...] = (
            ("train", self.train),
            ("val", self.val),
            ("test", self.test),
        )
        for name, images in splits:
            digest.update(name.encode())
            images.feed(digest)
        return digest.hexdigest()
