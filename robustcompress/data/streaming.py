"""Whether training images stay on the disk, and what then is kept in memory all the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from robustcompress.data.decoding import DamagedImageError
from robustcompress.data.memory import whole_memory
from robustcompress.data.pools import Pool, Source, stored_pool
from robustcompress.data.stored import Stored
from robustcompress.errors import InputError, Problems, nearest
from robustcompress.untrusted import room

Stream = bool | Literal["auto"]

SHARE = 1 / 16
"""Of the machine's memory: what decoded images may take before "auto" leaves them on the disk.

Of all the memory, not of what is free, so that a run that is started again decides alike; and small, since each process
of a machine with eight GPUs holds its own.
"""

HELD_OUT = 5000
"""Validation and test images that are decoded into memory, of each at most, where training images are on the disk.

As many as RobustBench judges ImageNet models on.
"""


def check_stream(problems: Problems, stream: object, workers: object) -> None:
    """Note what is no choice, and no number of threads."""
    if not isinstance(stream, bool) and stream != "auto":
        problems.add(f"stream={stream!r}: must be True, False or 'auto'{nearest(str(stream), ('auto',))}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= 256):
        problems.add(f"workers={workers!r}: threads that decode images, from 1 to 256, or None")


def streams(source: Source, stream: Stream, workers: int | None, *, train_limit: int | None = None) -> Source | None:
    """The same source, whose training images have been looked at where they lie; None where they go into memory.

    Args:
        source: What was opened.
        stream: Whether they stay on the disk.
        workers: Threads that then decode them.
        train_limit: How many of them are used at most.

    Raises:
        InputError: They cannot stay on the disk, or are damaged.
    """
    stored = source.train.stored
    if stored is None:
        if stream is True:
            raise InputError(
                f"stream=True: {source.name} is in memory already; directories of images and of tar shards are streamed"
            )
        return None
    if stream is False or (stream == "auto" and not _too_many(stored, train_limit)):
        return None
    stored = stored.with_workers(workers)
    stored.check()
    return replace(source, train=stored_pool(stored))


def check_held_out(train: Pool, training: int, val: Pool, validation: int, test: Pool, tests: int) -> str:
    """Refuse validation and test images that do not fit into memory; else say what is where.

    Args:
        train: What the training images come from.
        training: How many there are.
        val: What the validation images come from.
        validation: How many there are.
        test: What the test images come from.
        tests: How many there are.

    Raises:
        InputError: There are too many of them.
    """
    assert train.stored is not None
    needed, free = _needed(train.stored, validation + tests), room()
    if needed > free:
        raise InputError(
            f"cannot load the data: {validation} validation and {tests} test images take {needed / 1e9:.1f} GB of "
            f"memory, and {free / 1e9:.1f} GB may be taken: pass a smaller test_limit or image_size"
        )
    said = [f"{training:,} training images stay on the disk and are decoded while training"]
    for name, pool, count in (("validation", val, validation), ("test", test, tests)):
        others = len(pool.labels)
        of = f" of {others:,}" if pool is not train and others > count else ""
        said.append(f"{count:,}{of} {name} images are in memory")
    return "; ".join(said)


def _too_many(images: Stored, limit: int | None) -> bool:
    count = len(images) if limit is None else min(limit, len(images))
    try:
        return _needed(images, count) > SHARE * whole_memory()
    except DamagedImageError:  # of unknown size; decoding them all tells what is wrong with each
        return False


def _needed(images: Stored, count: int) -> int:
    """Bytes that so many of the images take decoded."""
    channels, height, width = images.shape
    return count * channels * height * width
