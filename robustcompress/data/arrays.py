"""Data that the caller already holds: tensors, datasets and loaders, checked before they are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from robustcompress.data.checks import check_pair
from robustcompress.data.pools import Pool, Source, pixel_pool, resized
from robustcompress.errors import Problems, nearest

ACCEPTED = (
    "a name, a directory, a pair (images, labels), a torch Dataset or DataLoader, DataSplits, or a dict or "
    "pair of such objects for 'train' and 'test' (and 'val')"
)


def array_source(source: object, problems: Problems, *, image_size: int | None) -> Source | None:
    """Read tensors, datasets or loaders, or a mapping or pair of them; what is wrong goes to `problems`."""
    parts = _parts(source, problems)
    if parts is None:
        return None
    pools: dict[str, Pool] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for name, part in parts.items():
        label = name if len(parts) > 1 else "data"
        pair = _pair(part, problems, label, image_size)
        if pair is None:
            continue
        pair = pair[0].detach().cpu(), pair[1].detach().cpu()
        if not check_pair(*pair, problems, label):
            continue
        pools[name] = pixel_pool(*pair, image_size=image_size)
        sizes[name] = (int(pair[0].shape[2]), int(pair[0].shape[3]))
    if image_size is None and len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} {h}x{w}" for name, (h, w) in sizes.items())
        problems.add(f"image sizes differ ({said}): pass image_size={min(next(iter(sizes.values())))}")
    if len(pools) < len(parts):
        return None
    classes = _class_names(parts["train"], pools["train"].labels)
    kind = "tensors" if isinstance(parts["train"], tuple | list) else type(parts["train"]).__name__
    notes = () if "test" in pools else ("no test images given: a fixed fifth of the images is the test set",)
    return Source(
        name=kind,
        classes=classes,
        train=pools["train"],
        val=pools.get("val"),
        test=pools.get("test"),
        notes=notes,
    )


def _parts(source: object, problems: Problems) -> dict[str, object] | None:
    if isinstance(source, Mapping):
        unknown = [key for key in source if key not in ("train", "val", "test")]
        for key in unknown:
            problems.add(f"data has no part {key!r}{nearest(str(key), ('train', 'val', 'test'))}")
        if "train" not in source:
            problems.add("data has no 'train' part")
        return None if unknown or "train" not in source else dict(source)
    if isinstance(source, tuple | list):
        if len(source) == 2 and all(_is_array(item) or _is_list_of_numbers(item) for item in source):
            return {"train": source}
        if len(source) in (2, 3) and all(_is_part(item) for item in source):
            names = ("train", "test") if len(source) == 2 else ("train", "val", "test")
            return dict(zip(names, source, strict=True))
    elif isinstance(source, Dataset | DataLoader):
        return {"train": source}
    said = type(source).__name__
    if isinstance(source, tuple | list):
        said += f" of {', '.join(type(item).__name__ for item in source[:4])}"
    problems.add(f"data of type {said} cannot be used: pass {ACCEPTED}")
    return None


def _is_array(item: object) -> bool:
    return isinstance(item, Tensor | np.ndarray)


def _is_list_of_numbers(item: object) -> bool:
    return isinstance(item, list | tuple) and len(item) > 0 and isinstance(item[0], int | float | np.number)


def _is_part(item: object) -> bool:
    return isinstance(item, Dataset | DataLoader) or (
        isinstance(item, tuple | list) and len(item) == 2 and all(_is_array(i) or _is_list_of_numbers(i) for i in item)
    )


def _class_names(part: object, labels: Tensor) -> tuple[str, ...]:
    holder: Any = part
    while holder is not None:
        names = getattr(holder, "classes", None)
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            return tuple(names)
        holder = getattr(holder, "dataset", None)  # DataLoader, Subset
    # An absurd label must not make as many names; the check of the labels reports it.
    count = int(labels.max()) + 1 if len(labels) else 0
    return tuple(str(label) for label in range(min(count, len(labels) + 1)))


def _pair(part: object, problems: Problems, what: str, image_size: int | None) -> tuple[Tensor, Tensor] | None:
    if isinstance(part, tuple | list):
        if not _is_part(part):
            problems.add(f"{what}: expected a pair (images, labels), a Dataset or a DataLoader")
            return None
        return torch.as_tensor(part[0]), torch.as_tensor(part[1])
    if isinstance(part, DataLoader):
        plain = part.batch_size is not None and part.collate_fn is default_collate
        if plain and hasattr(part.dataset, "__len__") and hasattr(part.dataset, "__getitem__"):
            part = part.dataset  # each image once and in order: a shuffling loader draws from the global seed
        else:
            items = (item for batch in part for item in _unbatched(batch))
            return _stack(items, problems, what, image_size)
    if isinstance(part, TensorDataset) and len(part.tensors) == 2:
        return part.tensors[0], part.tensors[1]
    if not isinstance(part, Dataset):
        problems.add(f"{what}: {type(part).__name__} cannot be used: pass {ACCEPTED}")
        return None
    in_order: Any = (part[i] for i in range(len(part))) if hasattr(part, "__len__") else part
    return _stack(in_order, problems, what, image_size)


def _unbatched(batch: Any) -> Iterable[Any]:
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return zip(batch[0], batch[1], strict=True)
    return [batch]


def _stack(items: Iterable[Any], problems: Problems, what: str, image_size: int | None) -> tuple[Tensor, Tensor] | None:
    images: list[Tensor] = []
    labels: list[Any] = []
    for index, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) != 2:
            problems.add(f"{what}: item {index} is {type(item).__name__}, expected (image, label)")
            return None
        image = item[0]
        if not isinstance(image, Tensor | np.ndarray):
            if not hasattr(image, "convert"):
                said = type(image).__name__
                problems.add(f"{what}: image {index} is {said}, expected a tensor or a PIL image")
                return None
            image = np.array(image.convert("RGB")).transpose(2, 0, 1)
        image = torch.as_tensor(image)
        if image_size is not None and image.ndim == 3 and image.dtype == torch.uint8:
            image = resized(image.unsqueeze(0), image_size).squeeze(0)
        if images and image.shape != images[0].shape:
            problems.add(
                f"{what}: image {index} is {list(image.shape)}, the first is {list(images[0].shape)}: "
                "make them equal, or give bytes or PIL images and image_size="
            )
            return None
        images.append(image)
        labels.append(item[1])
    if not images:
        problems.add(f"{what}: there are no images")
        return None
    return torch.stack(images), torch.as_tensor(labels)
