"""`load_data`: from whatever names or holds images to training, validation and test splits."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from robustcompress.data.arrays import array_source
from robustcompress.data.checks import check_labels
from robustcompress.data.digits import digits_source
from robustcompress.data.extra import read_extra, refuse_known
from robustcompress.data.folder import folder_source
from robustcompress.data.images import DataSplits, Images
from robustcompress.data.pools import Pool, Source, resized
from robustcompress.data.shards import has_shards, shard_source
from robustcompress.data.splits import stratified, without
from robustcompress.data.stored import Stored
from robustcompress.data.streaming import HELD_OUT, Stream, check_held_out, check_stream, streams
from robustcompress.data.vision import VISION_NAMES, vision_source
from robustcompress.errors import InputError, Problems, nearest

EXTRA_RATIO = 0.7
"""Generated images in each batch by default (Gowal et al. 2021: about that share is best on CIFAR-10)."""

NAMES = ("digits", *VISION_NAMES)

# The test set of a source without one must be the same for every seed, or results could not be compared.
_TEST_SEED = 0
_TEST_FRACTION = 0.2


def load_data(
    source: object = None,
    *,
    root: str | Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    extra: str | Path | None = None,
    extra_ratio: float | None = None,
    pseudo_label: str | Path | None = None,
    stream: Stream = "auto",
    workers: int | None = None,
) -> DataSplits:
    """Load images into memory as bytes and divide them; training images that are too many for it stay on the disk.

    Args:
        source: One of

            - None or "digits": scikit-learn's handwritten digits, which come with the package;
            - "cifar10", "cifar100", "svhn", "mnist", "fashion_mnist": through torchvision;
            - a directory with `train/` and `test/` (or `val/`), each with a folder per class, or a folder per
              class directly;
            - a directory of tar shards, as WebDataset lays them out (see `shard_source`);
            - `(images, labels)`: uint8 or float in [0, 1], `[N, 1 or 3, H, W]`, and integers `[N]` (floats are
              rounded to n/255);
            - a torch Dataset of (tensor or PIL image, int), or a DataLoader; read once, so a random transform
              is frozen;
            - a dict with "train", "test" and perhaps "val", or (train, test), or (train, val, test), of such
              objects;
            - a `DataSplits`, returned as it is but for `image_size` and the limits.
        root: Where torchvision's files are; `data` when None.
        download: Let torchvision fetch what is absent.
        image_size: Scale the short side to this many pixels and crop the centre.
        train_limit: Use this many training images, stratified; the validation images are among them.
        test_limit: Use this many test images, stratified.
        val_fraction: Share of the training images held out for validation, where the source has no
            validation images.
        seed: Draws the validation images and the limited subsets. The test images of a source that has none
            of its own are a fixed fifth, the same for every seed.
        extra: More images for training, generated or collected: an `.npz` with `image` (uint8 `[N, H, W, 3]`) and
            perhaps `label` (integers `[N]`). They are never among the validation or test images.
        extra_ratio: Their share of each training batch, 0.7 where None. An epoch stays one pass over the data set's own
            images, and so has 1 / (1 - ratio) times as many steps.
        pseudo_label: Who labels them in place of the file: "teacher" (of the run), or the directory of a result.
        stream: Leave the training images of a directory on the disk and decode them while training: True, False, or
            "auto", which does so where those in use would take more than a sixteenth of the machine's memory.
            Validation and test images are in memory all the same, at most 5,000 of each where nothing else is said.
        workers: Threads that decode while training; as many as there are processors, at most 8, where None. What they
            decode does not depend on it.

    Returns:
        Three disjoint, stratified splits. Images that come class by class are reordered so that the first n
        of each split are a fair sample.

    Raises:
        InputError: The source does not exist or cannot be used; all that is wrong is listed.
    """
    problems = Problems("cannot load the data")
    _check_options(problems, image_size, train_limit, test_limit, val_fraction)
    check_stream(problems, stream, workers)
    if extra is None and (extra_ratio is not None or pseudo_label is not None):
        problems.add("extra_ratio and pseudo_label are about extra images: name their file (extra=)")
    if isinstance(source, DataSplits):
        parts = [("train", source.train), ("val", source.val), ("test", source.test)]
        check_labels([(n, p.labels) for n, p in parts if len(p) or n == "train"], source.classes, problems)
        problems.raise_if_any()
        limited = _limited(source, image_size, train_limit, test_limit, seed)
        if extra is not None:
            limited = replace(limited, asked=None)
        return _with_extra(limited, extra, extra_ratio, pseudo_label)
    size = image_size if _is_int(image_size) else None
    opened = _open(source, problems, root, download, size)
    if opened is not None:
        pools = [("train", opened.train), ("val", opened.val), ("test", opened.test)]
        check_labels([(n, p.labels) for n, p in pools if p is not None], opened.classes, problems)
        least = 2 * len(opened.classes)
        if train_limit is not None and _is_int(train_limit) and train_limit < least:
            problems.add(f"train_limit={train_limit}: {len(opened.classes)} classes need at least {least}, two each")
    problems.raise_if_any()
    assert opened is not None  # _open says why it gives nothing
    streamed = streams(opened, stream, workers, train_limit=train_limit)
    splits = _divide(streamed or opened, train_limit, test_limit, val_fraction, seed, stored=streamed is not None)
    splits = _with_extra(splits, extra, extra_ratio, pseudo_label)
    if source is not None and not isinstance(source, str | Path):
        return splits
    asked = {
        "source": "digits" if source is None else str(source),
        "root": None if root is None else str(root),
        "image_size": image_size,
        "train_limit": train_limit,
        "test_limit": test_limit,
        "val_fraction": val_fraction,
        "seed": seed,
        "extra": None if extra is None else str(extra),
        "extra_ratio": extra_ratio,
        "pseudo_label": None if pseudo_label is None else str(pseudo_label),
        "stream": None if stream == "auto" else stream,
        "workers": workers,
    }
    return replace(splits, asked={key: value for key, value in asked.items() if value is not None})


def _with_extra(
    splits: DataSplits, path: str | Path | None, ratio: float | None, pseudo_label: str | Path | None
) -> DataSplits:
    if path is None:
        return splits
    share = EXTRA_RATIO if ratio is None else ratio
    height, width = splits.image_shape[1:]
    extra = read_extra(
        path, ratio=share, classes=splits.num_classes, image_size=(height, width), pseudo_label=pseudo_label
    )
    refuse_known(extra, {"val": splits.val, "test": splits.test})
    note = (
        f"{100 * share:.3g} % of each training batch is from {extra.name} ({len(extra):,} images): an epoch is a pass "
        f"over the {len(splits.train):,} training images, and {1 / (1 - share):.1f} times as long"
    )
    return replace(splits, extra=extra, notes=(*splits.notes, note))


def _open(
    source: object, problems: Problems, root: str | Path | None, download: bool, image_size: int | None
) -> Source | None:
    if source is None or source == "digits":
        return digits_source(default=source is None, image_size=image_size)
    if not isinstance(source, str | os.PathLike):
        return array_source(source, problems, image_size=image_size)
    if isinstance(source, str) and source in VISION_NAMES:
        return vision_source(source, problems, root=root, download=download, image_size=image_size)
    path = Path(source).expanduser()
    if path.is_dir():
        return (shard_source if has_shards(path) else folder_source)(path, problems, image_size=image_size)
    if path.suffix == ".tar" and path.exists():
        problems.add(f"{str(source)!r} is one shard: pass its directory, {str(path.parent)!r}")
    elif path.exists():
        problems.add(f"{str(source)!r} is a file: unpack it, and pass the directory with a folder per class")
    elif isinstance(source, Path) or len(path.parts) > 1:
        problems.add(f"directory {str(source)!r} does not exist")
    else:
        problems.add(f"there is no data set and no directory {str(source)!r}{nearest(str(source), NAMES)}")
    return None


def _divide(
    source: Source,
    train_limit: int | None,
    test_limit: int | None,
    val_fraction: float,
    seed: int,
    *,
    stored: bool,
) -> DataSplits:
    """Who gets which images; with `stored` those for training are left on the disk, and the others are few."""
    train = torch.arange(len(source.train.labels))
    test_pool, test = source.test, _all(source.test)
    if test_pool is None:
        test_pool, count = source.train, max(1, round(len(train) * _TEST_FRACTION))
        test = stratified(source.train.labels, count, seed=_TEST_SEED, leave=1)
        train = without(len(train), test)
    train = _limit(source.train.labels, train, train_limit, seed, at_least=2)
    test = _limit(test_pool.labels, test, test_limit or (HELD_OUT if stored else None), seed)
    val_pool, val = source.val, _all(source.val)
    held = max(1, round(len(train) * val_fraction))
    if stored:
        held = min(held, HELD_OUT)
    if val_pool is None:
        labels = source.train.labels[train]
        chosen = stratified(labels, held, seed=seed, leave=1)
        val_pool, val, train = source.train, train[chosen], train[without(len(train), chosen)]
    elif train_limit is not None or stored:
        val = _limit(val_pool.labels, val, held, seed)
    notes = source.notes
    if stored:
        notes = (*notes, check_held_out(source.train, len(train), val_pool, len(val), test_pool, len(test)))
    return DataSplits(
        name=source.name,
        classes=source.classes,
        train=source.train.leave(train) if stored else source.train.take(train),
        val=val_pool.take(val),
        test=test_pool.take(test),
        notes=notes,
    )


def _all(pool: Pool | None) -> Tensor:
    return torch.arange(0 if pool is None else len(pool.labels))


def _limit(labels: Tensor, indices: Tensor, limit: int | None, seed: int, *, at_least: int = 0) -> Tensor:
    if limit is None or limit >= len(indices):
        return indices
    return indices[stratified(labels[indices], limit, seed=seed, at_least=at_least)]


def _limited(
    splits: DataSplits, image_size: int | None, train_limit: int | None, test_limit: int | None, seed: int
) -> DataSplits:
    def fewer(images: Images | Stored, limit: int | None, at_least: int) -> Tensor | None:
        if limit is None or limit >= len(images):
            return None
        return _limit(images.labels.cpu(), torch.arange(len(images)), limit, seed, at_least=at_least)

    def change(images: Images, limit: int | None, at_least: int) -> Images:
        if (chosen := fewer(images, limit, at_least)) is not None:
            images = images.subset(chosen)
        if image_size is not None:
            images = Images(resized(images.pixels, image_size), images.labels)
        return images

    if image_size is None and train_limit is None and test_limit is None:
        return splits
    if splits.extra is not None and image_size is not None:
        raise InputError(f"image_size={image_size!r} does not resize the extra images: load both anew")
    train: Images | Stored
    if isinstance(splits.train, Images):
        train = change(splits.train, train_limit, 2)
    elif image_size is not None:
        raise InputError(f"image_size={image_size!r} does not resize images that are on the disk: load the data anew")
    else:
        chosen = fewer(splits.train, train_limit, 2)
        train = splits.train if chosen is None else splits.train.part(chosen)
    return replace(
        splits,
        train=train,
        val=change(splits.val, None, 0),
        test=change(splits.test, test_limit, 0),
        asked=None,
    )


def _check_options(
    problems: Problems,
    image_size: int | None,
    train_limit: int | None,
    test_limit: int | None,
    val_fraction: float,
) -> None:
    if image_size is not None and (not _is_int(image_size) or image_size < 8):
        problems.add(f"image_size={image_size!r}: must be an integer of at least 8 pixels")
    for name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
        if limit is not None and (not _is_int(limit) or limit < 1):
            problems.add(f"{name}={limit!r}: must be a positive integer, or None for all images")
    if not isinstance(val_fraction, int | float) or not 0 < val_fraction < 1:
        problems.add(f"val_fraction={val_fraction!r}: must lie between 0 and 1, such as 0.1")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
