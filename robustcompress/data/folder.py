"""Directories of image files: a folder per class, decoded once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from robustcompress.data.encoded import LISTED, Files
from robustcompress.data.pools import Pool, Source, stored_pool
from robustcompress.data.stored import Stored
from robustcompress.errors import Problems

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


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
        problems.add(f"{str(root)!r} has class folders that train/ has not: {', '.join(unknown[:LISTED])}")
    names: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(_files(str(root), name)) if name in found else []
        if not files and training:
            known = ", ".join(SUFFIXES[:4])
            problems.add(f"class folder {str(root / name)!r} holds no images ({known}, ...)")
        names += [file for file, _ in files]
        sizes += [size for _, size in files]
        labels += [label] * len(files)
    images = Files(str(root), names, np.array(sizes, np.int64))
    return stored_pool(Stored(images, torch.tensor(labels, dtype=torch.int64), image_size=image_size))


def _files(root: str, folder: str) -> Iterator[tuple[str, int]]:
    """Names below the root, and sizes, of the images in a folder and all below it."""
    # os.walk on strings: making a Path of every file would cost more than a tenth of decoding it.
    for directory, _, names in os.walk(f"{root}/{folder}", followlinks=True):
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                path = f"{directory}/{name}"
                try:
                    size = os.path.getsize(path)  # noqa: PTH202
                except OSError:  # a link to nowhere: reading it says so
                    size = 0
                yield path[len(root) + 1 :], size
