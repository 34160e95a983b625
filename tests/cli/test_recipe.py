"""Recipes: read strictly, written back, laid over each other, and run from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import robustcompress as rc
from robustcompress.errors import InputError
from robustcompress.recipe import RunRecipe, merged, read_yaml
from robustcompress.recipe_text import without_places
from robustcompress.strategies import STRATEGIES
from tests.cli.conftest import Run

SMALL = {
    "about": "as small as it goes",
    "model": {"name": "resnet8", "width": 0.5, "stem_stride": 4},
    "data": {"source": "digits", "train_limit": 100, "test_limit": 20},
    "strategy": {"name": "grape", "events": 2},
    "threat": {"norm": "linf", "eps": "16/255"},
    "objective": {"name": "pgd-at", "steps": 1},
    "epochs": 2,
    "training": {"batch_size": 32},
    "evaluate": {"attacks": ["clean", "pgd-2"], "curve": ["8/255", 0.1]},
}


def test_every_key_arrives() -> None:
    recipe = RunRecipe.from_mapping(SMALL | {"budget": {"params": 0.3}, "seed": 7, "round_to": 2})
    assert recipe.model.kwargs == {"width": 0.5, "stem_stride": 4} and recipe.strategy == rc.Grape(events=2)
    assert recipe.threat == rc.ThreatModel("linf", 16 / 255) and recipe.budget == rc.Budget(params=0.3)
    assert recipe.training.batch_size == 32 and recipe.evaluate.curve == (8 / 255, 0.1)
    assert (recipe.epochs, recipe.seed, recipe.round_to) == (2, 7, 2)
    assert RunRecipe.from_mapping(recipe.to_json()) == recipe


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_can_be_written_and_read(name: str) -> None:
    recipe = RunRecipe.from_mapping(SMALL | {"strategy": name})
    assert RunRecipe.from_mapping(recipe.to_json()) == recipe and recipe.strategy.name == name


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epoch": 3}, "key 'epoch' does not exist; did you mean 'epochs'?"),
        ({"model": None}, "key 'model' is missing"),
        ({"model": "resnet9"}, "did you mean 'resnet8'"),
        ({"model": "os:system"}, "would import code"),
        ({"strategy": {"name": "grape", "event": 3}}, "option 'event' does not exist; did you mean 'events'"),
        ({"strategy": ["grape"]}, "give a name, or a mapping with 'name'"),
        ({"data": {"sources": "digits"}}, "key 'sources' does not exist; did you mean 'source'"),
        ({"budget": {"mac": 0.5}}, "key 'mac' does not exist"),
        ({"threat": {"eps": "8/0"}}, "'8/0' is no number"),
        ({"objective": "pgdat"}, "did you mean 'pgd-at'"),
        ({"training": {"lr": -1}}, "lr=-1"),
        ({"training": 3}, "training=3: give keys and values"),
        ({"evaluate": {"attacks": ["pdg-20"]}}, "pdg-20"),
        ({"evaluate": {"images": 0}}, "images=0"),
        ({"evaluate": {"attacks": "autoattack"}}, "attacks='autoattack': must be a list"),
        ({"evaluate": {"attacks": ["clean"], "autoattack_images": 9}}, "'autoattack' is not among the attacks"),
        ({"evaluate": {"curve": 0.1}}, "curve=0.1: must be a list"),
        ({"evaluate": {"curve": [0.1, -1]}}, "-1"),
        ({"evaluate": {"certify": "ibp"}}, "certify='ibp': give keys and values"),
        ({"evaluate": {"certify": {"sigmas": 1}}}, "certify: key 'sigmas' does not exist; did you mean 'sigma'"),
        ({"evaluate": {"certify": {"method": "ipb"}}}, "did you mean 'ibp'"),
        ({"evaluate": {"certify": {"n": 3, "images": 0}}}, "n=3: so few draws"),
        ({"evaluate": {"certify": {"n": 3, "images": 0}}}, "images=0"),
        (
            {"evaluate": {"certify": {"method": "ibp"}}, "threat": {"norm": "l2", "eps": 0.5}},
            "method 'ibp' needs an eps, as the threat is l2 0.5",
        ),
        ({"epochs": "many"}, "epochs='many': must be a number"),
        ({"seed": True}, "seed=True: must be a whole number"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as error:
        RunRecipe.from_mapping(SMALL | wrong)
    assert said in str(error.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as error:
        RunRecipe.from_mapping({"model": "resnet9", "epoch": 1, "training": {"lr": -1}})
    for said in ("resnet9", "'epoch'", "lr=-1", "'strategy' is missing"):
        assert said in str(error.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")
    for text, said in (("a: [", "is no YAML"), ("- a", "must hold keys"), ("!!python/name:os.system", "is no YAML")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(InputError, match=said):
            read_yaml(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("model: resnet9")
    with pytest.raises(InputError, match=r"r\.yaml: the recipe"):
        RunRecipe.read(tmp_path / "r.yaml")


def test_merging() -> None:
    base = {"strategy": {"name": "grape", "events": 3}, "training": {"lr": 0.1, "ema": 0.9}, "seed": 0}
    assert merged(base, {"training": {"lr": 0.2}})["training"] == {"lr": 0.2, "ema": 0.9}
    assert merged(base, {"strategy": {"events": 5}})["strategy"] == {"name": "grape", "events": 5}
    assert merged(base, {"strategy": {"name": "grape", "beta": 0.0}})["strategy"]["events"] == 3
    assert merged(base, {"strategy": {"name": "hydra"}})["strategy"] == {"name": "hydra"}
    assert merged(base, {"strategy": "hydra"})["strategy"] == "hydra"
    assert merged({"strategy": "grape"}, {"strategy": {"events": 2}})["strategy"] == {"name": "grape", "events": 2}
    assert base["training"] == {"lr": 0.1, "ema": 0.9}, "what is laid over does not change what is below"


def test_numbers_that_yaml_reads_as_text() -> None:
    recipe = RunRecipe.from_mapping(SMALL | {"training": yaml.safe_load("{lr: 1e-3, weight_decay: 5e-4}")})
    assert recipe.training.lr == 1e-3 and recipe.training.weight_decay == 5e-4


def test_the_seed_draws_the_weights_and_not_the_split() -> None:
    recipe = RunRecipe.from_mapping(SMALL)
    other = RunRecipe.from_mapping(SMALL | {"seed": 5})
    assert recipe.load_data().sha256 == other.load_data().sha256


def test_run_saves_what_the_recipe_says(run: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "small.yaml", tmp_path / "result"
    path.write_text(yaml.safe_dump(SMALL))
    ran = run("run", path, "--set", "budget.macs=0.4", "--set", "seed=2", "--out", out, "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    result = rc.load(out)
    assert result.after.macs <= 0.4 * result.before.macs and result.seed == 2
    assert result.report is not None and [a.name for a in result.report.attacks] == ["clean", "pgd-2"]
    assert [point["eps"] for point in ran.document["curve"]] == [8 / 255, 0.1]
    assert RunRecipe.from_mapping(ran.document["recipe"]).budget == rc.Budget(macs=0.4)
    assert result.settings["run"] == ran.document["recipe"] and result.settings["curve"] == ran.document["curve"]


def test_run_proves_what_the_recipe_asks_for(run: Run, tmp_path: Path) -> None:
    path, out = tmp_path / "small.yaml", tmp_path / "result"
    judged = {"attacks": ["clean"], "certify": {"method": "ibp", "eps": "1/255", "images": 3}}
    path.write_text(yaml.safe_dump(SMALL | {"evaluate": judged, "epochs": 0.5}))
    ran = run("run", path, "--out", out, "--json")
    assert ran.code == 0, ran.err
    saved = rc.CertificateReport.from_json(json.loads((out / "certificate.ibp-0.003922.json").read_text()))
    assert saved == rc.CertificateReport.from_json(ran.document["certificate"])
    assert saved.n == 3 and saved.settings == {"eps": 1 / 255}
    assert RunRecipe.from_mapping(ran.document["recipe"]).evaluate.certify == {**judged["certify"], "eps": 1 / 255}


def test_a_result_keeps_no_directory_of_this_machine() -> None:
    data = {"source": "/home/somebody/photos", "root": "/data", "seed": 3}
    said = {"source": "MISSING: the directory with the images (photos)", "seed": 3}
    assert without_places({"data": data, "seed": 1}) == {"data": said, "seed": 1}


def test_check_runs_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    ran = run("run", path, "--check")
    assert ran.code == 0 and RunRecipe.from_mapping(yaml.safe_load(ran.out)) == RunRecipe.from_mapping(SMALL)
    wrong = run("run", path, "--set", "strategy=graep", "--check")
    assert wrong.code == 2 and "did you mean 'grape'" in wrong.err and "small.yaml" in wrong.err
