"""Images on the disk are those in memory, bit for bit, whoever decodes them and from wherever a pass goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustcompress.data import Batches, DataSplits, Images, Stored, load_data, stored, streaming
from robustcompress.distributed import Parts, World
from robustcompress.errors import InputError
from tests.data.pictures import CLASSES, jpeg, write_folder

SIZE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[DataSplits, DataSplits]:
    """The same images in memory, and on the disk."""
    return load_data(folder, image_size=SIZE, stream=False), load_data(folder, image_size=SIZE, stream=True)


def batches(images: Images | Stored, augment: str = "crop-flip", **options: Any) -> Batches:
    generator = torch.Generator().manual_seed(5)
    return Batches(images, 7, augment=augment, generator=generator, **options)  # type: ignore[arg-type]


def equal(one: list[tuple[Tensor, Tensor]], two: list[tuple[Tensor, Tensor]]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(one, two, strict=True)
    )


def test_the_splits_are_the_same(pair: tuple[DataSplits, DataSplits]) -> None:
    resident, streamed = pair
    assert isinstance(resident.train, Images) and isinstance(streamed.train, Stored)
    assert torch.equal(resident.val.pixels, streamed.val.pixels)
    assert torch.equal(resident.test.pixels, streamed.test.pixels)
    assert torch.equal(resident.train.labels, streamed.train.labels)
    assert torch.equal(resident.train.pixels, streamed.train.first(10**6).pixels)
    assert streamed.image_shape == (3, SIZE, SIZE) and streamed.classes == CLASSES
    assert "54 training images stay on the disk" in streamed.notes[-1]
    some = torch.tensor([3, 50, 3])
    assert torch.equal(streamed.train.subset(some).pixels, resident.train.pixels[some])
    assert streamed.train.first(5) is streamed.train.first(5), "strategies ask for the same ones again and again"


@pytest.mark.parametrize("augment", ["none", "crop", "crop-flip"])
def test_batches_are_those_of_resident_images(pair: tuple[DataSplits, DataSplits], augment: str) -> None:
    resident, streamed = pair
    for drop_last in (False, True):
        one, two = (batches(data.train, augment, drop_last=drop_last) for data in pair)
        assert len(one) == len(two)
        for _ in range(2):
            assert equal(list(one), list(two))
    assert equal(list(Batches(resident.train, 10)), list(Batches(streamed.train, 10)))  # in order


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop"])
def test_workers_change_nothing(folder: Path, augment: str) -> None:
    found = [
        list(batches(load_data(folder, image_size=SIZE, stream=True, workers=workers).train, augment))
        for workers in (1, 2, 5)
    ]
    assert equal(found[0], found[1]) and equal(found[0], found[2])


@pytest.mark.parametrize("augment", ["crop-flip", "resized-crop"])
def test_a_pass_goes_on_in_the_middle_and_in_parts(pair: tuple[DataSplits, DataSplits], augment: str) -> None:
    for data in pair:
        loader = batches(data.train, augment)
        whole = list(loader.iterate(3))
        assert equal(whole[4:], list(loader.iterate(3, start=4)))
        for parts, world in ((2, 2), (4, 2), (9, 3)):  # the last batch has five images: some parts have none
            for rank in range(world):
                mine = Parts(parts, World(rank=rank, size=world))
                own = slice(mine.own.start, mine.own.stop)
                for (x, y), (u, v) in zip(whole[2:], loader.iterate(3, start=2, parts=mine), strict=True):
                    assert torch.equal(torch.cat(torch.tensor_split(x, parts)[own]), u)
                    assert torch.equal(torch.cat(torch.tensor_split(y, parts)[own]), v)


def test_only_what_is_wanted_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = load_data(folder, image_size=SIZE, stream=True, workers=2).train
    seen: list[str] = []
    whole = stored.decoded
    monkeypatch.setattr(
        stored, "decoded", lambda content, name, **kw: (seen.append(name), whole(content, name, **kw))[1]
    )
    loader = batches(train)
    list(loader.iterate(0, parts=Parts(2, World(rank=1, size=2))))
    assert len(seen) == len(set(seen)) == sum(n - (n + 1) // 2 for n in [7] * 7 + [5])
    seen.clear()
    running = iter(loader)
    next(running)
    assert 7 <= len(seen) <= 7 * (stored.AHEAD + 1), "no more than a few batches ahead"
    running.close()  # type: ignore[attr-defined]
    count = len(seen)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    assert len(seen) == count


def test_extra_images_share_the_batches(folder: Path, pair: tuple[DataSplits, DataSplits], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "extra.npz", image=pixels, label=np.arange(30) % 3)
    for augment in ("crop-flip", "resized-crop"):
        found = []
        for data in pair:
            mixed = load_data(data, extra=tmp_path / "extra.npz", extra_ratio=0.5)
            loader = batches(mixed.train, augment, drop_last=True, extra=mixed.extra)
            found.append(list(loader.iterate(1)))
            for rank in range(3):
                mine = list(loader.iterate(1, parts=Parts(3, World(rank=rank, size=3))))
                for (x, y), (u, v) in zip(found[-1], mine, strict=True):
                    assert torch.equal(torch.tensor_split(x, 3)[rank], u)
                    assert torch.equal(torch.tensor_split(y, 3)[rank], v)
        if augment == "crop-flip":
            assert equal(*found)
        for (x, y), (u, v) in zip(*found, strict=True):
            assert torch.equal(y, v) and torch.equal(x[3:], u[3:]), "those in memory are cropped alike"


def test_who_is_asked_to_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(load_data(folder, image_size=SIZE).train, Images)
    monkeypatch.setattr(streaming, "whole_memory", lambda: 16 * 60 * 3 * SIZE * SIZE - 1)
    assert isinstance(load_data(folder, image_size=SIZE).train, Stored)
    assert isinstance(load_data(folder, image_size=SIZE, stream=False).train, Images)
    assert isinstance(load_data(folder, image_size=SIZE, train_limit=59).train, Images), "fewer are used"
    with pytest.raises(InputError, match="stream=True: digits is in memory already"):
        load_data("digits", stream=True)
    with pytest.raises(InputError, match=r"stream='sometimes'.*\n.*workers=0"):
        load_data(folder, stream="sometimes", workers=0)  # type: ignore[arg-type]
    monkeypatch.setattr(streaming, "room", lambda: 1000)
    with pytest.raises(InputError, match=r"6 validation and 12 test images take .* pass a smaller test_limit"):
        load_data(folder, image_size=SIZE, stream=True)


def test_limits_and_a_second_load_leave_them_on_the_disk(
    folder: Path, pair: tuple[DataSplits, DataSplits], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, streamed = pair
    fewer = load_data(streamed, train_limit=20, test_limit=5)
    assert isinstance(fewer.train, Stored) and len(fewer.train) == 20 and len(fewer.test) == 5
    with pytest.raises(InputError, match="does not resize images that are on the disk"):
        load_data(streamed, image_size=16)
    monkeypatch.setattr("robustcompress.data.sources.HELD_OUT", 4)
    few = load_data(folder, image_size=SIZE, stream=True)
    assert (len(few.val), len(few.test), len(few.train)) == (4, 4, 56)
    assert "4 of 12 test images" in few.notes[-1]
    assert len(load_data(folder, image_size=SIZE, stream=True, test_limit=9).test) == 9


def test_the_digest_tells_data_apart_without_reading_them(folder: Path, tmp_path: Path) -> None:
    load = lambda **options: load_data(folder, stream=True, **({"image_size": SIZE} | options)).sha256  # noqa: E731
    assert load() == load(workers=3) != load(image_size=20)
    assert load() != load(seed=1), "another split"
    import shutil

    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert load_data(copy, image_size=SIZE, stream=True).sha256 == load(), "the place does not count"
    (copy / "train" / "ant" / "000.jpg").write_bytes(jpeg(77))
    assert load_data(copy, image_size=SIZE, stream=True).sha256 != load()


def test_damaged_images_are_named_before_training_and_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "p", train=8)
    (root / "train" / "ant" / "001.jpg").write_text("<html>not found</html>")
    (root / "train" / "bee" / "002.jpg").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_data(root, image_size=SIZE, stream=True, val_fraction=0.05)
    assert "001.jpg is corrupt (not an image)" in str(caught.value) and "002.jpg is corrupt" in str(caught.value)
    for name in ("ant/001.jpg", "bee/002.jpg"):
        (root / "train" / name).write_bytes(jpeg(5))
    whole = jpeg(9, (80, 80))
    (root / "train" / "cat" / "003.jpg").write_bytes(whole[: len(whole) // 2])  # its header is fine
    data = load_data(root, image_size=SIZE, stream=True, val_fraction=0.05)
    with pytest.raises(InputError, match=r"cat/003\.jpg is corrupt \(image file is truncated"):
        for augment in ("crop-flip", "resized-crop"):
            list(batches(data.train, augment))
    (root / "train" / "cat" / "003.jpg").unlink()
    with pytest.raises(InputError, match=r"cat/003\.jpg cannot be read \(No such file"):
        list(batches(data.train))


def test_images_of_several_sizes_need_one(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "p", train=6, size=(40, 40))
    assert load_data(root, stream=True).image_shape == (3, 40, 40)
    (root / "train" / "bee" / "003.jpg").write_bytes(jpeg(5, (48, 40)))
    with pytest.raises(InputError, match=r"003.jpg is 48x40.*: pass image_size=40"):
        load_data(root, stream=True)


def test_an_image_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    claim = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", claim) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    root = write_folder(tmp_path / "p", train=6)
    (root / "train" / "ant" / "bomb.png").write_bytes(bomb)
    for stream in (True, False):
        with pytest.raises(InputError, match=r"bomb\.png is too large"):
            load_data(root, image_size=SIZE, stream=stream, val_fraction=0.05)
