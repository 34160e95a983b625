"""Extra training images: read safely, mixed exactly, and never those that are held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.data import Batches, DataSplits, Extra, load_data
from robustcompress.errors import InputError
from robustcompress.robust import PGDAT, RSLAD
from tests.cli.conftest import Run
from tests.cli.conftest import run as run  # the fixture
from tests.strategies.nets import QUICK_RECIPE, SIZE, build, same, small_data, state
from tests.strategies.test_resume import assert_equal, until_finished
from tests.test_teacher import Means

QUICK: dict[str, Any] = {"objective": PGDAT(steps=1), "recipe": QUICK_RECIPE, "attacks": (), "progress": False}


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return small_data()


def jittered(data: DataSplits, count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An honest generator: training images, with noise, so that none is any image of the data."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(data.train), (count,), generator=generator)
    pixels = data.train.pixels[chosen].float()
    noisy = (pixels + 20 * torch.randn(pixels.shape, generator=generator)).round().clamp(0, 255).to(torch.uint8)
    return noisy.permute(0, 2, 3, 1).numpy(), data.train.labels[chosen].numpy()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, data: DataSplits) -> Path:
    path = tmp_path_factory.mktemp("extra") / "made.npz"
    image, label = jittered(data, 50)
    np.savez(path, image=image, label=label.astype(np.int32))
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_the_file_is_read_as_it_was_written(compressed: bool, data: DataSplits, tmp_path: Path) -> None:
    image, label = jittered(data, 30)
    path = tmp_path / "x.npz"
    (np.savez_compressed if compressed else np.savez)(path, other=np.zeros(3), label=label, image=image)
    extra = load_data(data, extra=path, extra_ratio=0.4).extra
    assert extra is not None and extra.labels is not None and len(extra) == 30
    assert isinstance(extra.pixels, np.memmap) is not compressed
    some = torch.tensor([29, 0, 7, 7])
    assert np.array_equal(extra.take(some).permute(0, 2, 3, 1).numpy(), image[some.numpy()])
    assert np.array_equal(extra.labels.numpy(), label)
    assert extra.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert extra.told()["labels"] == "file" and str(tmp_path) not in str(extra.told())


def numbered(count: int, first: int) -> torch.Tensor:
    """Images that say their number in every pixel."""
    return (torch.arange(count) + first).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def numbered_extra(count: int, ratio: float) -> Extra:
    pixels = numbered(count, 100).permute(0, 2, 3, 1).numpy()
    return Extra(name="n", sha256="0", pixels=pixels, labels=torch.arange(count) + 100, ratio=ratio)


def batches(own: int, extra: Extra, size: int, seed: int = 0) -> Batches:
    images = rc.data.Images(numbered(own, 0).contiguous(), torch.arange(own))
    return Batches(images, size, generator=torch.Generator().manual_seed(seed), drop_last=True, extra=extra)


@pytest.mark.parametrize(("size", "ratio", "share"), [(10, 0.7, 7), (10, 0.5, 5), (8, 0.1, 1), (9, 0.3, 3)])
def test_every_batch_has_its_share_and_an_epoch_is_a_pass_over_the_own_images(
    size: int, ratio: float, share: int
) -> None:
    loader = batches(60, numbered_extra(40, ratio), size)
    steps = 60 // (size - share)
    assert len(loader) == steps
    own: Counter[int] = Counter()
    others: Counter[int] = Counter()
    epochs = 5
    for _ in range(epochs):
        found: list[int] = []
        seen = list(loader)
        assert len(seen) == steps
        for x, y in seen:
            values = (x[:, 0, 0, 0] * 255).round().long()
            assert len(y) == size and torch.equal(values, y), "labels stay with their images"
            assert int((y >= 100).sum()) == share
            found += y[y < 100].tolist()
            others.update(y[y >= 100].tolist())
        assert len(set(found)) == len(found) == steps * (size - share), "no own image comes twice in an epoch"
        own.update(found)
    assert sum(others.values()) == epochs * steps * share
    assert max(others.values()) - min(others.get(n, 0) for n in range(100, 140)) <= 1, "none twice before all once"


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    extra = numbered_extra(23, 0.6)
    one, other = batches(30, extra, 10), batches(30, extra, 10)
    whole = [[y.tolist() for _, y in one] for _ in range(4)]
    assert [[y.tolist() for _, y in other.iterate(epoch)] for epoch in (3, 0)] == [whole[3], whole[0]]
    assert [y.tolist() for _, y in other.iterate(2, start=3)] == whole[2][3:]
    assert [y.tolist() for _, y in batches(30, extra, 10, seed=1)] != whole[0] != whole[1]


def test_extra_images_are_augmented_like_the_others() -> None:
    extra = numbered_extra(40, 0.5)
    images = rc.data.Images(numbered(40, 1).contiguous(), torch.arange(40))
    made = Batches(images, 20, augment="crop", generator=torch.Generator().manual_seed(0), drop_last=True, extra=extra)
    x = torch.cat([x[10:] for x, _ in made])
    moved = (x == 0).flatten(1).any(1)  # the border of zeros has come in
    assert 0.5 < float(moved.float().mean()) < 1


def test_without_extra_images_nothing_has_changed(data: DataSplits) -> None:
    """Order and shifts as they were drawn before there were any."""
    loader = Batches(data.train, 16, augment="crop", generator=torch.Generator().manual_seed(3))
    digest = hashlib.sha256(b"3/0").digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    order = torch.randperm(len(data.train), generator=generator)
    assert torch.equal(torch.cat([y for _, y in loader]), data.train.labels[order])


def test_what_cannot_be_used_is_refused(data: DataSplits, tmp_path: Path) -> None:
    image, label = jittered(data, 12)
    bad_zip, truncated = tmp_path / "bad.npz", tmp_path / "cut.npz"
    bad_zip.write_bytes(b"no zip")
    np.savez(truncated, image=image, label=label)
    truncated.write_bytes(truncated.read_bytes()[:2000])
    cases: list[tuple[dict[str, Any] | Path, dict[str, Any], str]] = [
        ({"image": image}, {}, "holds no 'label'.*pseudo_label"),
        ({"images": image, "label": label}, {}, "holds images, label, and no 'image'"),
        ({"image": image.astype(np.float32), "label": label}, {}, r"image is float32 .* must be uint8"),
        ({"image": image.transpose(0, 3, 1, 2), "label": label}, {}, r"image is uint8 \[12, 3"),
        ({"image": np.asfortranarray(image), "label": label}, {}, "in Fortran order"),
        ({"image": image[:, :8, :8], "label": label}, {}, f"8x8, and the data's are {SIZE}x{SIZE}"),
        ({"image": image[:0], "label": label[:0]}, {}, "holds no images"),
        ({"image": image, "label": label[:-1]}, {}, "12 images and 11 labels"),
        ({"image": image, "label": label + 5}, {}, "out of range: 10 classes"),
        ({"image": image, "label": label.astype(float)}, {}, "label is float64"),
        ({"image": image, "label": np.array([object()] * 12)}, {}, "Python objects, which are pickles"),
        (bad_zip, {}, "cannot be read as an .npz"),
        (truncated, {}, "cannot be read as an .npz"),
        (tmp_path / "none.npz", {}, "there is no such file"),
        ({"image": image, "label": label}, {"extra_ratio": 1.0}, "extra_ratio=1.0"),
        ({"image": image, "label": label}, {"extra_ratio": "much"}, "extra_ratio='much'"),
    ]
    for number, (content, options, said) in enumerate(cases):
        path = content if isinstance(content, Path) else tmp_path / f"{number}.npz"
        if not isinstance(content, Path):
            np.savez(path, **content)
        with pytest.raises(InputError, match=said):
            load_data(data, extra=path, **options)
    with pytest.raises(InputError, match="name their file"):
        load_data(data, extra_ratio=0.5)
    with pytest.raises(InputError, match="does not resize the extra images"):
        np.savez(tmp_path / "fine.npz", image=image, label=label)
        load_data(load_data(data, extra=tmp_path / "fine.npz"), image_size=8)


def test_a_header_that_lies_allocates_nothing(data: DataSplits, tmp_path: Path) -> None:
    import io
    import zipfile

    def lying(shape: tuple[int, ...]) -> bytes:
        held = io.BytesIO()
        np.lib.format.write_array_header_1_0(held, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return held.getvalue() + bytes(10)

    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{kind}.npz"
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("image.npy", lying((10**9, SIZE, SIZE, 3)))
        with pytest.raises(InputError, match="and holds 10 bytes: damaged"):
            load_data(data, extra=path, pseudo_label="teacher")


def test_what_does_not_fit_into_memory_is_told_how_to_stay_on_the_disk(
    data: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, label = jittered(data, 12)
    np.savez_compressed(tmp_path / "c.npz", image=image, label=label)
    monkeypatch.setattr("robustcompress.data.extra.room", lambda: 1000)
    with pytest.raises(InputError, match=r"write it with numpy\.savez, not savez_compressed"):
        load_data(data, extra=tmp_path / "c.npz")


@pytest.mark.parametrize("part", ["test", "val"])
def test_images_that_are_held_out_are_refused(part: str, data: DataSplits, tmp_path: Path) -> None:
    image, label = jittered(data, 12)
    held = getattr(data, part).pixels[:2].permute(0, 2, 3, 1).numpy()
    image[[3, 8]] = held
    np.savez(tmp_path / "leak.npz", image=image, label=label)
    with pytest.raises(InputError, match=rf"2 of them are {part} images \(numbers 3, 8\)"):
        load_data(data, extra=tmp_path / "leak.npz")
    image[[3, 8]] = data.train.pixels[:2].permute(0, 2, 3, 1).numpy()  # which is no leak
    np.savez(tmp_path / "fine.npz", image=image, label=label)
    assert load_data(data, extra=tmp_path / "fine.npz").extra is not None


def test_limits_keep_them_and_splits_stay_what_they_were(data: DataSplits, file: Path) -> None:
    mixed = load_data(data, extra=file)
    assert mixed.extra is not None and mixed.extra.ratio == 0.7 and mixed.sha256 == data.sha256
    assert "70 % of each training batch is from made.npz (50 images)" in mixed.notes[-1]
    assert "3.3 times as long" in mixed.notes[-1]
    assert load_data(mixed, test_limit=10).extra is mixed.extra
    assert torch.equal(mixed.train.pixels, data.train.pixels)


def test_a_run_with_extra_images_learns_from_them_and_goes_on_bit_equal(
    data: DataSplits, file: Path, tmp_path: Path
) -> None:
    mixed = load_data(data, extra=file, extra_ratio=0.5)
    go = lambda about, **kept: rc.compress(build("residual"), "uniform", data=about, epochs=3.0, **QUICK, **kept)  # noqa: E731
    whole, plain = go(mixed), go(data)
    assert not same(state(whole.model), state(plain.model)) and "extra" not in plain.data
    told = whole.data["extra"]
    assert (told["images"], told["ratio"], told["labels"]) == (50, 0.5, "file") and told["name"] == "made.npz"
    own = QUICK_RECIPE.batch_size - round(0.5 * QUICK_RECIPE.batch_size)
    first = [next(record for record in found.history if "steps" in record)["steps"] for found in (whole, plain)]
    assert first[0] == len(data.train) // own > first[1]
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    with pytest.raises(rc.OutOfTime):
        go(mixed, **kept)
    with pytest.raises(InputError, match="extra:"):
        go(load_data(data, extra=file, extra_ratio=0.6), **kept)
    resumed, _ = until_finished(lambda: go(mixed, **kept), rc.OutOfTime)
    assert_equal(resumed, whole)


def test_pseudo_labels_are_the_teachers(data: DataSplits, tmp_path: Path) -> None:
    image, label = jittered(data, 300)
    np.savez(tmp_path / "unlabelled.npz", image=image)
    np.savez(tmp_path / "labelled.npz", image=image, label=label)
    wise = Means(data.train)
    with torch.no_grad():
        answers = wise(torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255).argmax(1)
    assert 0.5 < float((answers.numpy() == label).mean()) < 1, "it must differ from the file to be told apart"
    mixed = load_data(data, extra=tmp_path / "unlabelled.npz", pseudo_label="teacher")
    go = lambda about, **more: rc.compress(build("residual"), "uniform", data=about, epochs=1.0, **(QUICK | more))  # noqa: E731
    with pytest.raises(InputError, match="pseudo_label='teacher' wants a teacher"):
        go(mixed)
    found = go(mixed, teacher=wise)  # asked for labels alone: no loss needs it
    assert mixed.extra is not None and found.data["extra"]["labels"] == "teacher"
    by_hand = dataclasses.replace(mixed, extra=dataclasses.replace(mixed.extra, labels=answers, labelled_by="file"))
    same_labels = go(by_hand)
    assert same(state(found.model), state(same_labels.model))
    assert found.data["extra"]["labels_sha256"] == same_labels.data["extra"]["labels_sha256"]
    over_the_file = load_data(data, extra=tmp_path / "labelled.npz", pseudo_label="teacher")
    told = go(over_the_file, teacher=wise, objective=RSLAD(steps=1)).data["extra"]
    assert told["labels_sha256"] == found.data["extra"]["labels_sha256"]
    saved = rc.compress(
        rc.build_model("resnet8", num_classes=10, width=0.25)[0], "none", data=data, epochs=1.0, **QUICK
    )
    place = saved.save(tmp_path / "labeller")
    by_result = load_data(data, extra=tmp_path / "unlabelled.npz", pseudo_label=place)
    told = go(by_result).data["extra"]
    with torch.no_grad():
        theirs = saved.model(torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255).argmax(1)
    assert told["labels_sha256"] == hashlib.sha256(theirs.numpy().tobytes()).hexdigest()
    assert told["labels"] == "labeller"


def test_a_batch_too_small_to_divide_is_refused_before_training(data: DataSplits, file: Path) -> None:
    mixed = load_data(data, extra=file, extra_ratio=0.01)
    with pytest.raises(InputError, match=r"extra_ratio=0.01 of a batch of .* is 0 images"):
        rc.compress(nn.Sequential(), "uniform", data=mixed, **QUICK)


def test_from_the_shell_and_in_recipes(run: Run, tmp_path: Path) -> None:
    from robustcompress.recipe import RunRecipe
    from robustcompress.recipe_text import without_places

    digits = load_data("digits", train_limit=200, test_limit=20)
    image, label = jittered(digits, 60)
    np.savez(tmp_path / "more.npz", image=image, label=label)
    small = ["--model-arg", "stem_stride=4", "--epochs", "0.4", "--attack-steps", "1", "--eps", "0.1", "--quiet"]
    small += ["--train-limit", "200", "--test-limit", "20", "--batch-size", "64", "--attacks", "clean"]
    words = ["--strategy", "uniform", *small, "--extra", tmp_path / "more.npz", "--extra-ratio", "0.5", "--json"]
    done = run("compress", "resnet8", *words)
    assert done.code == 0 and done.document["data"]["extra"]["ratio"] == 0.5
    done = run("compress", "resnet8", "--strategy", "uniform", *small, "--extra-ratio", "0.5")
    assert done.code == 2 and "name their file" in done.err
    keys = {"source": "digits", "extra": str(tmp_path / "more.npz"), "extra_ratio": 0.5, "train_limit": 200}
    recipe = RunRecipe.from_mapping({"model": "resnet8", "strategy": "grape", "data": keys})
    assert recipe.load_data().extra is not None
    assert RunRecipe.from_mapping(recipe.to_json()) == recipe
    assert without_places(recipe.to_json())["data"]["extra"].endswith("(more.npz)")
