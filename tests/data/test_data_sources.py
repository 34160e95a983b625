from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from robustcompress.data import DataSplits, load_data
from robustcompress.data.digits import read_digits


def pair(n: int = 60, classes: int = 3, *, side: int = 8, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels in which each image is told apart by its first pixel."""
    x = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = torch.arange(n, dtype=torch.uint8)[:, None]
    return x, torch.arange(n) % classes


def ids(splits: DataSplits) -> list[list[int]]:
    return [part.pixels[:, 0, 0, 0].tolist() for part in (splits.train, splits.val, splits.test)]


def test_digits_are_scikit_learns_own() -> None:
    from sklearn.datasets import load_digits

    images, labels = read_digits()
    own = load_digits()
    assert np.array_equal(images.numpy(), own.images)
    assert np.array_equal(labels.numpy(), own.target)


def test_default_is_the_digits_and_says_so() -> None:
    data = load_data()
    note = "no data given: using scikit-learn's handwritten digits (1,797 real 8x8 images, shown as 3x32x32)"
    assert data.name == "digits" and data.notes == (note,)
    assert data.classes == tuple("0123456789") and data.image_shape == (3, 32, 32)
    assert (len(data.train), len(data.val), len(data.test)) == (1294, 144, 359)
    pixels = torch.cat([data.train.pixels, data.val.pixels, data.test.pixels])
    assert torch.equal(pixels[:, 0], pixels[:, 1]) and torch.equal(pixels[:, 0], pixels[:, 2])
    assert torch.equal(pixels, pixels[:, :, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert len(pixels.unique()) == 17 and int(pixels.max()) == 255
    levels = (pixels[:, 0, ::4, ::4].float() * 16 / 255).round()
    original = read_digits()[0].float()
    assert torch.equal(levels.flatten(1).unique(dim=0), original.flatten(1).unique(dim=0))
    shares = [torch.bincount(part.labels) / len(part) for part in (data.train, data.val, data.test)]
    assert all(float((share - shares[0]).abs().max()) < 0.01 for share in shares)
    assert "no data given" not in load_data("digits").notes[0]


def test_test_images_are_fixed_and_validation_images_seeded() -> None:
    first, same, other = load_data(seed=0), load_data("digits", seed=0), load_data(seed=1)
    assert first.sha256 == same.sha256
    assert torch.equal(first.test.pixels, other.test.pixels)
    assert not torch.equal(first.val.pixels, other.val.pixels)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 60),
    classes=st.integers(2, 4),
    val_fraction=st.floats(0.01, 0.9),
    limit=st.none() | st.integers(8, 50),
    seed=st.integers(0, 3),
    as_float=st.booleans(),
    grey=st.booleans(),
)
def test_pairs_are_divided_without_loss(
    n: int, classes: int, val_fraction: float, limit: int | None, seed: int, as_float: bool, grey: bool
) -> None:
    x, y = pair(max(n, 2 * classes), classes, channels=1 if grey else 3)
    given_x = x.float() / 255 if as_float else x
    data = load_data((given_x, y), val_fraction=val_fraction, train_limit=limit, test_limit=limit, seed=seed)
    parts = ids(data)
    together = [i for part in parts for i in part]
    assert len(set(together)) == len(together)  # no image in two splits
    if limit is None:
        assert len(together) == len(x)
    assert all(parts)
    for split in (data.train, data.val, data.test):
        for pixels, label in zip(split.pixels, split.labels.tolist(), strict=True):
            which = int(pixels[0, 0, 0])
            assert y[which] == label
            assert torch.equal(pixels, x[which].expand(3, -1, -1))
    assert data.train.classes_present == tuple(range(classes))


def test_limits_are_stratified_counts_and_hold_the_validation_images() -> None:
    x, y = pair(200, 4)
    data = load_data({"train": (x, y), "test": (x, y)}, train_limit=40, test_limit=20, val_fraction=0.25)
    assert [len(p) for p in ids(data)] == [30, 10, 20]
    assert torch.bincount(torch.cat([data.train.labels, data.val.labels])).tolist() == [10] * 4
    assert torch.bincount(data.test.labels).tolist() == [5] * 4


def test_floats_are_rounded_to_the_nearest_byte() -> None:
    x = torch.tensor([0.0, 100.4, 100.6, 254.9, 255.0, 7.5001]).div(255).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    data = load_data({"train": pair(), "test": (x, torch.arange(6) % 3)})
    assert ids(data)[2] == [0, 100, 101, 255, 255, 8]


def test_own_parts_are_kept() -> None:
    x, y = pair(90)
    parts = {"train": (x[:40], y[:40]), "val": (x[40:60], y[40:60]), "test": (x[60:], y[60:])}
    expected = [list(range(40)), list(range(40, 60)), list(range(60, 90))]
    assert ids(load_data(parts)) == expected
    assert ids(load_data(tuple(parts.values()))) == expected
    two = load_data((parts["train"], parts["test"]))
    assert ids(two)[2] == expected[2] and sorted(ids(two)[0] + ids(two)[1]) == expected[0]


def test_arrays_and_lists_of_numbers() -> None:
    x, y = pair()
    data = load_data((x.numpy(), y.tolist()))
    assert data.sha256 == load_data((x, y)).sha256 == load_data((x, y.to(torch.uint8))).sha256


class Pictures(Dataset[Any]):
    classes = ("cat", "dog", "elk")

    def __init__(self) -> None:
        self.x, self.y = pair()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.reads += 1
        return Image.fromarray(self.x[index].permute(1, 2, 0).numpy()), int(self.y[index])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        x, y = pair()
        return iter([(a, int(b)) for a, b in zip(x, y, strict=True)])


def test_datasets_and_loaders_give_what_their_tensors_give() -> None:
    x, y = pair()
    expected = load_data((x, y)).sha256
    pictures = Pictures()
    sources = [
        TensorDataset(x, y),
        pictures,
        Subset(pictures, range(60)),
        Stream(),
        DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, drop_last=True),
        DataLoader(Stream(), batch_size=7),
        DataLoader(
            TensorDataset(x.float() / 255, y),
            batch_size=60,
            collate_fn=lambda items: tuple(torch.stack([torch.as_tensor(item[k]) for item in items]) for k in (0, 1)),
        ),
    ]
    state = torch.get_rng_state()
    for source in sources[:5]:
        assert load_data(source).sha256 == expected
    assert torch.equal(torch.get_rng_state(), state)  # a shuffling loader draws nothing
    for source in sources[5:]:
        assert load_data(source).sha256 == expected
    assert pictures.reads == 120  # twice used, read once each
    assert load_data(pictures).classes == load_data(Subset(pictures, range(30))).classes == ("cat", "dog", "elk")
    both = load_data({"train": pictures, "test": TensorDataset(x, y)})
    assert ids(both)[2] == list(range(60))


def test_a_dataset_that_comes_class_by_class_is_mixed() -> None:
    x, y = pair()
    order = y.argsort(stable=True)
    data = load_data({"train": (x, y), "test": TensorDataset(x[order], y[order])})
    assert data.test.first(3).classes_present == (0, 1, 2)


def test_splits_pass_as_they_are() -> None:
    data = load_data()
    assert load_data(data) is data
    small = load_data(data, train_limit=50, test_limit=30, image_size=16)
    assert (len(small.train), len(small.val), len(small.test)) == (50, 144, 30)
    assert small.image_shape == (3, 16, 16) and small.classes == data.classes


def test_image_size_scales_and_crops_the_centre() -> None:
    x = torch.zeros(20, 3, 16, 32, dtype=torch.uint8)
    x[:, :, :, 8:24] = 200  # the centre, which alone is left
    data = load_data((x, torch.arange(20) % 2), image_size=8)
    assert data.image_shape == (3, 8, 8)
    assert data.train.pixels[:, :, :, 1:7].unique().tolist() == [200]
    smooth = torch.linspace(0, 1, 32).expand(20, 3, 32, 32)
    shrunk = load_data((smooth, torch.arange(20) % 2), image_size=8).train.as_float()
    torch.testing.assert_close(shrunk[0, 0, 0], smooth[0, 0, 0].view(8, 4).mean(1), atol=0.02, rtol=0)
