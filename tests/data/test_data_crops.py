"""Crops are torchvision's in distribution, and what is cut out is the same on the disk and in memory."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robustcompress.data.crops import AREA, DRAWN, RATIO, crop_box, draw_crops, mirrored, resized_crops
from robustcompress.data.decoding import cropped
from tests.data.pictures import jpeg


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_a_crop_is_in_the_image(width: int, height: int, seed: int) -> None:
    (row,) = draw_crops(1, torch.Generator().manual_seed(seed)).tolist()
    assert len(row) == DRAWN
    left, top, right, lower = crop_box(width, height, row)
    assert 0 <= left < right <= width and 0 <= top < lower <= height


@pytest.mark.parametrize("size", [(500, 375), (64, 64), (40, 300)])
def test_the_boxes_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    from torchvision.transforms import RandomResizedCrop

    count = 3000
    ours = np.array([crop_box(*size, row) for row in draw_crops(count, torch.Generator().manual_seed(0)).tolist()])
    blank = Image.new("L", size)
    torch.manual_seed(0)
    theirs = []
    for _ in range(count):
        top, left, tall, wide = RandomResizedCrop.get_params(blank, AREA, RATIO)
        theirs.append((left, top, left + wide, top + tall))
    for column in range(4):  # Kolmogorov and Smirnov's distance; 1.95 is passed once in a thousand
        a, b = np.sort(ours[:, column]), np.sort(np.array(theirs)[:, column])
        grid = np.arange(max(size) + 1)
        gap = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / count
        assert gap < 1.95 * math.sqrt(2 / count), (column, gap)


def test_half_are_mirrored() -> None:
    rows = draw_crops(2000, torch.Generator().manual_seed(1)).tolist()
    assert abs(sum(map(mirrored, rows)) - 1000) < 5 * math.sqrt(500)


def test_memory_and_disk_cut_out_the_same() -> None:
    side = 48
    pictures = [Image.open(io.BytesIO(jpeg(seed, (side, side)))).convert("RGB") for seed in range(12)]
    drawn = draw_crops(len(pictures), torch.Generator().manual_seed(3))
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    resident = resized_crops(pixels, drawn)
    for picture, row, ours in zip(pictures, drawn.tolist(), resident, strict=True):
        file = io.BytesIO()
        picture.save(file, "PNG")  # lossless, and nothing decodes it at half its size
        theirs = cropped(file.getvalue(), "x", size=(side, side), drawn=row)
        assert int((ours.permute(1, 2, 0).int() - torch.from_numpy(theirs.copy()).int()).abs().max()) <= 2


def test_a_large_jpeg_is_decoded_small_and_looks_the_same() -> None:
    content = jpeg(4, (640, 480))
    (row,) = draw_crops(1, torch.Generator().manual_seed(8)).tolist()
    small = cropped(content, "x", size=(32, 32), drawn=row).astype(int)
    whole = Image.open(io.BytesIO(content)).convert("RGB")
    cut = whole.resize((32, 32), Image.Resampling.BILINEAR, box=crop_box(640, 480, row))
    other = np.asarray(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored(row) else cut).astype(int)
    assert np.abs(small - other).mean() < 2 and np.abs(small - other).max() < 16
