import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robustcompress.data import load_data
from robustcompress.errors import InputError


def write_mnist(root: Path, kind: str) -> dict[str, Any]:
    """Write the four files of MNIST in its own format, with a few images."""
    raw = root / kind / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for part, n in (("train", 40), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        for name, array, magic in (("images-idx3", images, 2051), ("labels-idx1", labels, 2049)):
            content = struct.pack(f">{1 + array.ndim}i", magic, *array.shape) + array.tobytes()
            (raw / f"{part}-{name}-ubyte").write_bytes(content)
            (raw / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
        written[part] = images
    return written


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_gets_a_border_and_three_channels(tmp_path: Path, name: str, kind: str) -> None:
    written = write_mnist(tmp_path, kind)
    data = load_data(name, root=tmp_path, val_fraction=0.25)
    assert data.name == name and data.num_classes == 10 and data.image_shape == (3, 32, 32)
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 20)
    expected = np.pad(written["t10k"], ((0, 0), (2, 2), (2, 2)))
    for channel in range(3):
        assert np.array_equal(data.test.pixels[:, channel].numpy(), expected)


class FakeSet:
    """What torchvision's CIFAR-10 and SVHN look like once read."""

    def __init__(self, root: str, *, download: bool, **split: Any) -> None:
        self.n = 40 if split in ({"train": True}, {"split": "train"}) else 20
        self.pixels = np.random.default_rng(self.n).integers(0, 256, (self.n, 32, 32, 3), np.uint8)


class FakeCifar(FakeSet):
    classes = tuple("abcdefghij")

    @property
    def data(self) -> Any:
        return self.pixels

    @property
    def targets(self) -> list[int]:
        return [i % 10 for i in range(self.n)]


class FakeSvhn(FakeSet):
    @property
    def data(self) -> Any:
        return self.pixels.transpose(0, 3, 1, 2)

    @property
    def labels(self) -> Any:
        return np.arange(self.n) % 10


@pytest.mark.parametrize(("name", "kind", "fake"), [("cifar10", "CIFAR10", FakeCifar), ("svhn", "SVHN", FakeSvhn)])
def test_layouts_of_torchvision(monkeypatch: pytest.MonkeyPatch, name: str, kind: str, fake: Any) -> None:
    import torchvision

    monkeypatch.setattr(torchvision.datasets, kind, fake)
    data = load_data(name)
    assert data.classes == (FakeCifar.classes if name == "cifar10" else tuple("0123456789"))
    expected = fake("", download=False, split="test").pixels.transpose(0, 3, 1, 2)
    assert np.array_equal(data.test.pixels.numpy(), expected)
    assert torch.equal(data.test.labels, torch.arange(20) % 10)
    assert load_data(name, image_size=16).image_shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_absent_data_say_how_to_get_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        InputError, match=f"{name} is not in '.*': pass download=True \\(--download\\), or root="
    ) as caught:
        load_data(name, root=tmp_path, image_size=3)
    assert "image_size=3" in str(caught.value)  # the other problem is told at once
    assert not list(tmp_path.iterdir())


def test_missing_package_and_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def refuse(error: Exception) -> Any:
        def make(*args: object, **kwargs: object) -> None:
            raise error

        return make

    monkeypatch.setattr(torchvision.datasets, "SVHN", refuse(ModuleNotFoundError("No module named 'scipy'")))
    with pytest.raises(InputError, match="svhn needs a package that is not installed: No module named 'scipy'"):
        load_data("svhn", root=tmp_path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse(OSError("no route to host")))
    with pytest.raises(InputError, match=r"could not be downloaded to .* \(no route to host\)"):
        load_data("cifar10", root=tmp_path, download=True)
