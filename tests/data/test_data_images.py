import pytest
import torch

from robustcompress.data import DataSplits, Images
from robustcompress.errors import InputError


def some(n: int = 12, side: int = 8) -> Images:
    generator = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(n) % 3)


def test_subset_first_and_float() -> None:
    images = some()
    assert len(images) == 12
    assert images.classes_present == (0, 1, 2)
    part = images.subset(torch.tensor([5, 1]))
    assert part.labels.tolist() == [2, 1]
    assert torch.equal(part.pixels[0], images.pixels[5])
    assert torch.equal(images.first(4).pixels, images.pixels[:4])
    assert len(images.first(99)) == 12
    x = images.as_float()
    assert x.dtype == torch.float32 and float(x.max()) <= 1
    assert torch.equal((x * 255).round().to(torch.uint8), images.pixels)
    assert images.to("meta").pixels.device.type == "meta"


def test_extremes_are_exactly_zero_and_one() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(12).view(2, 3, 2, 2)
    x = Images(pixels, torch.tensor([0, 1])).as_float()
    assert x[0].unique().tolist() == [0.0] and x[1].unique().tolist() == [1.0]


def test_pixels_are_made_contiguous() -> None:
    images = Images(some().pixels.permute(0, 1, 3, 2), torch.zeros(12, dtype=torch.int64))
    assert images.pixels.is_contiguous()


@pytest.mark.parametrize(
    ("pixels", "labels", "expected"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "torch.float32"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "N, 3, H, W"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "one per image"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "must be int64"),
    ],
)
def test_images_refuse_other_tensors(pixels: torch.Tensor, labels: torch.Tensor, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Images(pixels, labels)
    with pytest.raises(InputError, match="negative"):
        some().first(-1)


def test_digest_is_of_the_content() -> None:
    def splits(**change: Images) -> DataSplits:
        parts = {"train": some(12), "val": some(3), "test": some(6)} | change
        return DataSplits(name="n", classes=("a", "b", "c"), **parts)

    data = splits()
    assert data.num_classes == 3 and data.image_shape == (3, 8, 8)
    assert data.sha256 == splits().sha256 and len(data.sha256) == 64
    pixel = Images(some().pixels.clone(), some().labels)
    pixel.pixels[11, 2, 7, 7] ^= 1
    label = Images(some().pixels, some().labels.roll(1))
    moved = splits(val=some(6), test=some(3))
    digests = {data.sha256, splits(train=pixel).sha256, splits(train=label).sha256, moved.sha256}
    assert len(digests) == 4
    empty = splits(val=some(12).subset(torch.tensor([], dtype=torch.int64)))
    assert empty.sha256 not in digests
    with pytest.raises(InputError, match=r"val 6x6.*: pass image_size=6"):
        splits(val=some(3, side=6))
