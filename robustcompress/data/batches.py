"""Batches from images in memory or on the disk, augmented together and on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from robustcompress.data.crops import draw_crops, resized_crops
from robustcompress.data.extra import Extra
from robustcompress.data.images import Images
from robustcompress.data.stored import Stored
from robustcompress.distributed import Parts
from robustcompress.errors import Problems, nearest

Augment = Literal["none", "crop", "crop-flip", "resized-crop"]


def crop_flip(pixels: Tensor, rows: Tensor, columns: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """Shift each image within a border of zeros, and mirror some.

    One gather moves the whole batch: no loop over images, and no copy but the result.

    Args:
        pixels: `[B, C, H, W]` of any type.
        rows: int64 `[B]`, upper edge of the crop, 0 to `2 * padding` (`padding` leaves the image where it
            is).
        columns: int64 `[B]`, left edge likewise.
        flip: bool `[B]`, which images to mirror left to right after the crop.
        padding: Pixels of zeros on each side.

    Returns:
        `[B, C, H, W]`.
    """
    count, channels, height, width = pixels.shape
    padded = F.pad(pixels, (padding,) * 4)
    x = torch.arange(width, device=pixels.device)
    x = torch.where(flip[:, None], width - 1 - x, x) + columns[:, None]
    y = torch.arange(height, device=pixels.device) + rows[:, None]
    index = y[:, :, None] * (width + 2 * padding) + x[:, None, :]
    index = index.view(count, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(count, channels, height, width)


class Batches:
    """Iterates over float batches of `images`.

    Order, shifts and flips of a pass are a pure function of the generator's *initial* seed and the epoch; they are
    drawn on the CPU for the whole pass, so that they are the same on every device and for every starting batch. (The
    crops of "resized-crop" are drawn batch by batch, from seed, epoch and place.) Images on the disk are decoded by
    threads while the batches before are in use; where the augmentation is the same, batches are bit for bit those of
    the same images in memory. Each `for` loop is one epoch and counts `epoch` on, also when it is left early; a resumed
    run sets `epoch`, or calls `iterate`.

    Args:
        images: The images; those in memory are moved to `device` once.
        batch_size: Images in a batch; the last may hold fewer.
        device: Where the batches are wanted.
        augment: "crop" shifts by up to H/8 pixels over zeros (4 at 32x32); "crop-flip" also mirrors half of
            the images; "resized-crop" cuts out a part of random size and shape, scales it to the whole and mirrors
            half of them (see `crop_box`): of images on the disk a part of what is in the file, else of what is in
            memory.
        generator: Gives the seed. None keeps the order of `images`.
        shuffle: False keeps the order of `images` and draws only the augmentation.
        drop_last: Leave out a last batch that is not full.
        channels_last: Memory format of the batches.
        extra: Images of a second source, of which every batch has its share, behind the others. An epoch is one pass
            over `images` all the same. Which extra images come is a function of the seed and the epoch too: they are
            walked through in an order drawn anew for each pass over them, across epochs. Needs labels, `drop_last` and
            a generator.

    Raises:
        InputError: No images, no full batch, an unknown augmentation, an augmentation without a generator, or extra
            images that cannot be mixed in.
    """

    def __init__(
        self,
        images: Images | Stored,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        augment: Augment = "none",
        generator: torch.Generator | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        channels_last: bool = True,
        extra: Extra | None = None,
    ) -> None:
        problems = Problems("cannot make batches")
        if len(images) == 0:
            problems.add("there are no images")
        if batch_size < 1:
            problems.add(f"batch_size={batch_size}: must be positive")
        elif drop_last and extra is None and batch_size > len(images) > 0:
            problems.add(f"batch_size={batch_size} with drop_last: there are only {len(images)} images")
        if augment not in get_args(Augment):
            problems.add(f"augment={augment!r} does not exist{nearest(str(augment), get_args(Augment))}")
        elif augment != "none" and generator is None:
            problems.add(f"augment={augment!r} needs a generator to be seeded by")
        if extra is not None and (extra.labels is None or not drop_last or generator is None):
            problems.add("extra images need labels, drop_last and a generator")
        own, theirs = (batch_size, 0) if extra is None else problems.attempt(lambda: extra.shares(batch_size)) or (1, 0)
        if drop_last and extra is not None and own > len(images) > 0:
            problems.add(f"batch_size={batch_size}: {own} of each are of {len(images)} images")
        problems.raise_if_any()
        self._extra, self._own, self._theirs = extra, own, theirs
        self.images = images.to(device)
        self.device = images.pixels.device if isinstance(images, Images) else torch.device(device)
        self._labels = self.images.labels.to(self.device)
        self.batch_size = batch_size
        self.augment = augment
        self.seed = None if generator is None else generator.initial_seed()
        self.shuffle = shuffle and generator is not None
        self.drop_last = drop_last
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.epoch = 0

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self._own)
        return full + (rest > 0 and not self.drop_last)

    def size(self, index: int) -> int:
        """How many images batch `index` of an epoch has."""
        return min(self._own, len(self.images) - index * self._own) + self._theirs

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self.iterate(epoch)

    def iterate(self, epoch: int, *, start: int = 0, parts: Parts | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of one epoch, from batch `start` on.

        Args:
            epoch: Its number, from 0 on.
            start: The number of the first batch.
            parts: Decode and make only the images of this process's parts of each batch; None for all.

        Yields:
            `(x, y)`: float32 `[B, 3, H, W]` in [0, 1] and int64 `[B]`, on the device.
        """
        order, *moves = self._draw(f"{self.seed}/{epoch}", len(self.images))
        known, moves = order.to(self.device), [move.to(self.device) for move in moves]
        others, resident = self._others(epoch), isinstance(self.images, Images)
        cropping = self.augment == "resized-crop" and (resident or others is not None)
        for index, batch in zip(range(start, len(self)), self._read(order, epoch, start, parts), strict=False):
            own, theirs = self._cut(index, parts)
            y, shifts = self._labels[known[own]], [move[own] for move in moves]
            drawn = self._crops(epoch, index, parts) if cropping else None
            if drawn is not None and resident:
                batch = resized_crops(batch, drawn[: len(batch)])
            if others is not None:
                more, more_y, more_shifts = others(index, theirs)
                if drawn is not None:
                    more = resized_crops(more, drawn[len(batch) :])
                batch, y = torch.cat([batch, more]), torch.cat([y, more_y])
                shifts = [torch.cat(pair) for pair in zip(shifts, more_shifts, strict=True)]
            if self.augment in ("crop", "crop-flip"):
                batch = crop_flip(batch, shifts[0], shifts[1], shifts[2], padding=self._padding)
            yield batch.to(torch.float32, memory_format=self.memory_format).div_(255), y

    def _read(self, order: Tensor, epoch: int, start: int, parts: Parts | None) -> Iterator[Tensor]:
        """The pixels of the own images of batch after batch, uint8 `[B, 3, H, W]`, on the device.

        Those in memory are as they are there; the others are cropped already, where crops are wanted.
        """
        places = range(start, len(self))
        if isinstance(self.images, Images):
            known = order.to(self.device)
            yield from (self.images.pixels[known[self._cut(index, parts)[0]]] for index in places)
            return
        cropping = self.augment == "resized-crop"
        wanted = (
            (order[self._cut(index, parts)[0]], self._crops(epoch, index, parts) if cropping else None)
            for index in places
        )
        for pixels in self.images.stream(wanted, pinned=self.device.type == "cuda"):
            yield pixels.to(self.device, non_blocking=True).contiguous()

    def _cut(self, index: int, parts: Parts | None) -> tuple[slice, slice]:
        """Which places of the pass, and which of the extra images of batch `index`, are in these parts of it."""
        begin = index * self._own
        own = min(self._own, len(self.images) - begin)
        rows = self._rows(index, parts)
        return (
            slice(begin + min(rows.start, own), begin + min(rows.stop, own)),
            slice(max(rows.start, own) - own, max(rows.stop, own) - own),
        )

    def _rows(self, index: int, parts: Parts | None) -> slice:
        """Which images of batch `index` are in these parts."""
        return slice(0, self.size(index)) if parts is None else parts.rows(self.size(index))

    def _crops(self, epoch: int, index: int, parts: Parts | None) -> Tensor:
        """What says the crops of these parts of batch `index`."""
        drawn = draw_crops(self.size(index), _seeded(f"{self.seed}/{epoch}/crops/{index}"))
        return drawn[self._rows(index, parts)]

    def _others(self, epoch: int) -> Callable[[int, slice], tuple[Tensor, Tensor, list[Tensor]]] | None:
        """What gives the extra images of a batch: pixels, labels and moves, on the device."""
        extra, device = self._extra, self.device
        if extra is None:
            return None
        labels, count = extra.labels, len(self) * self._theirs
        assert labels is not None  # __init__ has looked
        walked = torch.arange(epoch * count, (epoch + 1) * count)  # places in an endless walk
        passes = walked // len(extra)
        order = torch.cat(
            [self._walk(number)[walked[passes == number] % len(extra)] for number in sorted(set(passes.tolist()))]
        )
        moves = self._draw(f"{self.seed}/{epoch}/extra", count)[1:]

        def give(index: int, mine: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
            part = slice(index * self._theirs + mine.start, index * self._theirs + mine.stop)
            chosen = order[part]
            return extra.take(chosen).to(device), labels[chosen].to(device), [move[part].to(device) for move in moves]

        return give

    def _walk(self, number: int) -> Tensor:
        """The order of one pass over the extra images."""
        assert self._extra is not None
        return torch.randperm(len(self._extra), generator=_seeded(f"{self.seed}/extra/{number}"))

    @property
    def _padding(self) -> int:
        return max(1, self.images.shape[1] // 8)

    def _draw(self, key: str, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Order, upper edges, left edges and flips of a pass, all `[count]`."""
        edges = 2 * self._padding + 1
        generator = torch.Generator() if self.seed is None else _seeded(key)
        order = torch.randperm(count, generator=generator)
        rows, columns = torch.randint(edges, (2, count), generator=generator)
        flip = torch.rand(count, generator=generator) < (0.5 if self.augment == "crop-flip" else 0.0)
        return order if self.shuffle else torch.arange(count), rows, columns, flip


def hashed_seed(key: str) -> int:
    """A seed for what has this name: neighbours must not share draws (seed 0, epoch 1 and seed 1, epoch 0)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


def _seeded(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(hashed_seed(key))
