"""Tar shards give what the same files give in folders, and say what is wrong with them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from robustcompress.data import Batches, Stored, load_data
from robustcompress.errors import InputError
from tests.data.pictures import CLASSES, as_shards, jpeg, write_folder, write_shard

SIZE = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(("kind", "names"), [("cls", True), ("cls", False), ("json", False)])
def test_shards_hold_what_the_folder_holds(folder: Path, tmp_path: Path, kind: str, names: bool) -> None:
    shards = as_shards(folder, tmp_path / "shards", kind=kind, names=names)
    assert len(list(shards.glob("train-*.tar"))) == 4
    one, two = load_data(folder, image_size=SIZE), load_data(shards, image_size=SIZE, stream=False)
    assert one.classes == two.classes == CLASSES
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(one, split).pixels, getattr(two, split).pixels)
        assert torch.equal(getattr(one, split).labels, getattr(two, split).labels)
    streamed = load_data(shards, image_size=SIZE, stream=True)
    assert isinstance(streamed.train, Stored)
    resident, ours = (
        list(Batches(data.train, 7, augment="crop-flip", generator=torch.Generator().manual_seed(1)))
        for data in (one, streamed)
    )
    for (x, y), (u, v) in zip(resident, ours, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    again = load_data(shards, image_size=SIZE, stream=True)
    assert again.sha256 == streamed.sha256 != load_data(folder, image_size=SIZE, stream=True).sha256


def test_splits_are_read_from_names_and_directories(tmp_path: Path) -> None:
    def shard(path: Path, first: int, count: int) -> None:
        pairs = [((f"{i}.jpg", jpeg(i)), (f"{i}.cls", str(i % 2).encode())) for i in range(first, first + count)]
        write_shard(path, [member for pair in pairs for member in pair])

    a = tmp_path / "a"
    shard(a / "imagenet1k-train-0000.tar", 0, 12)
    shard(a / "imagenet1k-validation-00.tar", 20, 4)
    data = load_data(a, image_size=SIZE)
    assert (len(data.train) + len(data.val), len(data.test)) == (12, 4) and data.classes == ("0", "1")
    b = tmp_path / "b"
    for name, first, count in (("train", 0, 12), ("val", 20, 4), ("test", 30, 6)):
        shard(b / name / "000.tar", first, count)
    data = load_data(b, image_size=SIZE)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 4, 6)
    c = tmp_path / "c"
    shard(c / "shard-000000.tar", 0, 10)
    assert "a fixed fifth" in load_data(c, image_size=SIZE).notes[0]
    with pytest.raises(InputError, match="is one shard: pass its directory"):
        load_data(c / "shard-000000.tar")
    shard(tmp_path / "d" / "test-0.tar", 0, 4)
    with pytest.raises(InputError, match=r"has no training shards: name them train-000000\.tar"):
        load_data(tmp_path / "d")


def test_a_name_of_any_length_and_members_of_other_kinds(tmp_path: Path) -> None:
    long = "/".join(["d" * 60] * 4)  # more than the header of a tar has room for
    members = [("./readme.txt", b"hello")]
    for i in range(10):
        members += [(f"{long}/{i}.jpg", jpeg(i)), (f"{long}/{i}.json", json.dumps({"cls": i % 2, "w": 3}).encode())]
    write_shard(tmp_path / "s" / "0.tar", members)
    data = load_data(tmp_path / "s", image_size=SIZE, stream=True)
    assert len(data.train) + len(data.val) + len(data.test) == 10
    assert data.train.first(3).pixels.shape == (3, 3, SIZE, SIZE)


def test_what_is_wrong_with_shards_is_said_at_once(tmp_path: Path) -> None:
    root = tmp_path / "s"
    good = [(f"{i}.jpg", jpeg(i)) for i in range(6)]
    labels = [(f"{i}.cls", str(i % 2).encode()) for i in range(6)]
    write_shard(root / "0.tar", good + labels)
    write_shard(root / "1.tar", [*good, *labels[:5], good[0]])
    write_shard(root / "2.tar", [("a.jpg", jpeg(1)), ("a.cls", b"")])
    write_shard(root / "3.tar", [("a.txt", b"nothing")])
    whole = write_shard(root / "4.tar", good + labels).read_bytes()
    (root / "4.tar").write_bytes(whole[: len(whole) // 3])
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x.jpg"))
    (root / "5.tar").write_bytes(packed.getvalue())
    with pytest.raises(InputError) as caught:
        load_data(root, image_size=SIZE)
    said = str(caught.value)
    for part in (
        "1.tar: '0' is there twice",
        "1.tar: '5.jpg' has no 5.cls or 5.json",
        "2.tar cannot be read as a tar archive (a.cls says no class",
        "3.tar holds no images",
        "4.tar cannot be read as a tar archive",
        "6 such complaints",
    ):
        assert part in said, (part, said)


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, '{"label": 1' + "0" * 30 + "}", '{"label": null}', '{"label": 1.5}']
)
def test_labels_that_say_nothing_are_named(text: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "s" / "0.tar", [("a.jpg", jpeg(1)), ("a.json", text.encode())])
    with pytest.raises(InputError, match=r"a\.json (is no JSON|says)"):
        load_data(tmp_path / "s")


def test_a_compressed_shard_and_a_member_that_lies(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x.jpg"))
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "0.tar").write_bytes(packed.getvalue())
    with pytest.raises(InputError, match="shards are plain tar, not compressed"):
        load_data(tmp_path / "z")
    lying = tarfile.TarInfo("0.jpg")
    lying.size = 10**15
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "0.tar").write_bytes(lying.tobuf() + jpeg(0))
    with pytest.raises(InputError, match=r"0\.tar cannot be read"):
        load_data(tmp_path / "y")


def test_classes_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    shards = as_shards(folder, tmp_path / "s", names=False)
    (shards / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(InputError, match="label 2 is out of range: 2 classes"):
        load_data(shards, image_size=SIZE)
    named = as_shards(folder, tmp_path / "n")
    (named / "classes.txt").write_text("ant\nbee\ncats\n")
    with pytest.raises(InputError, match="no class is called 'cat'; did you mean 'cats'"):
        load_data(named, image_size=SIZE)
    members = [("a.jpg", jpeg(1)), ("a.cls", b"ant"), ("b.jpg", jpeg(2)), ("b.cls", b"1")]
    write_shard(tmp_path / "m" / "0.tar", members)
    with pytest.raises(InputError, match=r"classes with names \('ant'\) and numbers \(1\)"):
        load_data(tmp_path / "m", image_size=SIZE)
