"""More training images beside a data set's own: generated or collected, labelled or not, from one file.

The file is the field's: an `.npz` with `image`, uint8 `[N, H, W, 3]`, and perhaps `label`, integers `[N]`. Nothing in
it is unpickled, and shapes are checked against the file's size before anything is allocated. Written by `numpy.savez`
its pixels stay on the disk and are mapped; written by `numpy.savez_compressed` they are unpacked into memory.
"""

from __future__ import annotations

import hashlib
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustcompress.data.images import Images
from robustcompress.errors import InputError, Problems, first_line
from robustcompress.untrusted import room

TEACHER = "teacher"
"""In place of labels: those that the teacher of the run gives."""

_LOCAL_HEADER = 30  # bytes of a zip's local header, before the name and the extra field that end it
_CHUNK = 4096
_DAMAGE = (RuntimeError, SyntaxError, TypeError, KeyError, OverflowError, MemoryError, zlib.error, lzma.LZMAError)
"""What zipfile, its decompressors and numpy's reader of headers raise beside what they say they do."""

_MEMBERS = 1000


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Extra:
    """Images of a second source, of which every training batch has a share.

    Attributes:
        name: The file's name.
        sha256: Of the whole file.
        pixels: uint8 `[N, H, W, 3]`; may lie on the disk.
        labels: int64 `[N]`; None where a network is still to give them.
        ratio: Share of each training batch, in (0, 1).
        labelled_by: "file", or whoever gives the labels: "teacher", or the directory of a result.
    """

    name: str
    sha256: str
    pixels: NDArray[np.uint8]
    labels: Tensor | None
    ratio: float
    labelled_by: str = "file"

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        """Read the images at `indices` (int64 `[M]`, on the CPU): uint8 `[M, 3, H, W]`."""
        read = np.ascontiguousarray(self.pixels[indices.numpy()])
        return torch.from_numpy(read).permute(0, 3, 1, 2).contiguous()

    def shares(self, batch_size: int) -> tuple[int, int]:
        """How many of a batch are the data set's own, and how many are these: the nearest to the ratio.

        Raises:
            InputError: One of the two would have none.
        """
        theirs = round(self.ratio * batch_size)
        if not 0 < theirs < batch_size:
            raise InputError(
                f"extra_ratio={self.ratio:g} of a batch of {batch_size} is {theirs} images: both sources need at least "
                "one; change the ratio or the batch size"
            )
        return batch_size - theirs, theirs

    def labelled(self, give: Callable[[Tensor], Tensor]) -> Extra:
        """The same with labels from `give`, which maps uint8 `[M, 3, H, W]` to int64 `[M]`; asked in chunks."""
        parts = [give(self.take(torch.arange(at, min(at + 256, len(self))))).cpu() for at in range(0, len(self), 256)]
        return replace(self, labels=torch.cat(parts))

    def told(self) -> dict[str, Any]:
        """What a result says of it: plain JSON, without places of this machine."""
        by = self.labelled_by if self.labelled_by in ("file", TEACHER) else Path(self.labelled_by).name
        told = {"name": self.name, "sha256": self.sha256, "images": len(self), "ratio": self.ratio, "labels": by}
        if self.labels is not None:
            told["labels_sha256"] = hashlib.sha256(self.labels.numpy().tobytes()).hexdigest()
        return told


def read_extra(
    path: str | Path,
    *,
    ratio: float,
    classes: int,
    image_size: tuple[int, int],
    pseudo_label: str | Path | None = None,
) -> Extra:
    """Read a file of extra images.

    Args:
        path: An `.npz` with `image` and perhaps `label`.
        ratio: Share of each training batch, in (0, 1).
        classes: Labels are below this.
        image_size: Height and width that the images must have.
        pseudo_label: Who gives labels in place of the file's: "teacher", or the directory of a result.

    Raises:
        InputError: It cannot be used; all that is wrong is listed.
    """
    path = Path(path)
    problems = Problems(f"extra={str(path)!r} cannot be used")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        problems.add(f"extra_ratio={ratio!r}: the share of each batch, between 0 and 1, such as 0.7")
    if not path.is_file():
        problems.add("there is no such file; make one with numpy.savez(path, image=..., label=...)")
        problems.raise_if_any()
    try:
        with zipfile.ZipFile(path) as archive:
            if len(archive.infolist()) > _MEMBERS:
                raise ValueError(f"it has {len(archive.infolist())} members")
            members = {Path(info.filename).stem: info for info in archive.infolist() if info.filename.endswith(".npy")}
            if "image" not in members:
                problems.add(f"it holds {', '.join(members) or 'no arrays'}, and no 'image': uint8 [N, H, W, 3]")
            if "label" not in members and pseudo_label is None:
                problems.add("it holds no 'label': add labels, or have a network give them (pseudo_label='teacher')")
            problems.raise_if_any()
            pixels = _images(path, archive, members["image"], image_size, problems)
            labels = None
            if pseudo_label is None:
                labels = _labels(archive, members["label"], pixels, classes, problems)
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, *_DAMAGE) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"extra={str(path)!r} cannot be read as an .npz ({first_line(error)})") from error
    problems.raise_if_any()
    assert pixels is not None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    by = "file" if pseudo_label is None else str(pseudo_label)
    return Extra(name=path.name, sha256=digest, pixels=pixels, labels=labels, ratio=float(ratio), labelled_by=by)


