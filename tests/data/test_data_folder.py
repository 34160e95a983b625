from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustcompress.data import load_data
from robustcompress.errors import InputError


def write(folder: Path, n: int, colour: int, *, size: tuple[int, int] = (16, 16), suffix: str = "png") -> None:
    """Write `n` images; the first channel is the class's colour, the second numbers the image."""
    folder.mkdir(parents=True)
    for i in range(n):
        array = np.full((size[1], size[0], 3), (colour, i, 0), np.uint8)
        Image.fromarray(array).save(folder / f"{i:03d}.{suffix}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for split, n in (("train", 30), ("test", 10)):
        for colour, name in ((200, "dog"), (40, "cat"), (90, "elk")):
            write(root / split / name, n, colour)
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    return root


def test_split_folders(folder: Path) -> None:
    data = load_data(folder)
    assert data.name == str(folder) and data.classes == ("cat", "dog", "elk") and data.notes == ()
    assert (len(data.train), len(data.val), len(data.test)) == (81, 9, 30)
    for split in (data.train, data.val, data.test):
        colour = torch.tensor([40, 200, 90], dtype=torch.uint8)[split.labels]
        assert torch.equal(split.pixels[:, 0, 5, 5], colour)
    seen = torch.cat(
        [
            data.train.pixels[:, 1, 0, 0].int() + 100 * data.train.labels.int(),
            data.val.pixels[:, 1, 0, 0].int() + 100 * data.val.labels.int(),
        ]
    )
    assert sorted(seen.tolist()) == [100 * c + i for c in range(3) for i in range(30)]
    assert data.test.first(6).classes_present == (0, 1, 2)  # not one class after the other
    assert load_data(str(folder)).sha256 == data.sha256


def test_only_what_is_chosen_is_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustcompress.data import stored as module

    decoded: list[int] = []
    whole = module.decode
    monkeypatch.setattr(
        module, "decode", lambda files, which, **kw: (decoded.append(len(which)), whole(files, which, **kw))[1]
    )
    data = load_data(folder, train_limit=20, test_limit=6)
    assert sum(decoded) == 26
    assert torch.bincount(data.test.labels).tolist() == [2, 2, 2]


def test_validation_folder(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    assert len(load_data(folder).test) == 30  # alone, it is the test set
    for colour, name in ((200, "dog"), (40, "cat"), (90, "elk")):
        write(folder / "test" / name, 4, colour)
    data = load_data(folder)
    assert (len(data.train), len(data.val), len(data.test)) == (90, 30, 12)
    assert len(load_data(folder, train_limit=50).val) == 5


def test_classes_at_the_top(tmp_path: Path) -> None:
    write(tmp_path / "a", 20, 10)
    write(tmp_path / "b" / "nested", 30, 20)
    data = load_data(tmp_path)
    assert torch.bincount(data.test.labels).tolist() == [4, 6]
    assert len(data.train) + len(data.val) == 40
    assert "fixed fifth" in data.notes[0]
    assert torch.equal(load_data(tmp_path, seed=7).test.pixels, data.test.pixels)


def test_jpeg_and_other_modes_are_rgb(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 5, 150, suffix="jpg")
    Image.fromarray(np.full((16, 16), 77, np.uint8)).save(tmp_path / "a" / "grey.png")
    Image.fromarray(np.full((16, 16, 4), 99, np.uint8)).save(tmp_path / "b" / "alpha.png")
    pixels = torch.cat([part.pixels for part in (lambda d: (d.train, d.val, d.test))(load_data(tmp_path))])
    flat = pixels[:, :, 8, 8].tolist()
    assert [77, 77, 77] in flat and [99, 99, 99] in flat
    red = [p for p in flat if abs(p[0] - 150) < 8 and p[2] < 20]
    assert len(red) == 10


def test_large_images_go_through_the_pool_and_are_cropped(tmp_path: Path) -> None:
    for name, colour in (("a", 60), ("b", 180)):
        write(tmp_path / name, 6, colour, size=(160, 120), suffix="jpg")
        write(tmp_path / name / "tall", 6, colour, size=(120, 200), suffix="jpg")
    data = load_data(tmp_path, image_size=32)
    assert data.image_shape == (3, 32, 32)
    for split in (data.train, data.val, data.test):
        colour = torch.tensor([60, 180])[split.labels]
        assert int((split.pixels[:, 0].int() - colour[:, None, None]).abs().max()) <= 3


def test_corrupt_files_are_named(folder: Path) -> None:
    good = (folder / "train" / "cat" / "003.png").read_bytes()
    (folder / "train" / "cat" / "003.png").write_bytes(good[: len(good) // 2])
    (folder / "train" / "dog" / "000.png").write_text("<html>not found</html>")
    with pytest.raises(InputError) as caught:
        load_data(folder)
    assert "003.png is corrupt" in str(caught.value) and "000.png is corrupt (not an image)" in str(caught.value)


def test_differing_sizes_offer_a_remedy(folder: Path) -> None:
    Image.new("RGB", (20, 24)).save(folder / "train" / "cat" / "000.png")
    with pytest.raises(InputError, match=r"000.png is 20x24.*: pass image_size=16"):
        load_data(folder)
    assert load_data(folder, image_size=16).image_shape == (3, 16, 16)


def test_train_and_test_of_different_sizes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "train" / name, 6, 50)
        write(tmp_path / "test" / name, 3, 50, size=(24, 24))
    with pytest.raises(InputError, match="pass image_size=16"):
        load_data(tmp_path)


def test_bad_directories(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean '.*pets'"):
        load_data(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no folders: one per class"):
        load_data(tmp_path / "empty")
    with pytest.raises(InputError, match=r"directory '.*nowhere' does not exist"):
        load_data(tmp_path / "nowhere")
    (tmp_path / "a.zip").write_text("")
    with pytest.raises(InputError, match="is a file: unpack it"):
        load_data(tmp_path / "a.zip")
    (folder / "train" / "fox").mkdir()
    write(folder / "test" / "gnu", 2, 30)
    with pytest.raises(InputError) as caught:
        load_data(folder, train_limit=3, val_fraction=2)
    for part in (
        "class folders that train/ has not: gnu",
        "'fox' (0)",
        "holds no images",
        "train_limit=3",
        "val_fraction=2",
    ):
        assert part in str(caught.value)
    (folder / "train").rename(folder / "training")
    with pytest.raises(InputError, match="has test/ and no train/"):
        load_data(folder)
