"""The recipe that lies beside a result makes it again, or says what it cannot say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import robustcompress as rc
from robustcompress.recipe import RunRecipe
from robustcompress.recipe_text import MISSING, missing, recipe_text
from robustcompress.result import HISTORY, RECIPE, WEIGHTS
from robustcompress.robust.objectives import PGDAT
from tests.cli.conftest import Run

TINY = {
    "model": {"name": "resnet8", "width": 0.25, "stem_stride": 4},
    "data": {"source": "digits", "train_limit": 60, "test_limit": 20, "seed": 1},
    "strategy": "magnitude",
    "objective": {"name": "pgd-at", "steps": 1},
    "training": {"batch_size": 32},
    "evaluate": {"attacks": ["clean"]},
    "epochs": 1,
    "seed": 2,
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def same_network(a: Path, b: Path) -> bool:
    return (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()


def test_a_run_leaves_the_recipe_that_makes_it_again(run: Run, tiny: Path, tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("first", "second", "again")]
    for place in places[:2]:
        assert run("compress", tiny, "--set", "budget.macs=0.6", "--out", place, "--device", "cpu").code == 0
    assert run("run", places[0] / RECIPE, "--out", places[2], "--device", "cpu").code == 0
    assert same_network(places[0], places[1]) and same_network(places[0], places[2])
    texts = {(place / RECIPE).read_text() for place in places}
    assert len(texts) == 1
    said = yaml.safe_load(texts.pop())
    assert said["budget"] == {"macs": 0.6} and said["training"]["weight_decay"] > 0, "defaults are written out"
    losses = [[json.loads(line).get("loss") for line in (p / HISTORY).read_text().splitlines()] for p in places]
    assert losses[0] == losses[1] == losses[2]


def test_a_recipe_from_flags_makes_the_same_network(run: Run, tmp_path: Path) -> None:
    flags = ["--strategy", "uniform", "--epochs", "1", "--attack-steps", "1", "--test-images", "10", "--seed", "3"]
    flags += ["--train-limit", "60", "--test-limit", "20", "--model-arg", "width=0.25", "--model-arg", "stem_stride=4"]
    assert run("compress", "resnet8", *flags, "--device", "cpu", "--out", tmp_path / "a").code == 0
    assert run("run", tmp_path / "a" / RECIPE, "--device", "cpu", "--out", tmp_path / "b").code == 0
    assert same_network(tmp_path / "a", tmp_path / "b")


def made(model: Any, data: Any, tmp_path: Path, **options: Any) -> Path:
    out = tmp_path / "out"
    rc.compress(
        model,
        "uniform",
        data=data,
        objective=PGDAT(steps=1),
        epochs=1,
        attacks=(),
        out=out,
        device="cpu",
        progress=False,
        **options,
    )
    return out


def test_what_python_alone_can_say_is_named_and_refused(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model, _ = rc.build_model("resnet8", width=0.25, stem_stride=4)
    images = torch.randint(0, 256, (60, 3, 32, 32), dtype=torch.uint8), torch.arange(60) % 10
    out = made(model, {"train": images, "test": images}, tmp_path)
    text = (out / RECIPE).read_text()
    assert "#   data.source: images that were given as objects" in text and "#   weights: " in text
    refused = run("run", out / RECIPE, "--check")
    assert refused.code == 2 and "data.source is missing" in refused.err and "--set weights=VALUE" in refused.err
    assert "Traceback" not in refused.err
    given = run("run", out / RECIPE, "--check", "--set", "weights=null", "--set", "data.source=digits")
    assert given.code == 0


def test_a_factory_of_ones_own_is_missing(tmp_path: Path) -> None:
    class Own(torch.nn.Sequential):
        pass

    layers = [torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU()]
    model = Own(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10))
    data = rc.load_data("digits", train_limit=60, test_limit=20)
    recipe = yaml.safe_load((made(model, data, tmp_path) / RECIPE).read_text())
    assert recipe["model"].startswith(MISSING) and "(Own)" in recipe["model"]
    assert recipe["data"]["train_limit"] == 60
    with pytest.raises(rc.InputError, match="model is missing"):
        RunRecipe.from_mapping(recipe)


def test_weights_of_a_file_begin_a_run_again(run: Run, tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(9)
    model, _ = rc.build_model("resnet8", num_classes=10, width=0.25, stem_stride=4)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    sets = ["--set", f"weights={tmp_path / 'w.safetensors'}", "--set", "pretrained=true"]
    for name in ("a", "b"):
        assert run("run", tiny, *sets, "--out", tmp_path / name, "--device", "cpu").code == 0
    assert same_network(tmp_path / "a", tmp_path / "b")
    said = yaml.safe_load((tmp_path / "a" / RECIPE).read_text())
    assert said["pretrained"] is True and dict(missing(said)) == {"weights": "the first weights (w.safetensors)"}
    wrong = run("run", tiny, "--set", f"weights={tiny}", "--out", tmp_path / "c")
    assert wrong.code == 2 and "cannot be used" in wrong.err and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--macs", "0.5"], "--macs: write --set budget.macs=VALUE"),
        (["--seed", "0"], "--seed: write --set seed=VALUE"),
        (["--strategy", "grape"], "--strategy: write --set strategy=VALUE"),
        (["--eps", "8/255"], "--eps: write --set threat.eps=VALUE"),
        (["--option", "a=1"], "--option: write --set strategy.KEY=VALUE"),
        (["--download"], "--download: leave it out"),
    ],
)
def test_flags_beside_a_recipe_are_refused(flags: list[str], said: str, run: Run, tiny: Path) -> None:
    ran = run("compress", tiny, *flags, "--check")
    assert ran.code == 2 and said in ran.err and "tiny.yaml is a recipe" in ran.err


def test_check_and_set_are_about_recipes(run: Run, tiny: Path) -> None:
    ran = run("compress", tiny, "--check")
    assert ran.code == 0 and yaml.safe_load(ran.out)["epochs"] == 1
    assert "--set and --check are about recipes" in run("compress", "resnet8", "--check").err


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("epoch=1", "'epochs'"),
        ("budget.mac=1", "'macs'"),
        ("model.widht=1", "'width'"),
        ("strategy.alocation=uniform", "'allocation'"),
        ("data.train_limits=3", "'train_limit'"),
        ("threat.epz=0.1", "'eps'"),
        ("objective.step=3", "'steps'"),
        ("training.weight_dcay=0", "'weight_decay'"),
        ("evaluate.atacks=[clean]", "'attacks'"),
        ("evaluate.certify={sigmas: 1}", "'sigma'"),
        ("budget.min_robust={accuracyy: 0.4}", "'accuracy'"),
    ],
)
def test_unknown_keys_are_named_at_every_depth(setting: str, hint: str, run: Run, tiny: Path) -> None:
    ran = run("compress", tiny, "--set", setting, "--check")
    assert ran.code == 2 and hint in ran.err and "Traceback" not in ran.err, ran.err


def test_the_text_is_yaml_whatever_a_stranger_wrote() -> None:
    recipe = {"data": {"source": f"{MISSING}x\n!!python/object:os.system\n# \x1b[2J"}, "about": "a: b\nc: d"}
    text = recipe_text(recipe)
    assert yaml.safe_load(text) == recipe
    head = text.partition("data:")[0]
    assert all(line.startswith("#") for line in head.splitlines()) and "\x1b" not in head
