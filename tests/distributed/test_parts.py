"""Who has which part of a batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from robustcompress.data import Batches, Extra, Images
from robustcompress.distributed import ALONE, Parts, World, plan
from robustcompress.errors import InputError


@pytest.mark.parametrize(("count", "total", "size"), [(22, 4, 4), (22, 6, 4), (7, 7, 3), (128, 2, 2), (5, 1, 1)])
def test_parts_are_those_of_tensor_split_each_given_to_one_process(count: int, total: int, size: int) -> None:
    rows = torch.arange(count)
    expected = [part.tolist() for part in torch.tensor_split(rows, total)]
    found: list[list[int]] = []
    for rank in range(size):
        parts = Parts(total, World(rank, size))
        sizes = [size for _, size in parts.cut(count)]
        assert [number for number, _ in parts.cut(count)] == list(parts.own)
        assert len(parts.own) in (total // size, -(-total // size))
        found += [part.tolist() for part in torch.split(rows[parts.rows(count)], sizes)]
    assert found == expected


@pytest.mark.parametrize(("count", "total", "wanted"), [(22, 2, 4), (22, 4, 8), (10, 4, 8), (5, 2, 16), (6, 1, 6)])
def test_cutting_finer_moves_no_image_to_another_process(count: int, total: int, wanted: int) -> None:
    numbers: list[int] = []
    for rank in range(min(2, total)):
        parts = Parts(total, World(rank, min(2, total)))
        finer = parts.finer(wanted)
        assert finer.rows(count) == parts.rows(count)
        cut = finer.cut(count)
        assert sum(size for _, size in cut) == sum(size for _, size in parts.cut(count))
        assert max(size for _, size in cut) <= max(1, -(-count // total * total) // wanted + 1)
        numbers += [number for number, _ in cut]
    assert len(set(numbers)) == len(numbers)
    assert Parts(1).finer(1).whole and not Parts(1).finer(2).whole


def test_how_many_parts_there_are() -> None:
    two, four = World(0, 2), World(0, 4)
    assert plan(1, ALONE).total == 1 and plan(6, ALONE).total == 6
    assert plan(1, two).total == 2 and plan(4, two).total == 4 and plan(3, two).total == 3
    assert plan(1, two, recorded=4).total == 4, "begun with four processes, or four parts"
    assert plan(1, ALONE, recorded=4).total == 4
    assert plan(2, ALONE, recorded=4).total == 2, "which the checkpoint will refuse"
    with pytest.raises(InputError, match=r"accumulate=3 leaves 1 of 4 processes.*accumulate=4"):
        plan(3, four)
    with pytest.raises(InputError, match=r"4 processes cannot share 2 parts.*start 2 at most.*accumulate=4"):
        plan(1, four, recorded=2)
    with pytest.raises(InputError, match="a batch of 3 images cannot be cut into 4 parts"):
        plan(4, two).check(3)
    assert "some wait for others" in str(plan(3, two)) and "wait" not in str(plan(4, two))


@pytest.mark.parametrize("extra", [None, 0.4])
def test_the_parts_of_a_batch_make_up_the_batch(extra: float | None) -> None:
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8, generator=drawn)
    more = None
    if extra is not None:
        many = torch.randint(256, (50, 8, 8, 3), dtype=torch.uint8, generator=drawn)
        more = Extra(name="more", sha256="", pixels=many.numpy(), labels=torch.arange(50) % 5, ratio=extra)
    batches = Batches(
        Images(pixels, torch.arange(30) % 5),
        11,
        augment="crop-flip",
        generator=torch.Generator().manual_seed(3),
        drop_last=extra is not None,
        extra=more,
    )
    shares = [batches.iterate(2, start=1, parts=Parts(4, World(rank, 3))) for rank in range(3)]
    for index, ((x, y), *own) in enumerate(itertools.zip_longest(batches.iterate(2, start=1), *shares), 1):
        assert len(y) == batches.size(index)
        assert torch.equal(torch.cat([part for part, _ in own]), x)
        assert torch.equal(torch.cat([labels for _, labels in own]), y)
