"""Schedules, recipes, the moving average and the optimizer's groups, each against its definition."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustcompress import InputError, Recipe
from robustcompress.train import SCHEDULES, augmentation, averaged, lr_factor, make_optimizer, resolve_device


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("constant", {0.0: 1, 0.5: 1, 1.0: 1}),
        ("cosine", {0.0: 1, 0.5: 0.5, 1.0: 0}),
        ("decay", {0.0: 1, 0.25: 0.75, 1.0: 0}),
        ("step", {0.0: 1, 0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01, 1.0: 0.01}),
        ("warm-up", {0.0: 0.02, 0.25: 0.5, 0.5: 1, 1.0: 1}),
        ("one-cycle", {0.0: 0.02, 0.075: 0.5, 0.15: 1, 0.575: 0.5, 1.0: 0}),
    ],
)
def test_schedules_have_their_shape(schedule: Any, at: dict[float, float]) -> None:
    for progress, factor in at.items():
        assert lr_factor(schedule, progress) == pytest.approx(factor, abs=1e-9), progress


@given(st.sampled_from(SCHEDULES), st.floats(0, 1), st.floats(0, 1))
def test_schedules_stay_in_range_and_turn_at_most_once(schedule: Any, a: float, b: float) -> None:
    early, late = sorted((a, b))
    assert 0 <= lr_factor(schedule, early) <= 1
    if schedule in ("cosine", "decay", "step") or (schedule == "one-cycle" and early >= 0.15):
        assert lr_factor(schedule, early) >= lr_factor(schedule, late)
    if schedule == "warm-up" or (schedule == "one-cycle" and late <= 0.15):
        assert lr_factor(schedule, early) <= lr_factor(schedule, late)


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": "sdg"},
        {"lr": 0.0},
        {"lr": -1},
        {"lr": float("nan")},
        {"lr": "0.1"},
        {"lr": True},
        {"lr": 100},
        {"momentum": 1.0},
        {"momentum": -0.5},
        {"weight_decay": -1e-4},
        {"batch_size": 0},
        {"batch_size": 32.5},
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"clip_norm": "1"},
        {"ema": 1.0},
        {"ema": -0.1},
        {"augment": "flip"},
        {"bf16": "yes"},
        {"val_images": -1},
        {"val_images": 10.5},
        {"awp": -0.005},
        {"awp": 1.5},
        {"awp": float("nan")},
        {"awp": True},
        {"awp_warmup": 1.5},
        {"awp_warmup": "0.1"},
        {"sam": -0.05},
        {"sam": 11},
        {"sam": True},
        {"sam_adaptive": 1},
        {"averaging": "swaa"},
        {"swa_start": 1.0},
        {"swa_start": -0.1},
        {"guard": -1},
        {"guard": 10.5},
        {"guard": True},
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_its_value(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(InputError) as caught:
        Recipe(**wrong)
    assert f"{name}={value!r}" in str(caught.value)


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"(?s)optimizer='adamm'.*did you mean 'adamw'.*lr=-1.*ema=2"):
        Recipe(optimizer="adamm", lr=-1, ema=2)  # type: ignore[arg-type]


def test_two_ascents_at_once_are_refused() -> None:
    with pytest.raises(InputError, match=r"awp=0\.005 and sam=0\.05 would each move the weights"):
        Recipe(awp=0.005, sam=0.05)


@pytest.mark.parametrize(
    "edge",
    [{"momentum": 0.0}, {"weight_decay": 0.0}, {"ema": 0.0}, {"batch_size": 2}, {"val_images": 0}, {"clip_norm": 1}]
    + [{"sam": 0.05, "sam_adaptive": True}, {"averaging": "swa", "swa_start": 0.0}, {"guard": 0}],
    ids=str,
)
def test_what_the_docs_allow_is_allowed(edge: dict[str, Any]) -> None:
    made = Recipe(**edge)
    assert Recipe(**json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", "crop"),
        ("mnist", "crop"),
        ("svhn", "crop"),
        ("MNIST", "crop"),  # torchvision's own data set object is named by its class
        ("SVHN", "crop"),
        ("fashion_mnist", "crop-flip"),
        ("cifar10", "crop-flip"),
        ("tensors", "crop-flip"),
    ],
)
def test_signs_are_not_mirrored(name: str, expected: str) -> None:
    assert augmentation(Recipe(), name) == expected
    assert augmentation(Recipe(augment="none"), name) == "none"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_only_matrices_are_decayed(optimizer: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    recipe = Recipe(optimizer=optimizer, weight_decay=0.5, momentum=0.0)
    made = make_optimizer(recipe, list(model.parameters()), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    for name, parameter in model.named_parameters():
        expected = 0.95 if parameter.dim() > 1 else 1.0
        assert torch.allclose(parameter, torch.full_like(parameter, expected)), name


def test_momentum_is_the_first_beta_of_adamw_and_nesterovs_of_sgd() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    adamw = make_optimizer(Recipe(optimizer="adamw", momentum=0.8), parameters, lr=0.1)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.999)
    sgd = make_optimizer(Recipe(momentum=0.7), parameters, lr=0.1)
    assert sgd.param_groups[0]["nesterov"] and sgd.param_groups[0]["momentum"] == 0.7
    assert not make_optimizer(Recipe(momentum=0.0), parameters, lr=0.1).param_groups[0]["nesterov"]


def test_the_average_is_the_recursion_it_says() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    ema = averaged(model, 0.4)
    generator = torch.Generator().manual_seed(0)
    expected: dict[str, torch.Tensor] = {}
    for n in range(12):
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        model(torch.randn(5, 3, generator=generator, dtype=torch.float64))
        ema.update_parameters(model)
        decay = min(0.4, (1 + n) / (10 + n)) if n else 0.0
        for name, tensor in model.state_dict().items():
            old = expected.get(name, tensor)
            floats = tensor.is_floating_point()
            expected[name] = decay * old + (1 - decay) * tensor if floats else tensor.clone()
    assert {(1 + n) / (10 + n) < 0.4 for n in range(12)} == {True, False}, "both regimes are seen"
    for name, tensor in ema.module.state_dict().items():
        assert torch.allclose(tensor.double(), expected[name].double(), atol=1e-12), name


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "", 3.5, None])
def test_a_device_that_cannot_compute_is_refused(device: Any) -> None:
    with pytest.raises(InputError, match="device="):
        resolve_device(device)


def test_auto_is_a_device_that_is_there() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
