"""Teachers of a robust distillation: where they come from, what they are asked, and how robust they must be."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import robustcompress as rc
from robustcompress.data import DataSplits, Images
from robustcompress.robust import PGDAT, RSLAD
from robustcompress.teacher import doubt
from robustcompress.teacher_source import read_teacher
from tests.cli.conftest import Run
from tests.cli.conftest import run as run  # the fixture
from tests.strategies.nets import QUICK_RECIPE, SIZE, build, same, small_data, state
from tests.strategies.test_resume import assert_equal, until_finished

QUICK: dict[str, Any] = {"objective": PGDAT(steps=1), "recipe": QUICK_RECIPE, "attacks": (), "progress": False}
RSLAD1 = RSLAD(steps=1)


class Means(nn.Module):
    """Knows the mean image of each class, and says how near an image is to it: robust, and nothing is trained."""

    def __init__(self, images: Images, *, classes: int = 10) -> None:
        super().__init__()
        x = images.as_float().flatten(1)
        means = torch.stack([x[images.labels == k].mean(0) for k in range(classes)])
        self.fc = nn.Linear(x.shape[1], classes)
        with torch.no_grad():
            self.fc.weight.copy_(means / 4)
            self.fc.bias.copy_(-means.square().sum(1) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return small_data()


@pytest.fixture(scope="module")
def wise(data: DataSplits) -> nn.Module:
    return Means(data.train).eval()


def compress(data: DataSplits, strategy: Any = "hydra", **settings: Any) -> rc.CompressResult:
    return rc.compress(build("residual"), strategy, data=data, **(QUICK | {"epochs": 4.0} | settings))


def events(result: rc.CompressResult) -> list[Any]:
    return [record.get("event", record["phase"]) for record in result.history]


def without_times(record: Any) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "images_per_s"}


def test_the_reference_before_the_cut_teaches_the_fine_tuning_alone(data: DataSplits) -> None:
    plain, distilled = compress(data), compress(data, finetune=RSLAD1)
    told = [record for record in distilled.history if record.get("event") == "teacher"]
    assert len(told) == 1 and told[0]["source"] == "reference"
    others = [record for record in distilled.history if record.get("event") != "teacher"]
    cut = next(n for n, record in enumerate(others) if record["phase"] == "finetune")
    for theirs, ours in zip(plain.history[:cut], others[:cut], strict=True):
        assert without_times(theirs) == without_times(ours), "all before the fine-tuning is as it was"
    before = events(distilled).index("teacher")
    assert {record["phase"] for record in distilled.history[:before]} == {"pretrain"}
    assert not same(state(plain.model), state(distilled.model))
    assert distilled.settings["finetune"] == RSLAD1.to_json() and distilled.settings["objective"]["name"] == "pgd-at"
    assert distilled.settings["teacher"]["source"] == "reference" and "val_robust" in distilled.settings["teacher"]
    assert "finetune" not in plain.settings and "teacher" not in plain.settings


def test_a_loss_that_wants_no_teacher_has_none(data: DataSplits) -> None:
    same_loss = compress(data, finetune=PGDAT(steps=1))
    assert same(state(same_loss.model), state(compress(data).model)) and "teacher" not in events(same_loss)


def test_the_teacher_is_heard_and_the_labels_are_not(data: DataSplits, wise: nn.Module) -> None:
    """Training labels are shuffled: who learns from them learns nothing, who learns from the teacher does."""
    shuffled = data.train.labels[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))]
    wrong = dataclasses.replace(data, train=Images(data.train.pixels, shuffled))
    before = copy.deepcopy(state(wise))
    settings = {"attacks": ("clean",), "epochs": 12.0, "budget": 0.8}
    taught = compress(wrong, "uniform", objective=RSLAD1, teacher=wise, **settings)
    misled = compress(wrong, "uniform", **settings)
    assert taught.report is not None and misled.report is not None
    assert taught.report.result("clean").accuracy > 0.4 > misled.report.result("clean").accuracy
    assert taught.history[0]["event"] == "teacher" and taught.settings["teacher"]["source"] == "Means"
    assert taught.settings["teacher"]["val_robust"] > 0.5
    assert same(before, state(wise)) and all(p.requires_grad and p.grad is None for p in wise.parameters())


def test_a_pretrained_reference_teaches_from_the_start(data: DataSplits, wise: nn.Module) -> None:
    strong = rc.ThreatModel("linf", 0.5)  # nobody is right under that
    with pytest.raises(rc.InputError, match=r"cannot teach robustness: its PGD-10 accuracy .* guessing gives 10.0 %"):
        compress(data, pretrained=True, finetune=RSLAD1, threat=strong)
    with pytest.raises(rc.InputError, match="cannot teach robustness"):
        compress(data, "uniform", pretrained=True, objective=RSLAD1, threat=strong)
    reference = build("residual")
    trained = rc.compress(
        reference, "none", data=data, **(QUICK | {"epochs": 20.0, "objective": RSLAD1, "teacher": wise})
    )
    result = rc.compress(trained.model, "hydra", data=data, pretrained=True, finetune=RSLAD1, epochs=3.0, **QUICK)
    assert result.history[0]["event"] == "teacher" and result.history[0]["source"] == "reference"
    assert events(result).count("teacher") == 1


def test_a_strange_teacher_is_warned_of_or_refused(
    data: DataSplits, wise: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fragile(Means):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0 * x.sum()

    assert doubt(0.9, 0.5, 500, 10) == "" and "most of what it knows" in doubt(0.9, 0.2, 500, 10)
    assert "no robustness" in doubt(0.9, 0.1, 500, 10) and "no robustness" in doubt(0.05, 0.05, 500, 10)
    assert doubt(0.1 + 0.8, 0.1 + 0.2001, 500, 10) == ""
    assert "on 20 images that is not shown to be better than guessing" in doubt(0.9, 0.2, 20, 10)
    strong = rc.ThreatModel("linf", 0.5)  # nobody is right under that
    with pytest.raises(rc.InputError, match="cannot teach robustness"):
        compress(data, "uniform", objective=RSLAD1, teacher=Fragile(data.train), threat=strong)
    no_val = dataclasses.replace(QUICK_RECIPE, val_images=0)
    compress(data, "uniform", objective=RSLAD1, teacher=wise, epochs=1.0, recipe=no_val, progress=True)
    assert "nothing is known of the teacher's robustness" in "".join(capsys.readouterr())


@pytest.mark.parametrize("strategy", ["hydra", rc.RCNAS(evaluations=4, batch=2, finalists=1, recovery_steps=1)])
def test_a_run_taught_by_its_own_reference_goes_on_bit_equal(strategy: Any, tmp_path: Path, data: DataSplits) -> None:
    run = lambda **kept: compress(data, strategy, finetune=RSLAD1, **kept)  # noqa: E731
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = until_finished(lambda: run(**kept), rc.OutOfTime)
    assert stops >= 3
    assert_equal(resumed, run())


def test_a_run_with_a_given_teacher_goes_on_with_that_one_alone(
    tmp_path: Path, data: DataSplits, wise: nn.Module
) -> None:
    run = lambda teacher, **kept: compress(data, "uniform", objective=RSLAD1, teacher=teacher, **kept)  # noqa: E731
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    with pytest.raises(rc.OutOfTime):
        run(wise, **kept)
    other = copy.deepcopy(wise)
    with torch.no_grad():
        other.fc.bias[0] += 1e-3
    with pytest.raises(rc.InputError, match=r"teacher: .*initial weights"):
        run(other, **kept)
    resumed, _ = until_finished(lambda: run(wise, **kept), rc.OutOfTime)
    assert_equal(resumed, run(wise))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, data: DataSplits) -> Path:
    """A saved network, trained for next to nothing."""
    net = rc.build_model("resnet8", num_classes=10, width=0.25)[0]
    made = rc.compress(net, "none", data=data, **(QUICK | {"epochs": 1.0}))
    return made.save(tmp_path_factory.mktemp("teacher") / "result")


def test_every_kind_of_teacher_is_read_and_answers_alike(
    data: DataSplits, wise: nn.Module, result: Path, tmp_path: Path
) -> None:
    x, cpu = data.test.first(4).as_float(), torch.device("cpu")
    saved = rc.load(result)
    save_file(dict(saved.model.state_dict()), tmp_path / "w.safetensors")
    spec = rc.ModelSpec("resnet8", {"num_classes": 10, "width": 0.25})
    for given in (saved.model, result, str(result), (spec, tmp_path / "w.safetensors")):
        teacher = read_teacher(given, data, cpu)
        assert torch.equal(teacher.model(x), saved.model(x))
        assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
        assert str(tmp_path) not in json.dumps(teacher.told)
    assert read_teacher(saved.model, data, cpu).identity == read_teacher(result, data, cpu).identity


def test_bad_teachers_are_refused_before_anything_long(
    data: DataSplits, wise: nn.Module, result: Path, tmp_path: Path
) -> None:
    pickled = tmp_path / "net.pt"
    pickled.write_bytes(b"\x80\x02")
    (tmp_path / "w.safetensors").write_bytes(b"no")
    five = dataclasses.replace(data, classes=tuple("abcdefghij"))
    larger = rc.load_data("digits", image_size=2 * SIZE, train_limit=40, test_limit=20)
    spec = rc.ModelSpec("resnet8", {"num_classes": 10})
    for given, about, said in (
        (3, data, "teacher=3: give an nn.Module"),
        (tmp_path / "nowhere", data, "is no saved result"),
        (pickled, data, "looks like a pickle .*safetensors"),
        ((spec, pickled), data, "looks like a pickle"),
        (tmp_path / "w.safetensors", data, r"weights alone; give a pair \(model, file\)"),
        ((spec, tmp_path / "w.safetensors"), data, "must be a safetensors file of resnet8"),
        ((3, tmp_path / "w.safetensors"), data, "a name or a ModelSpec"),
        (result, five, "it tells 10 classes .* and digits has 10 classes"),
        (result, larger, f"load the data with image_size={SIZE}"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 7)), data, r"gives \[2, 7\], .* 10 classes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 10)), data, f"fails on {SIZE}x{SIZE} images"),
    ):
        with pytest.raises(rc.InputError, match=said):
            compress(about, "uniform", objective=RSLAD1, teacher=given)


def test_losses_and_teachers_that_do_not_meet_are_refused_together(data: DataSplits, wise: nn.Module) -> None:
    for strategy, settings, said in (
        ("uniform", {"finetune": RSLAD1}, "uniform has no fine-tuning after a cut"),
        ("uniform", {"objective": "rslad"}, "objective='rslad' wants a teacher from the start"),
        ("hydra", {"objective": "rslad"}, "or finetune='rslad' to learn from the reference"),
        ("awt", {"finetune": "rslad"}, "awt is set up to train no reference before the cut"),
        (rc.Magnitude(pretrain=0.0), {"finetune": "rslad"}, "magnitude is set up to train no reference"),
        ("hydra", {"teacher": wise}, "no loss asks it"),
        ("hydra", {"finetune": "rslda"}, "did you mean 'rslad'"),
        ("hydra", {"finetune": 3}, "finetune=3: give an Objective"),
    ):
        with pytest.raises(rc.InputError, match=said):
            compress(data, strategy, **settings)


def test_from_the_shell(run: Run, tmp_path: Path, wise: nn.Module) -> None:
    small = ["--model-arg", "stem_stride=4", "--epochs", "1", "--attack-steps", "1", "--eps", "0.1", "--quiet"]
    small += ["--train-limit", "200", "--test-limit", "20", "--batch-size", "64", "--attacks", "clean"]
    done = run("compress", "resnet8", "--strategy", "hydra", *small, "--finetune", "rslad", "--json")
    assert done.code == 0 and done.document["settings"]["finetune"]["steps"] == 1
    options = [*small, "--finetune", "ard", "--finetune-option", "temperature=5", "--out", tmp_path / "a", "--json"]
    done = run("compress", "resnet8", "--strategy", "magnitude", *options)
    assert done.document["settings"]["finetune"] | {"temperature": 5} == done.document["settings"]["finetune"]
    for words, said in (
        (["--finetune-option", "steps=2"], "--finetune-option goes with --finetune"),
        (["--teacher-weights", "w.safetensors"], "--teacher-weights goes with --teacher MODEL"),
        (["--teacher", tmp_path / "none", "--objective", "rslad"], "is no saved result"),
        (["--objective", "rslad"], "wants a teacher from the start"),
    ):
        done = run("compress", "resnet8", "--strategy", "hydra", *small, *words)
        assert done.code == 2 and said in done.err


def test_recipes_name_teachers(tmp_path: Path) -> None:
    from robustcompress.recipe import RunRecipe
    from robustcompress.recipe_text import without_places

    base = {"model": "resnet8", "strategy": "hydra", "finetune": {"name": "rslad", "steps": 3}}
    recipe = RunRecipe.from_mapping(base | {"teacher": "/data/runs/wide"})
    assert recipe.finetune == RSLAD(steps=3) and recipe.teacher == "/data/runs/wide"
    assert RunRecipe.from_mapping(recipe.to_json()) == recipe
    assert without_places(recipe.to_json())["teacher"].endswith("(wide)")
    told = {"model": {"name": "resnet8", "width": 2}, "weights": "/data/w.safetensors"}
    recipe = RunRecipe.from_mapping(base | {"teacher": told})
    assert isinstance(recipe.teacher, tuple) and recipe.teacher[1] == "/data/w.safetensors"
    assert RunRecipe.from_mapping(recipe.to_json()) == recipe
    assert without_places(recipe.to_json())["teacher"]["weights"].endswith("(w.safetensors)")
    for teacher, said in ((3, "teacher=3: give"), ({"model": "resnet8"}, "'model' and 'weights'")):
        with pytest.raises(rc.InputError, match=said):
            RunRecipe.from_mapping(base | {"teacher": teacher})
    plain = RunRecipe.from_mapping({"model": "resnet8", "strategy": "hydra"})
    assert "teacher" not in plain.to_json() and "finetune" not in plain.to_json()
