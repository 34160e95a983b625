"""Each bad input is told in one message, with the value and the remedy, before anything is done."""

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from robustcompress.data import load_data
from robustcompress.errors import InputError

X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3


class Items(Dataset[Any]):
    def __init__(self, *items: object) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


CASES: dict[str, tuple[object, str]] = {
    "name": ("cifar11", "no data set and no directory 'cifar11'; did you mean 'cifar10'"),
    "path": ("some/where", "directory 'some/where' does not exist"),
    "type": (3, "data of type int cannot be used"),
    "tuple": ((X, Y, 3), "data of type tuple of Tensor, Tensor, int cannot be used"),
    "key": ({"train": (X, Y), "tets": (X, Y)}, "data has no part 'tets'; did you mean 'test'"),
    "no train": ({"test": (X, Y)}, "has no 'train' part"),
    "part": ({"train": (X, Y), "test": X}, "test: Tensor cannot be used"),
    "255": ((X * 255, Y), r"outside \[0, 1\] \(.* to 25.\): divide by 255"),
    "normalised": (((X - 0.5) / 0.25, Y), "leave out the normalisation"),
    "nan": ((X.masked_fill(X > 0.9, float("nan")), Y), "NaN or infinite"),
    "inf": ((X.masked_fill(X > 0.9, float("inf")), Y), "NaN or infinite"),
    "int64": (((X * 255).long(), Y), "images are torch.int64: pass uint8"),
    "two channels": ((X[:, :2], Y), "so 2 channels: pass grey"),
    "four channels": ((torch.rand(12, 4, 8, 8), Y), "so 4 channels: pass grey"),
    "channels last": ((X.permute(0, 2, 3, 1), Y), r"permute\(0, 3, 1, 2\)"),
    "no channel": ((X[:, 0], Y), r"unsqueeze\(1\)"),
    "flat": ((X.flatten(1), Y), r"shape \[12, 192\], expected \[N, 3, H, W\]"),
    "lengths": ((X, Y[:11]), "12 images and 11 labels"),
    "float labels": ((X, Y.float()), r"labels are torch.float32: pass integers"),
    "bool labels": ((X, Y > 0), "labels are torch.bool"),
    "one-hot": ((X, torch.eye(3, dtype=torch.int64)[Y]), r"argmax\(1\)"),
    "negative": ((X, Y - 1), "label -1 is out of range"),
    "huge label": ((X, Y.masked_fill(Y == 2, 10**12)), "out of range"),
    "gap": ((X, Y * 2), r"fewer than 2 images of class '1' \(0\), '3' \(0\)"),
    "single": (
        (X, torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])),
        r"fewer than 2 images of class '1' \(1\)",
    ),
    "one class": ((X, torch.zeros(12, dtype=torch.int64)), "all images have label 0: at least two classes"),
    "empty": ((X[:0], Y[:0]), "there are no images"),
    "test label": ({"train": (X, Y), "test": (X, Y + 1)}, "test: label 3 is out of range: 3 classes"),
    "empty test": ({"train": (X, Y), "test": (X[:0], Y[:0])}, "test: there are no images"),
    "test size": ({"train": (X, Y), "test": (X[..., :6, :6], Y)}, "image sizes differ .*: pass image_size="),
    "dataset item": (Items(X[0], X[1]), r"item 0 is Tensor, expected \(image, label\)"),
    "dataset image": (Items(("a.png", 0)), "image 0 is str"),
    "dataset sizes": (Items((X[0], 0), (X[0, :, :4], 1)), "image 1 is .*, the first is"),
    "empty dataset": (Items(), "there are no images"),
    "normalised dataset": (TensorDataset(X * 2 - 1, Y), "leave out the normalisation"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_sources(case: str) -> None:
    source, expected = CASES[case]
    with pytest.raises(InputError, match=expected) as caught:
        load_data(source)
    assert str(caught.value).startswith("cannot load the data:")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image_size": 4}, "image_size=4"),
        ({"image_size": 32.0}, "image_size=32.0"),
        ({"train_limit": 0}, "train_limit=0"),
        ({"train_limit": 19}, "train_limit=19: 10 classes need at least 20"),
        ({"test_limit": -1}, "test_limit=-1"),
        ({"test_limit": True}, "test_limit=True"),
        ({"val_fraction": 0}, "val_fraction=0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        load_data(**options)


def test_all_problems_at_once() -> None:
    with pytest.raises(InputError) as caught:
        load_data(
            {"train": (X * 255, Y[:5].float()), "test": (X[:, :2], Y)},
            image_size=2,
            val_fraction=3,
            test_limit=0,
        )
    message = str(caught.value)
    parts = (
        "divide by 255",
        "12 images and 5 labels",
        "torch.float32",
        "2 channels",
        "image_size=2",
        "val_fraction=3",
    )
    assert all(part in message for part in (*parts, "test_limit=0")), message
    assert message.count("\n") == 7
