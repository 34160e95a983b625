"""compress(): whatever cannot work is said at once, all of it, before any training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import robustcompress as rc
from robustcompress.data import Images
from robustcompress.models import resnet8
from robustcompress.robust.objectives import PGDAT
from tests.strategies.nets import NETS, QUICK_RECIPE, SIZE, Chain, build, same, small_data, state


def images(n: int = 40, channels: int = 3, size: int = SIZE) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def labels(n: int = 40, classes: int = 4) -> torch.Tensor:
    return torch.arange(n) % classes


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it began to train")

    monkeypatch.setattr("robustcompress.session.train", fail)


def quick(model: Any, strategy: Any = "magnitude", **settings: Any) -> rc.CompressResult:
    given: dict[str, Any] = {
        "data": small_data(),
        "epochs": 0.2,
        "objective": PGDAT(steps=1),
        "recipe": QUICK_RECIPE,
        "attacks": ("clean",),
        "test_images": 10,
        "progress": False,
    }
    return rc.compress(model, strategy, **(given | settings))


class Half(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.half()


class Pair(Chain):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


class Spread(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.ConvTranspose2d(16, 16, 3, padding=1, groups=4, bias=False)


class Attentive(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)


class Frozen(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "strategy": ({"strategy": "grap"}, "'grap' does not exist; did you mean 'grape'"),
    "strategy of another type": ({"strategy": 3}, "strategy 3 does not exist"),
    "strategy as a list": ({"strategy": ["grape"]}, "strategy ['grape'] does not exist"),
    "strategy class": ({"strategy": rc.Grape}, "strategy"),
    "model name": ({"model": "resnet81"}, "model 'resnet81' does not exist; did you mean"),
    "model of another type": ({"model": 3}, "model=3: give an nn.Module or the name of one"),
    "factory": ({"model": "tests.strategies.nets:Chian"}, "did you mean 'Chain'"),
    "data name": ({"data": "cifar11"}, "'cifar11'; did you mean 'cifar10'"),
    "data directory": ({"data": "no/such/directory"}, "directory 'no/such/directory' does not exist"),
    "attack": ({"attacks": ("clean", "pgd20")}, "'pgd20'"),
    "attacks as one word": ({"attacks": "pgd-20x"}, "pgd-20x"),
    "no attack list": ({"attacks": 5}, "attacks=5"),
    "objective": ({"objective": "trade"}, "did you mean 'trades'"),
    "objective of another type": ({"objective": 3}, "objective=3"),
    "budget of zero": ({"budget": 0}, "macs=0: must be a positive number"),
    "budget of 50": ({"budget": 50}, "for 50 % write 0.5"),
    "budget as text": ({"budget": "0.5"}, "budget='0.5'"),
    "no budget": ({"budget": None}, "budget=None"),
    "threat in 0-255": ({"threat": 8}, "you probably meant 8/255"),
    "threat of zero": ({"threat": 0}, "eps=0: must be positive"),
    "threat as text": ({"threat": "linf"}, "threat='linf'"),
    "no threat": ({"threat": None}, "threat=None"),
    "recipe": ({"recipe": {"lr": 1}}, "recipe={'lr': 1}"),
    "no epochs": ({"epochs": 0}, "epochs=0: must be a positive number"),
    "epochs in words": ({"epochs": "ten"}, "epochs='ten'"),
    "epochs without a number": ({"epochs": float("nan")}, "epochs=nan"),
    "round_to": ({"round_to": 0}, "round_to=0: must be a positive whole number"),
    "round_to in fractions": ({"round_to": 2.5}, "round_to=2.5"),
    "seed": ({"seed": "zero"}, "seed='zero'"),
    "seed in fractions": ({"seed": 1.5}, "seed=1.5"),
    "device": ({"device": "gpu"}, "device='gpu' cannot be used"),
    "device without storage": ({"device": "meta"}, "device='meta'"),
    "test images": ({"test_images": 0}, "test_images=0"),
    "negative test images": ({"test_images": -5}, "test_images=-5"),
    "labels out of range": ({"data": (images(), labels() - 1)}, "label -1 is out of range"),
    "labels beyond the classes": (
        {"data": rc.DataSplits("mine", ("a", "b"), *[Images((images() * 255).byte(), labels())] * 3)},
        "label 3 is out of range",
    ),
    "normalised images": ({"data": (images() * 4 - 2, labels())}, "images are outside [0, 1]"),
    "0-255 images": ({"data": (images() * 255, labels())}, "divide by 255"),
    "channels": ({"data": (images(channels=4), labels())}, "4 channels"),
    "channels last": ({"data": (images().permute(0, 2, 3, 1), labels())}, "permute(0, 3, 1, 2)"),
    "one class": ({"data": (images(), labels() * 0)}, "at least two classes"),
    "no images": ({"data": (images(0), labels(0))}, "there are no images"),
    "fewer labels": ({"data": (images(), labels(30))}, "40 images and 30 labels"),
    "half precision": ({"model": Half()}, "torch.float16; call model.float()"),
    "a tuple": ({"model": Pair()}, "it returns tuple; it must return logits"),
    "grouped transposed": ({"model": Spread()}, "conv3 (ConvTranspose2d): grouped transposed convolution"),
    "attention": ({"model": Attentive()}, "attention"),
    "nothing to train": ({"model": Frozen()}, "requires_grad"),
    "unreachable": ({"budget": 0.001}, "cannot be reached"),
    "unreachable parameters": ({"budget": rc.Budget(max_params=10)}, "10 parameters cannot be reached"),
    "unreachable for its rounding": ({"budget": 0.3, "round_to": 16}, "lower round_to=16"),
    "already met": ({"budget": 1.0}, "the model already meets"),
    "already met in numbers": ({"budget": rc.Budget(max_macs=10**12)}, "use strategy='none' to train it as it is"),
    "classes of a pretrained model": (
        {"model": build("chain", num_classes=7), "pretrained": True},
        "the pretrained model has 7 classes and digits has 10",
    ),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_error_before_any_training(what: str) -> None:
    changes, said = BAD[what]
    with pytest.raises(rc.InputError) as caught:
        quick(**({"model": build("chain")} | changes))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("direction", ["unreachable", "met"])
def test_a_budget_that_cannot_work_is_a_budget_error_for_every_strategy(direction: str) -> None:
    for strategy in ("grape", "hydra", "magnitude"):
        if direction == "met" and strategy == "grape":
            continue  # growth may end above the reference
        with pytest.raises(rc.BudgetError):
            quick(build("chain"), strategy, budget=0.001 if direction == "unreachable" else 1.0)


@pytest.mark.usefixtures("no_training")
def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(rc.InputError) as caught:
        rc.compress(
            "resnet81",
            "grap",
            data="cifar11",
            budget=50,
            threat=8,
            objective="trade",
            epochs=-1,
            round_to=0,
            attacks=("clen",),
            device="gpu",
            out=tmp_path / "out",
        )
    for said in (
        "resnet81",
        "grap",
        "cifar11",
        "50 %",
        "8/255",
        "trade",
        "epochs=-1",
        "round_to=0",
        "clen",
        "gpu",
        "exists",
    ):
        assert said in str(caught.value), said
    assert str(caught.value).count("\n  - ") == 11


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("path", ["there", "file", "file/out", "file/absent/out"])
def test_an_output_directory_that_cannot_be_made_is_refused_first(path: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(rc.InputError, match=r"exists|is no directory"):
        quick(build("chain"), out=tmp_path / path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


@pytest.mark.usefixtures("no_training")
def test_a_place_without_permission_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(rc.InputError, match="Permission denied"):
        quick(build("chain"), out=tmp_path / "out")


@pytest.mark.usefixtures("no_training")
def test_attacks_that_cannot_run_are_refused_before_training() -> None:
    with pytest.raises(rc.InputError, match="bounds"):
        quick(build("chain"), threat=rc.ThreatModel("linf", 8 / 255, (-1.0, 1.0)), attacks=("clean", "autoattack"))
    with pytest.raises(rc.InputError, match=r"you probably meant 100/255"):
        quick(build("chain"), threat=rc.ThreatModel("l2", 100.0), attacks=("clean", "fgsm"))


@pytest.mark.usefixtures("no_training")
def test_all_layers_that_cannot_be_edited_are_listed() -> None:
    class Several(Spread):
        def __init__(self) -> None:
            super().__init__()
            self.bn3 = nn.LocalResponseNorm(2)

    with pytest.raises(rc.UnsupportedModelError) as caught:
        quick(Several())
    assert "conv3" in str(caught.value) and "bn3" in str(caught.value)


@pytest.mark.usefixtures("no_training")
def test_a_model_that_does_not_run_on_the_images_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(99, 10))
    with pytest.raises(rc.InputError, match=r"does not run on an input of shape \(2, 3, 16, 16\)"):
        quick(model)


def test_a_short_number_is_a_budget_and_a_radius() -> None:
    result = quick(build("chain"), budget=0.6, threat=4 / 255)
    assert result.budget == {"macs": 0.6} and result.meets_budget
    assert result.threat == rc.ThreatModel("linf", 4 / 255)


def test_a_classifier_of_another_size_is_replaced_and_it_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    result = quick(build("imported"), "grape", progress=True)
    assert "classifier replaced: the model has 1000 outputs, digits has 10 classes" in capfd.readouterr().err
    assert result.model.classifier[4].out_features == 10
    assert result.model(images(3)).shape == (3, 10)
    assert result.edits[0].group == "classifier.4"
    assert result.before.params == sum(p.numel() for p in build("imported", num_classes=10).parameters())


@pytest.mark.parametrize("strategy", ["none", "magnitude", "grape"])
@pytest.mark.parametrize(
    "data",
    [
        (images(60, size=28), labels(60)),
        (images(60, channels=1, size=28), labels(60)),
        (images(60, size=8), labels(60)),
        TensorDataset((images(60, size=12) * 255).byte(), labels(60)),
        (images(60, size=20)[:, :, :, :12], labels(60)),
    ],
    ids=["28x28", "grey", "8x8", "bytes", "20x12"],
)
def test_images_of_any_size_work(strategy: str, data: Any) -> None:
    result = quick(build("residual"), strategy, data=data, attacks=("clean", "fgsm"))
    assert result.model(torch.rand(2, *result.image_shape)).shape == (2, 4)
    assert result.meets_budget


def test_two_classes_and_no_test_images_work() -> None:
    result = quick(build("chain"), data=(images(), labels(classes=2)))
    assert result.classes == ("0", "1") and result.report is not None
    data = small_data()
    empty = rc.DataSplits(data.name, data.classes, data.train, data.val.first(0), data.test.first(0))
    assert quick(build("chain"), data=empty).report is None


def test_a_model_in_double_precision_works_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        result = quick(build("chain").double())
    except rc.InputError as error:
        assert "float" in str(error)
    else:
        assert result.meets_budget


def test_a_callers_hook_is_no_trap_at_the_end() -> None:
    """A model with a hook is refused before the training, or trained; not refused after it."""
    model, calls = build("chain"), []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    try:
        result = quick(model)
    except rc.InputError as error:
        assert "hook" in str(error)
        return
    assert not any(m._forward_hooks for m in result.model.modules())
    assert len(model.conv1._forward_hooks) == 1


def test_an_editor_takes_one_image_as_well_as_two() -> None:
    torch.manual_seed(0)
    model = resnet8(width=0.25)
    one, two = (rc.StructuralEditor(model, torch.zeros(n, 3, SIZE, SIZE)) for n in (1, 2))
    assert one.groups == two.groups


def test_the_result_is_saved_where_it_is_asked_for(tmp_path: Path) -> None:
    result = quick("tests.strategies.nets:Chain", out=tmp_path / "out")
    assert result.spec is not None and result.spec.name == "tests.strategies.nets:Chain"
    again = rc.load(tmp_path / "out", model="tests.strategies.nets:Chain")
    assert same(state(again.model), state(result.model))


def test_a_result_is_not_lost_when_its_directory_appears_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustcompress import session

    train = session.train

    def slow(*args: Any, **settings: Any) -> Any:
        (tmp_path / "out").mkdir(exist_ok=True)
        return train(*args, **settings)

    monkeypatch.setattr(session, "train", slow)
    try:
        result = quick(build("chain"), out=tmp_path / "out")
    except rc.RobustCompressError as error:
        kept = getattr(error, "result", None)
        assert isinstance(kept, rc.CompressResult), "hours of training end in an error that holds no result"
    else:
        assert result.meets_budget


def test_the_callers_random_state_is_its_own() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    quick(build("imported"))
    assert torch.equal(torch.rand(4), expected)


def test_settings_say_how_it_came_about() -> None:
    result = quick(build("chain"), rc.Magnitude(pretrain=0.3), seed=4, round_to=2)
    assert result.strategy == rc.Magnitude(pretrain=0.3).to_json()
    assert result.strategy["pretrain"] == 0.3 and result.strategy["name"] == "magnitude"
    assert result.seed == 4 and result.settings["round_to"] == 2 and result.settings["epochs"] == 0.2
    assert result.settings["objective"]["name"] == "pgd-at" and result.settings["recipe"]["batch_size"] == 32
    assert result.settings["versions"]["torch"] == torch.__version__
    assert result.data["name"] == "digits" and result.data["sha256"] == small_data().sha256
    assert all(group % 2 == 0 for group in (result.model.conv1.out_channels, result.model.conv2.out_channels))


@pytest.mark.parametrize(("width", "step"), [(4, 1), (16, 2), (31, 2), (32, 4), (64, 8), (512, 8)])
def test_widths_are_rounded_by_default_to_what_the_narrowest_group_bears(width: int, step: int) -> None:
    from robustcompress.reach import default_rounding

    model = nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, 512, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 3),
    )
    assert default_rounding(rc.StructuralEditor(model, torch.zeros(2, 3, 8, 8))) == step


def test_every_net_of_the_suite_is_built_alike_each_time() -> None:
    makers: Iterator[Callable[..., nn.Module]] = iter(NETS.values())
    assert all(callable(maker) for maker in makers)
    assert same(state(build("joined")), state(build("joined")))


def test_a_model_may_be_named_with_its_arguments(tmp_path: Path) -> None:
    spec = rc.ModelSpec("robustcompress:resnet8", {"num_classes": 10, "width": 0.25, "stem_stride": 2})
    result = quick(spec, out=tmp_path / "out")
    assert result.spec == spec
    assert same(state(rc.load(tmp_path / "out").model), state(result.model))