def refuse_known(extra: Extra, held_out: dict[str, Images]) -> None:
    """Raise InputError where extra images are images that the network is chosen or judged on, byte for byte.

    Args:
        extra: What would be trained on.
        held_out: By split: "val", "test".
    """
    problems = Problems(f"extra={extra.name!r} holds images that must not be trained on")
    known = {
        name: {_digest(image) for image in np.ascontiguousarray(images.pixels.cpu().permute(0, 2, 3, 1).numpy())}
        for name, images in held_out.items()
    }
    found: dict[str, list[int]] = {name: [] for name in held_out}
    for at in range(0, len(extra), _CHUNK):
        for number, image in enumerate(np.ascontiguousarray(extra.pixels[at : at + _CHUNK]), at):
            digest = _digest(image)
            for name, digests in known.items():
                if digest in digests:
                    found[name].append(number)
    for name, numbers in found.items():
        if numbers:
            first = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            problems.add(f"{len(numbers)} of them are {name} images (numbers {first}): take them out of the file")
    problems.raise_if_any()


def _digest(image: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _images(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: tuple[int, int], problems: Problems
) -> NDArray[np.uint8] | None:
    with archive.open(info) as file:
        shape, fortran, dtype = _header(file)
        start = file.tell()
        if dtype != np.uint8 or len(shape) != 4 or shape[3:] != (3,) or fortran:
            order = " in Fortran order" if fortran else ""
            problems.add(f"image is {dtype} {list(shape)}{order}: must be uint8 [N, H, W, 3]")
            return None
        if shape[0] == 0:
            problems.add("image holds no images")
        if shape[1:3] != size:
            problems.add(
                f"its images are {shape[1]}x{shape[2]}, and the data's are {size[0]}x{size[1]}: make them equal"
            )
        needed = math.prod(shape)
        if start + needed != info.file_size:
            problems.add(f"image says {list(shape)}, and holds {info.file_size - start} bytes: damaged")
        if problems.items:
            return None
        if info.compress_type == zipfile.ZIP_STORED:
            return np.memmap(path, np.uint8, "r", offset=_offset(path, info) + start, shape=shape)
        if needed > (free := room()):
            problems.add(
                f"its images unpack to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB may be taken: write it with "
                "numpy.savez, not savez_compressed, and it stays on the disk"
            )
            return None
        pixels = np.empty(shape, np.uint8)
        flat, at = memoryview(pixels.reshape(-1)), 0  # type: ignore[arg-type]
        while at < needed and (count := file.readinto(flat[at : at + (1 << 20)])):  # type: ignore[attr-defined]
            at += count
        if at < needed:
            raise ValueError("the file ends within the images")
        return pixels


def _labels(
    archive: zipfile.ZipFile,
    info: zipfile.ZipInfo,
    pixels: NDArray[np.uint8] | None,
    classes: int,
    problems: Problems,
) -> Tensor | None:
    with archive.open(info) as file:
        shape, _, dtype = _header(file)
        if dtype.kind not in "iu" or len(shape) != 1:
            problems.add(f"label is {dtype} {list(shape)}: must be integers [N]")
            return None
        if pixels is None:
            return None
        if shape[0] != len(pixels):
            problems.add(f"there are {len(pixels)} images and {shape[0]} labels: one for each")
            return None
        if info.file_size != file.tell() + shape[0] * dtype.itemsize:
            problems.add(f"label says {list(shape)}, and does not hold as many: damaged")
            return None
        values = np.frombuffer(file.read(shape[0] * dtype.itemsize), dtype).astype(np.int64)
    if len(values) and not 0 <= values.min() <= values.max() < classes:
        wrong = int(values.min()) if values.min() < 0 else int(values.max())
        problems.add(f"label {wrong} is out of range: {classes} classes have labels 0..{classes - 1}")
    return torch.from_numpy(values)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type of an array, of which nothing else is read.

    Raises:
        ValueError: It is no plain array.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are pickles: save plain arrays")
    return tuple(shape), bool(fortran), dtype


def _offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin; the local header has lengths of its own."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
    return info.header_offset + _LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
