"""Labelled images that stay on the disk: decoded when they are needed, and again each time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robustcompress.data.decoding import DamagedImageError, Pixels, cropped, decoded
from robustcompress.data.encoded import Encoded, complain, decode, size_of
from robustcompress.data.images import Images
from robustcompress.data.memory import processors

if TYPE_CHECKING:
    import hashlib

AHEAD = 2
"""Batches that are decoded ahead of the one in use: what bounds the memory."""

CHECKED = 20_000
"""Of so many images the headers are read before training; of more, so many of them, evenly spread."""

_CHUNK = 8  # images of one task: small enough that several threads share a batch
_THREADS = 8  # by default at most


class Stored:
    """Labelled images of one size that are decoded on demand; used like `Images`, of which `subset` makes some.

    Args:
        images: Where they are.
        labels: int64 `[N]`.
        indices: int64 `[N]`, which of them, in this order; all where None.
        image_size: The short side is scaled to this (bilinear) and the centre cropped; None takes them as they are.
        workers: Threads that decode; as many as there are processors, and no more than 8, where None. What comes out
            does not depend on it.

    Attributes:
        labels: int64 `[N]`.
        workers: As given.
    """

    def __init__(
        self,
        images: Encoded,
        labels: Tensor,
        *,
        indices: Tensor | None = None,
        image_size: int | None = None,
        workers: int | None = None,
    ) -> None:
        self._images, self._image_size = images, image_size
        self._indices = torch.arange(len(labels)) if indices is None else indices.cpu()
        self.labels = labels.cpu()
        self.workers = workers or min(_THREADS, processors())
        self._shape: tuple[int, int, int] | None = None
        self._first: Images | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Stored({len(self)} of {'x'.join(map(str, self.shape))}, on the disk)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(3, height, width)` of each image; without an image size the first one's, whose header is read.

        Raises:
            InputError: It is damaged.
        """
        if self._shape is None:
            width = height = self._image_size or 0
            if self._image_size is None and len(self):
                width, height = size_of(self._images, int(self._indices[0]))
            self._shape = 3, height, width
        return self._shape

    def part(self, indices: Tensor) -> Stored:
        """Those at `indices` (int64 `[M]`), in that order, still on the disk."""
        indices = indices.cpu()
        return Stored(
            self._images,
            self.labels[indices],
            indices=self._indices[indices],
            image_size=self._image_size,
            workers=self.workers,
        )

    def with_workers(self, workers: int | None) -> Stored:
        """The same, decoded by so many threads; by the default number where None."""
        return Stored(self._images, self.labels, indices=self._indices, image_size=self._image_size, workers=workers)

    def subset(self, indices: Tensor) -> Images:
        """Decode the images at `indices` (int64 `[M]`) into memory, in that order.

        Raises:
            InputError: Some are damaged; they are named.
        """
        indices = indices.cpu()
        pixels = decode(self._images, self._indices[indices].tolist(), image_size=self._image_size)
        return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), self.labels[indices])

    def first(self, n: int) -> Images:
        """Decode the first `n` images, or all when there are fewer; the last answer is kept in memory.

        Raises:
            InputError: Some are damaged.
        """
        n = min(n, len(self))
        if self._first is None or len(self._first) != n:
            self._first = self.subset(torch.arange(n))
        return self._first

    def to(self, device: torch.device | str) -> Stored:
        """The same: they are on the disk, whatever the device (`Images.to` moves them)."""
        return self

    def feed(self, digest: hashlib._Hash) -> None:
        """Have a digest take in names, sizes in bytes and labels, and how they are scaled; no file is read."""
        digest.update(f"on the disk, {len(self)}, {self._image_size} ".encode())
        digest.update(self._images.digest(self._indices.tolist()))
        digest.update(self.labels.numpy().data)

    def check(self) -> None:
        """Read the headers of at most `CHECKED` images.

        Raises:
            InputError: Some are damaged, or sizes differ and no image size was given; they are named.
        """
        if not len(self):
            return
        count = min(len(self), CHECKED)
        chosen = self._indices[torch.arange(count) * len(self) // count].tolist()
        unreadable: set[str] = set()
        sizes: dict[str, tuple[int, int]] = {}

        def look(index: int) -> None:
            try:
                sizes[self._images.name(index)] = size_of(self._images, index)
            except DamagedImageError as error:
                unreadable.add(str(error))

        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(look, chosen))
        first = self._images.name(chosen[0])
        size = sizes.get(first, (self.shape[2], self.shape[1]))
        others = {name: other for name, other in sizes.items() if other != size} if self._image_size is None else {}
        complain("cannot load the data", unreadable, first, size, others)

    def stream(self, batches: Iterable[tuple[Tensor, Tensor | None]], *, pinned: bool = False) -> Iterator[Tensor]:
        """Decode batch after batch in threads, some ahead of the one that is in use.

        Args:
            batches: Of each, which images (int64 `[B]`), and the numbers that say which crops of them (float64
                `[B, DRAWN]`); without these the images are scaled and their centres cropped, as `subset` does.
            pinned: In memory from which a GPU copies by itself.

        Yields:
            uint8 `[B, 3, H, W]`, in the order of `batches`.

        Raises:
            InputError: An image is damaged.
        """
        pending: deque[tuple[Tensor, list[Future[None]]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            for chosen, drawn in batches:
                pending.append(self._begin(pool, chosen, drawn, pinned))
                if len(pending) > AHEAD:
                    yield _finished(*pending.popleft())
            while pending:
                yield _finished(*pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _begin(
        self, pool: ThreadPoolExecutor, chosen: Tensor, drawn: Tensor | None, pinned: bool
    ) -> tuple[Tensor, list[Future[None]]]:
        _, height, width = self.shape
        out = torch.empty(len(chosen), height, width, 3, dtype=torch.uint8, pin_memory=pinned)
        pixels, indices = out.numpy(), self._indices[chosen.cpu()].tolist()
        rows = None if drawn is None else drawn.tolist()
        work = partial(self._decode, pixels, indices, rows)
        return out, [pool.submit(work, at) for at in range(0, len(indices), _CHUNK)]

    def _decode(self, out: Pixels, indices: list[int], drawn: list[Sequence[float]] | None, start: int) -> None:
        for place in range(start, min(start + _CHUNK, len(indices))):
            index = indices[place]
            content, name = self._images.read(index), self._images.name(index)
            if drawn is not None:
                out[place] = cropped(content, name, size=self.shape[1:], drawn=drawn[place])
                continue
            pixels = decoded(content, name, size=self._image_size)
            if pixels.shape != out.shape[1:]:
                said = f"{pixels.shape[1]}x{pixels.shape[0]}, and others are {self.shape[2]}x{self.shape[1]}"
                raise DamagedImageError(f"{name} is {said}: pass image_size={min(self.shape[1:])} to make them equal")
            out[place] = pixels


def _finished(out: Tensor, tasks: list[Future[None]]) -> Tensor:
    for task in tasks:
        task.result()
    return out.permute(0, 3, 1, 2)
