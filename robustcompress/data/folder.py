"""Directories of image files: a folder per class, decoded once."""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from robustcompress.data.pools import Pool, Source
from robustcompress.errors import InputError, Problems, first_line
from robustcompress.untrusted import room

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
"""What files are read as, whatever they are called: other readers of Pillow run programs, such as Ghostscript."""

MOST_PIXELS = 1 << 26
"""An image with more is taken for a decompression bomb: a few bytes that unpack to gigabytes."""

LONGEST_SIDE = 1 << 16

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")

# Below this many pixels the interpreter's lock makes several threads slower than one (measured).
_SMALL = 96 * 96
_CHUNK = 64
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, RuntimeError),
    *(AttributeError, MemoryError, struct.error, zlib.error),
)
"""What Pillow's readers raise on damaged files."""

_LISTED = 5


def folder_source(path: Path, problems: Problems, *, image_size: int | None) -> Source | None:
    """List a directory in the ImageFolder layout; no image is read yet.

    The layouts are `train/CLASS/file` with `test/` or `val/` beside it (with both, `val/` is used for
    validation; with `val/` alone it is the test set), and `CLASS/file`.

    Args:
        path: The directory.
        problems: Where all that is wrong with it is noted.
        image_size: Scale the short side to this and crop the centre.
    """
    folders = _folders(path)
    if "train" not in folders:
        if found := [name for name in ("test", "val") if name in folders]:
            problems.add(f"{str(path)!r} has {found[0]}/ and no train/: add it, or give the classes directly")
            return None
        inner = [name for name in folders if "train" in _folders(path / name)]
        if inner:
            meant = str(path / inner[0])
            problems.add(f"{str(path)!r} holds data sets, not classes; did you mean {meant!r}?")
            return None
    roots = {"train": path / "train" if "train" in folders else path}
    for name in ("val", "test"):
        if "train" in folders and name in folders:
            roots[name] = path / name
    if "test" not in roots and "val" in roots:
        roots["test"] = roots.pop("val")
    classes = _folders(roots["train"])
    if not classes:
        problems.add(f"{str(roots['train'])!r} has no folders: one per class is expected, with images inside")
        return None
    pools = {name: _list(root, classes, problems, image_size, training=name == "train") for name, root in roots.items()}
    note = f"{path}: no test/ folder, a fixed fifth of the images is the test set"
    return Source(
        name=str(path),
        classes=tuple(classes),
        train=pools["train"],
        val=pools.get("val"),
        test=pools.get("test"),
        notes=() if "test" in pools else (note,),
    )


def _folders(path: Path) -> list[str]:
    hidden = (".", "__")
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith(hidden))


def _list(root: Path, classes: Sequence[str], problems: Problems, image_size: int | None, *, training: bool) -> Pool:
    found = _folders(root)
    if unknown := [name for name in found if name not in classes]:
        problems.add(f"{str(root)!r} has class folders that train/ has not: {', '.join(unknown[:_LISTED])}")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = _files(root / name) if name in found else []
        if not files and training:
            known = ", ".join(SUFFIXES[:4])
            problems.add(f"class folder {str(root / name)!r} holds no images ({known}, ...)")
        paths += files
        labels += [label] * len(files)

    def read(indices: Tensor) -> Tensor:
        return decode([paths[i] for i in indices.tolist()], image_size=image_size)

    return Pool(labels=torch.tensor(labels, dtype=torch.int64), read=read)


def _files(folder: Path) -> list[str]:
    # os.walk on strings: making a Path of every file would cost more than a tenth of decoding it.
    return sorted(
        os.path.join(directory, name)  # noqa: PTH118
        for directory, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )


