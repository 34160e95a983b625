"""Small photographs-to-be: JPEGs that differ in size and content, as folders and as tar shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def jpeg(seed: int, size: tuple[int, int] | None = None) -> bytes:
    """A smooth picture of its own, between 40 and 90 pixels a side where no size is given."""
    draw = np.random.default_rng(seed)
    width, height = draw.integers(40, 90, 2).tolist() if size is None else size
    coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_folder(root: Path, *, train: int = 20, test: int = 4, size: tuple[int, int] | None = None) -> Path:
    """`train/CLASS/NNN.jpg` and `test/CLASS/NNN.jpg`, so many of each class."""
    for split, count in (("train", train), ("test", test)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                seed = i + 100 * number + 1000 * (split == "test")
                (root / split / name / f"{i:03d}.jpg").write_bytes(jpeg(seed, size))
    return root


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar archive of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def as_shards(folder: Path, root: Path, *, per_shard: int = 17, kind: str = "cls", names: bool = True) -> Path:
    """The images of a folder, packed class by class as WebDataset has it: the label beside each image."""
    for split in ("train", "test"):
        members: list[tuple[str, bytes]] = []
        shards: list[list[tuple[str, bytes]]] = [members]
        for number, name in enumerate(CLASSES):
            for i, file in enumerate(sorted((folder / split / name).iterdir())):
                if len(shards[-1]) == 2 * per_shard:
                    shards.append([])
                key = f"{name}/{i:03d}"
                label = str(number if not names else name) if kind == "cls" else json.dumps({"label": number})
                shards[-1] += [(f"{key}.jpg", file.read_bytes()), (f"{key}.{kind}", label.encode())]
        for number, shard in enumerate(shards):
            write_shard(root / f"{split}-{number:06d}.tar", shard)
    if not names or kind == "json":
        (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root
