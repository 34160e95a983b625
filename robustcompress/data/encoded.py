"""Encoded images where they lie: files, or members of tar archives. Known by name and size; read one at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from robustcompress.data.decoding import DamagedImageError, decoded, header
from robustcompress.data.memory import processors
from robustcompress.errors import InputError, Problems
from robustcompress.untrusted import room

LISTED = 5
"""So many files are named of those that something is wrong with."""

_HEADER = 1 << 14  # bytes that nearly always hold what an image says of its size
_LARGEST = 1 << 28  # bytes of an encoded image: more is no photograph
_CHUNK = 64

# Below this many pixels the interpreter's lock makes several threads slower than one (measured).
_SMALL = 96 * 96


class Encoded(Protocol):
    """Encoded images that can be read in any order, by several threads at a time."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def name(self, index: int) -> str:
        """What to call one in messages."""
        ...

    def size(self, index: int) -> int:
        """Bytes of one."""
        ...

    def read(self, index: int, most: int | None = None) -> bytes:
        """The bytes of one, or its first `most`."""
        ...

    def digest(self, indices: Iterable[int]) -> bytes:
        """SHA-256 over names (below the directory that was asked for) and sizes of some, in that order."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Files:
    """Image files of a directory.

    Attributes:
        root: The directory.
        names: Of the files below it, with `/` between.
        sizes: int64 `[N]`, bytes of each.
    """

    root: str
    names: Sequence[str]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """See `Encoded.name`: the path."""
        return f"{self.root}/{self.names[index]}"

    def size(self, index: int) -> int:
        """See `Encoded.size`."""
        return int(self.sizes[index])

    def read(self, index: int, most: int | None = None) -> bytes:
        """See `Encoded.read`."""
        return read_part(self.name(index), self.name(index), 0, self.size(index), most)

    def digest(self, indices: Iterable[int]) -> bytes:
        """See `Encoded.digest`."""
        return digest_of((self.names[i], int(self.sizes[i])) for i in indices)


def digest_of(items: Iterable[tuple[str, int]]) -> bytes:
    """SHA-256 over names and sizes."""
    digest = hashlib.sha256()
    for name, size in items:
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.digest()


def read_part(path: str, name: str, offset: int, size: int, most: int | None) -> bytes:
    """Read `size` bytes of a file from `offset` on, or the first `most` of them.

    Raises:
        DamagedImageError: There are not as many, or they cannot be read.
    """
    if size > _LARGEST:
        raise DamagedImageError(f"{name} has {size / 1e6:.0f} MB, more than an image has: remove or replace it")
    wanted = size if most is None else min(size, most)
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - a Path for each would cost a tenth of decoding
            file.seek(offset)
            content = file.read(wanted)
    except OSError as error:
        raise DamagedImageError(f"{name} cannot be read ({error.strerror or error}): put it back") from error
    if len(content or b"") < wanted:
        raise DamagedImageError(f"{name} is corrupt (it ends early): remove or replace it")
    return content


def size_of(images: Encoded, index: int) -> tuple[int, int]:
    """Width and height of one image, from its header.

    Raises:
        DamagedImageError: It is no image, or too large a one.
    """
    name = images.name(index)
    try:
        return header(images.read(index, _HEADER), name)
    except DamagedImageError:
        if images.size(index) <= _HEADER:
            raise
        return header(images.read(index), name)  # what it says of itself is long, or there is nothing to be found


def decode(images: Encoded, indices: Sequence[int], *, image_size: int | None = None) -> NDArray[np.uint8]:
    """Decode images, in a thread pool where they are large enough to gain by it.

    Args:
        images: Where they are.
        indices: Which.
        image_size: Scale the short side to this (bilinear) and crop the centre. None takes them as they are.

    Returns:
        RGB, uint8 `[M, H, W, 3]`.

    Raises:
        InputError: An image is corrupt, or sizes differ and no `image_size` is given; the files are named.
    """
    if not indices:
        return np.empty((0, image_size or 0, image_size or 0, 3), np.uint8)
    unreadable: set[str] = set()
    first, (width, height) = _probe(images, indices, unreadable)
    shape = (height, width) if image_size is None else (image_size, image_size)
    if (needed := 3 * len(indices) * math.prod(shape)) > (free := 2 * room()):
        raise InputError(
            f"{len(indices)} images of {width}x{height} ({first}, ...) take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: scale them (image_size=...)"
        )
    out = np.empty((len(indices), *shape, 3), np.uint8)
    others: dict[str, tuple[int, int]] = {}

    def work(start: int) -> None:
        for place in range(start, min(start + _CHUNK, len(indices))):
            index = indices[place]
            try:
                pixels = decoded(images.read(index), images.name(index), size=image_size)
            except DamagedImageError as error:
                unreadable.add(str(error))
                continue
            if pixels.shape != out.shape[1:]:
                others[images.name(index)] = (pixels.shape[1], pixels.shape[0])
                continue
            out[place] = pixels

    workers = 1 if width * height < _SMALL else min(8, processors())
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(0, len(indices), _CHUNK)))
    complain("cannot decode the images", unreadable, first, (width, height), others)
    return out


def complain(
    title: str,
    unreadable: Iterable[str],
    first: str,
    size: tuple[int, int],
    others: dict[str, tuple[int, int]],
) -> None:
    """Raise InputError where images were damaged, or had other sizes than the first.

    Args:
        title: What could not be done.
        unreadable: What is wrong with the damaged ones.
        first: Name of the first image.
        size: Its width and height.
        others: By name, width and height of those that differ.
    """
    problems, lines = Problems(title), sorted(unreadable)
    for line in lines[:LISTED]:
        problems.add(line)
    if len(lines) > LISTED:
        problems.add(f"{len(lines)} files are corrupt in all: remove or replace them")
    if others:
        name, (width, height) = min(others.items())
        smallest = min(*size, *(min(other) for other in others.values()))
        problems.add(
            f"sizes differ: {first} is {size[0]}x{size[1]}, {name} is {width}x{height}: "
            f"pass image_size={smallest} to make them equal"
        )
    problems.raise_if_any()


def _probe(images: Encoded, indices: Sequence[int], unreadable: set[str]) -> tuple[str, tuple[int, int]]:
    """Name and size of the first image whose header can be read."""
    for index in indices:
        try:
            return images.name(index), size_of(images, index)
        except DamagedImageError as error:
            unreadable.add(str(error))
    first = images.name(indices[0])
    raise DamagedImageError(f"cannot decode the images: none of {len(indices)} files can be read ({first}, ...)")