def decode(paths: Sequence[str], *, image_size: int | None = None) -> Tensor:
    """Decode image files to bytes, in a thread pool where the images are large enough to gain by it.

    Args:
        paths: Files that Pillow can read; any mode, turned into RGB.
        image_size: Scale the short side to this (bilinear) and crop the centre. None takes the images as
            they are.

    Returns:
        uint8 `[N, 3, H, W]`.

    Raises:
        InputError: A file is corrupt, or sizes differ and no `image_size` is given; the files are named.
    """
    if not paths:
        return torch.empty((0, 3, image_size or 0, image_size or 0), dtype=torch.uint8)
    unreadable: list[str] = []
    width, height, area = _probe(paths, unreadable)
    shape = (height, width) if image_size is None else (image_size, image_size)
    if (needed := 3 * len(paths) * math.prod(shape)) > (free := 2 * room()):
        raise InputError(
            f"{len(paths)} images of {width}x{height} ({paths[0]}, ...) take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: scale them (image_size=...)"
        )
    out = np.empty((len(paths), *shape, 3), np.uint8)
    other_sizes: list[tuple[str, tuple[int, int]]] = []
    workers = 1 if area < _SMALL else min(8, os.cpu_count() or 1)
    work = partial(_decode_chunk, paths, out, image_size, unreadable, other_sizes)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(0, len(paths), _CHUNK)))
    problems = Problems("cannot decode the images")
    for line in sorted(set(unreadable))[:_LISTED]:
        problems.add(line)
    if len(set(unreadable)) > _LISTED:
        problems.add(f"{len(set(unreadable))} files are corrupt in all: remove or replace them")
    if other_sizes:
        path, (other_width, other_height) = min(other_sizes)
        smallest = min(width, height, *(min(size) for _, size in other_sizes))
        problems.add(
            f"sizes differ: {paths[0]} is {width}x{height}, {path} is {other_width}x{other_height}: "
            f"pass image_size={smallest} to make them equal"
        )
    problems.raise_if_any()
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def _probe(paths: Sequence[str], unreadable: list[str]) -> tuple[int, int, int]:
    """Width, height and area of the first image whose header can be read."""
    for path in paths:
        try:
            with _opened(path) as image:
                return (*image.size, image.size[0] * image.size[1])
        except _DAMAGE as error:
            unreadable.append(_corrupt(path, error))
    raise InputError(f"cannot decode the images: none of {len(paths)} files can be read ({paths[0]}, ...)")


def _decode_chunk(
    paths: Sequence[str],
    out: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
    image_size: int | None,
    unreadable: list[str],
    other_sizes: list[tuple[str, tuple[int, int]]],
    start: int,
) -> None:
    for index in range(start, min(start + _CHUNK, len(paths))):
        path = paths[index]
        try:
            # Through memory: Pillow reads in many small pieces (measured at 32x32: 0.20 against 0.14 ms).
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                content = io.BytesIO(file.read())
            with _opened(content) as image:
                if image_size is not None:
                    image.draft("RGB", (image_size, image_size))  # JPEG decodes at 1/2, 1/4 or 1/8 for free
                image.load()
                picture = image if image.mode == "RGB" else image.convert("RGB")
            if image_size is not None:
                picture = _fit(picture, image_size)
        except _DAMAGE as error:
            unreadable.append(_corrupt(path, error))
            continue
        if picture.size != (out.shape[2], out.shape[1]):
            other_sizes.append((path, picture.size))
            continue
        out[index] = np.frombuffer(picture.tobytes(), np.uint8).reshape(out.shape[1:])


def _opened(source: str | io.BytesIO) -> Image.Image:
    """An image of which only the header was read.

    Raises:
        ValueError: It has more pixels than are believed; other errors where it is damaged.
    """
    from PIL import Image

    try:
        image = Image.open(source, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(first_line(error)) from error
    if image.width * image.height > MOST_PIXELS or max(image.size) > LONGEST_SIDE:
        image.close()
        raise ValueError(f"{image.width}x{image.height} pixels: larger than images are; a decompression bomb?")
    return image


def _fit(picture: Image.Image, size: int) -> Image.Image:
    from PIL import Image

    scale = size / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    if width * height > MOST_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height} pixels: so narrow an image has no centre to crop")
    left, top = (width - size) // 2, (height - size) // 2
    scaled = picture.resize((width, height), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size, top + size))


def _corrupt(path: str, error: Exception) -> str:
    # Pillow names the memory buffer, not the file, in what it says.
    reason = "not an image" if "cannot identify" in str(error) else str(error)
    return f"{path} is corrupt ({reason}): remove or replace it"
