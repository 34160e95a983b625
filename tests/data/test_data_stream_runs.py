"""Whole runs over images on the disk: they give what runs over the same images in memory give."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import robustcompress as rc
from robustcompress.data import DataSplits, Images, Stored, load_data
from robustcompress.distributed import ALONE
from robustcompress.errors import InputError
from robustcompress.recipe import RunRecipe
from robustcompress.robust import PGDAT
from tests.cli.conftest import Run
from tests.cli.conftest import run as run  # the fixture
from tests.data.jobs import train_from_disk
from tests.distributed.spawned import together
from tests.strategies.nets import QUICK_RECIPE, SIZE, build, same, small_data, state
from tests.strategies.test_resume import assert_equal, until_finished

QUICK: dict[str, Any] = {"objective": PGDAT(steps=1), "attacks": (), "progress": False, "epochs": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the tests' own data set, as files that lose nothing."""
    root, data = tmp_path_factory.mktemp("files"), small_data()
    for split in ("train", "test"):
        images: Images = getattr(data, split)  # type: ignore[assignment]
        for number, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
            (root / split / data.classes[label]).mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            picture.save(root / split / data.classes[label] / f"{number:05d}.png")
    return root


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[DataSplits, DataSplits]:
    return load_data(folder, stream=False), load_data(folder, stream=True)


def go(data: DataSplits, strategy: str = "uniform", **kept: Any) -> rc.CompressResult:
    return rc.compress(build("residual"), strategy, data=data, **({"recipe": QUICK_RECIPE} | QUICK | kept))


@pytest.mark.parametrize("strategy", ["uniform", "grape", "hydra"])
def test_a_run_is_that_of_images_in_memory(pair: tuple[DataSplits, DataSplits], strategy: str) -> None:
    assert isinstance(pair[1].train, Stored) and pair[1].image_shape == (3, SIZE, SIZE)
    resident, streamed = (go(data, strategy) for data in pair)
    assert same(state(resident.model), state(streamed.model)) and resident.edits == streamed.edits
    assert resident.data["sha256"] != streamed.data["sha256"] and streamed.data["train"] == len(pair[0].train)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", sorted(rc.STRATEGIES))
def test_every_strategy_runs_over_images_on_the_disk(pair: tuple[DataSplits, DataSplits], strategy: str) -> None:
    resident, streamed = (go(data, strategy) for data in pair)
    assert same(state(resident.model), state(streamed.model))


def test_a_run_goes_on_from_its_checkpoint(pair: tuple[DataSplits, DataSplits], folder: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(QUICK_RECIPE, augment="resized-crop")
    whole = go(pair[1], recipe=recipe)
    assert not same(state(whole.model), state(go(pair[1]).model))
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0, "recipe": recipe}
    with pytest.raises(rc.OutOfTime):
        go(pair[1], **kept)
    with pytest.raises(InputError, match="data: "):
        go(pair[0], **kept)
    again = load_data(folder, stream=True, workers=3)
    resumed, _ = until_finished(lambda: go(again, **kept), rc.OutOfTime)
    assert_equal(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, {"augment": "resized-crop", "optimizer": "lamb", "lr": 0.01, "warmup": 0.2}])
def test_each_of_two_processes_decodes_its_own_images_and_both_train_as_one(
    folder: Path, recipe: dict[str, Any]
) -> None:
    whole = train_from_disk(ALONE, str(folder), recipe)
    both = together(2, train_from_disk, str(folder), recipe)
    for found in both:
        for name, values in whole["weights"].items():
            assert np.array_equal(found["weights"][name], values), name
    if not recipe:
        mine, theirs = (set(found["seen"]) for found in both)
        assert mine and not mine & theirs and mine | theirs == set(whole["seen"])


def test_from_the_shell_and_in_recipes(run: Run, folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "test"):
        with tarfile.open(shards / f"{split}-000000.tar", "w") as archive:
            for file in sorted((folder / split).rglob("*.png")):
                label = io.BytesIO(file.parent.name.encode())
                archive.add(file, f"{file.parent.name}/{file.name}")
                info = tarfile.TarInfo(f"{file.parent.name}/{file.stem}.cls")
                info.size = len(label.getvalue())
                archive.addfile(info, label)
    words = ["--strategy", "uniform", "--epochs", "0.4", "--attack-steps", "1", "--eps", "0.1", "--quiet"]
    words += ["--batch-size", "64", "--attacks", "clean", "--image-size", "16", "--model-arg", "stem_stride=2"]
    results = []
    for place, more in ((folder, ()), (shards, ("--data-workers", "2"))):
        out = tmp_path / f"result-{place.name}"
        assert run("compress", "resnet8", "--data", place, *words, "--stream", "yes", "--out", out, *more).code == 0
        results.append(rc.load(out))
    assert same(state(results[0].model), state(results[1].model))
    done = run("compress", "resnet8", "--data", "digits", "--stream", "yes", *words)
    assert done.code == 2 and "is in memory already" in done.err
    keys = {"source": str(shards), "stream": True, "workers": 2, "image_size": 16}
    recipe = RunRecipe.from_mapping({"model": "resnet8", "strategy": "grape", "data": keys})
    assert isinstance(recipe.load_data().train, Stored)
    assert RunRecipe.from_mapping(recipe.to_json()) == recipe
