"""Tar archives of images, as WebDataset lays them out: `key.jpg` beside `key.cls` or `key.json`, many to an archive.

The archives' tables are read once; after that every image is as near as a file of its own, so that the order of a pass
is a permutation of all images, and a run can go on in the middle. (Reading shards from end to end, with a buffer that
shuffles, suits slow disks better, and gives neither.)
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from robustcompress.data.encoded import LISTED, digest_of, read_part
from robustcompress.data.folder import SUFFIXES
from robustcompress.data.memory import processors
from robustcompress.data.pools import Pool, Source, stored_pool
from robustcompress.data.stored import Stored
from robustcompress.errors import InputError, Problems, first_line, nearest

CLASSES = "classes.txt"
"""Beside the shards: names of the classes, one a line, in the order of their numbers."""

_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_LABELS = (".cls", ".json")
_KEYS = ("cls", "label", "class")  # of a .json
_LONGEST = 1 << 20  # bytes of a label: more is none
_DIGITS = 12  # of a class's number: more is a name, or nonsense


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """Members of tar archives; none is ever unpacked to the disk.

    Attributes:
        root: The directory of the archives.
        archives: Their names below it.
        members: Names of the images within.
        archive: int32 `[N]`, the archive of each.
        offsets: int64 `[N]`, where its bytes begin.
        sizes: int64 `[N]`, how many there are.
    """

    root: str
    archives: Sequence[str]
    members: Sequence[str]
    archive: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """See `Encoded.name`: archive and member."""
        return f"{self.root}/{self.archives[self.archive[index]]}:{self.members[index]}"

    def size(self, index: int) -> int:
        """See `Encoded.size`."""
        return int(self.sizes[index])

    def read(self, index: int, most: int | None = None) -> bytes:
        """See `Encoded.read`."""
        path = f"{self.root}/{self.archives[self.archive[index]]}"
        return read_part(path, self.name(index), int(self.offsets[index]), self.size(index), most)

    def digest(self, indices: Iterable[int]) -> bytes:
        """See `Encoded.digest`."""
        return digest_of((f"{self.archives[self.archive[i]]}:{self.members[i]}", int(self.sizes[i])) for i in indices)


@dataclass(slots=True)
class _Table:
    """What one archive holds."""

    members: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int | str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def has_shards(path: Path) -> bool:
    """Whether a directory holds tar archives, or has splits that do."""
    return any(_archives(path)) or any(_archives(path / name) for name in _SPLITS)


def shard_source(path: Path, problems: Problems, *, image_size: int | None) -> Source | None:
    """Read the tables of a directory's tar archives; no image is decoded.

    The splits are directories of archives (`train/`, `val/` or `validation/`, `test/`), or said by the archives' names
    (`train-000000.tar`, `imagenet1k-validation-00.tar`); archives that say none are for training. As with folders of
    images, `val` is the test set where there is no `test`.

    Args:
        path: The directory.
        problems: Where all that is wrong with it is noted.
        image_size: Scale the short side to this and crop the centre.
    """
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in _archives(path):
        found[_split_of(name)].append(name)
    for name, split in _SPLITS.items():
        found[split] += [f"{name}/{archive}" for archive in _archives(path / name)]
    if not found["train"]:
        problems.add(f"{str(path)!r} has no training shards: name them train-000000.tar, or put them into train/")
        return None
    if not found["test"]:
        found["test"], found["val"] = found["val"], []
    read = {split: _read(path, names, problems) for split, names in found.items() if names}
    classes = _classes(path, [label for _, labels in read.values() for label in labels], problems)
    numbers = {name: number for number, name in enumerate(classes)}
    pools: dict[str, Pool] = {}
    for split, (images, labels) in read.items():
        if unknown := sorted({label for label in labels if isinstance(label, str) and label not in numbers}):
            problems.add(f"{split}: no class is called {unknown[0]!r}{nearest(unknown[0], classes)}")
            return None
        given = [numbers[label] if isinstance(label, str) else label for label in labels]
        stored = Stored(images, torch.tensor(given, dtype=torch.int64), image_size=image_size)
        pools[split] = stored_pool(stored)
    note = f"{path}: no shards for tests, a fixed fifth of the images is the test set"
    return Source(
        name=str(path),
        classes=classes,
        train=pools["train"],
        val=pools.get("val"),
        test=pools.get("test"),
        notes=() if "test" in pools else (note,),
    )


def _archives(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(item.name for item in path.iterdir() if item.suffix == ".tar" and not item.name.startswith("."))


def _split_of(name: str) -> str:
    words = name.removesuffix(".tar").replace("_", "-").replace(".", "-").split("-")
    return next((_SPLITS[word] for word in words if word in _SPLITS), "train")


def _read(root: Path, names: list[str], problems: Problems) -> tuple[Shards, list[int | str]]:
    with ThreadPoolExecutor(min(8, processors())) as pool:
        tables = list(pool.map(lambda name: _table(root / name), names))
    wrong = [line for table in tables for line in table.wrong]
    for line in wrong[:LISTED]:
        problems.add(line)
    if len(wrong) > LISTED:
        problems.add(f"{len(wrong)} such complaints about shards in all")
    shards = Shards(
        str(root),
        names,
        [member for table in tables for member in table.members],
        np.repeat(np.arange(len(names), dtype=np.int32), [len(table.members) for table in tables]),
        np.array([offset for table in tables for offset in table.offsets], np.int64),
        np.array([size for table in tables for size in table.sizes], np.int64),
    )
    return shards, [label for table in tables for label in table.labels]


def _table(path: Path) -> _Table:
    """Images and labels of one archive, in the order in which they lie there."""
    table = _Table()
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int | str] = {}
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                kind = Path(member.name).suffix.lower()
                if not member.isfile() or (kind not in SUFFIXES and kind not in _LABELS):
                    continue
                if member.offset_data + member.size > length or member.issparse():
                    raise tarfile.ReadError(f"{member.name} is not whole")
                key = member.name[: -len(kind)]
                if key in images if kind in SUFFIXES else key in labels:
                    table.wrong.append(f"{path}: {key!r} is there twice: write each image once")
                elif kind in SUFFIXES:
                    images[key] = member
                else:
                    labels[key] = _label(archive, member, kind)
    except (tarfile.TarError, OSError, ValueError) as error:
        compressed = isinstance(error, tarfile.ReadError) and not images
        remedy = "shards are plain tar, not compressed" if compressed else "remove or replace it"
        table.wrong.append(f"{path} cannot be read as a tar archive ({first_line(error)}): {remedy}")
        return table
    for key, member in images.items():
        if key not in labels:
            table.wrong.append(f"{path}: {member.name!r} has no {key}.cls or {key}.json with its class")
            continue
        table.members.append(member.name)
        table.offsets.append(member.offset_data)
        table.sizes.append(member.size)
        table.labels.append(labels[key])
    if not images:
        table.wrong.append(f"{path} holds no images ({', '.join(SUFFIXES[:3])}, ...)")
    return table


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> int | str:
    """The class that a member says: its number, or its name.

    Raises:
        ValueError: It says none.
    """
    file = archive.extractfile(member) if member.size <= _LONGEST else None
    text = "" if file is None else file.read().decode("utf-8", "replace").strip()
    value: object = text
    if kind == ".json":
        try:
            held = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{member.name} is no JSON") from error
        value = next((held[key] for key in _KEYS if key in held), None) if isinstance(held, dict) else held
    if isinstance(value, str) and value.isdecimal() and len(value) < _DIGITS:
        return int(value)
    if isinstance(value, int) and abs(value) >= 10**_DIGITS:
        raise ValueError(f"{member.name} says a class of more than {_DIGITS} digits")
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        keys = " or ".join(repr(key) for key in _KEYS)
        raise ValueError(f"{member.name} says no class: a number or a name, in a .json under {keys}")
    return value


def _classes(path: Path, labels: list[int | str], problems: Problems) -> tuple[str, ...]:
    names = sorted({label for label in labels if isinstance(label, str)})
    numbers = {label for label in labels if isinstance(label, int)}
    if (path / CLASSES).is_file():
        try:
            lines = (path / CLASSES).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path / CLASSES} cannot be read ({first_line(error)})") from error
        return tuple(line.strip() for line in lines if line.strip())
    if names and numbers:
        problems.add(f"{str(path)!r} has classes with names ({names[0]!r}) and numbers ({min(numbers)}): one of both")
    if names:
        return tuple(names)
    # An absurd number must not make as many names; the check of the labels reports it.
    return tuple(str(number) for number in range(min(max(numbers, default=-1), len(labels)) + 1))
