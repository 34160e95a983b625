"""Planting: what a network that was cut or grown before training begins with, against one that was built that way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.strategies.scratch import Law, _weights, find_laws, plant
from tests.strategies.nets import build, make_session, same, state


def fresh(name: str, width: float = 1.0, *, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return rc.build_model(name, num_classes=10, width=width)[0]


class Plain(nn.Module):
    """Convolutions and linear layers without normalisation; `rule` draws their weights."""

    def __init__(self, width: int, rule: Callable[[torch.Tensor], Any] | None = None, *, frozen: bool = False) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 2 * width, 3, stride=2, padding=1)
        self.b = nn.Conv2d(2 * width, 3 * width, 3, stride=2, padding=1)
        self.c = nn.Conv2d(3 * width, width, 3, padding=1)
        self.hidden, self.fc = nn.Linear(width, 4 * width), nn.Linear(4 * width, 10)
        if rule is not None:
            for module in self.children():
                rule(module.weight)
        if frozen:
            self.b.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3))
        return self.fc(self.hidden(x).relu())


RULES: dict[str, tuple[Callable[[torch.Tensor], Any] | None, Law]] = {
    "default": (None, Law("in", 1 / 3)),
    "he in": (lambda w: nn.init.kaiming_normal_(w), Law("in", 2.0)),
    "he out": (lambda w: nn.init.kaiming_uniform_(w, mode="fan_out", nonlinearity="relu"), Law("out", 2.0)),
    "glorot": (nn.init.xavier_uniform_, Law("sum", 2.0)),
    "constant": (lambda w: nn.init.trunc_normal_(w, std=0.02), Law("none", 0.02)),
}


def plain(width: int, rule: str, **options: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        return Plain(width, RULES[rule][0], **options)


def widths_of(model: nn.Module) -> dict[str, int]:
    """The widths that a natively built model has."""
    return make_session(model).editor.widths


def spread(weight: torch.Tensor) -> float:
    return float(weight.detach().double().square().mean().sqrt())


def assert_alike(planted: nn.Module, native: nn.Module) -> None:
    """Equal shapes, and each layer's spread within what drawing so many numbers twice explains."""
    assert {n: p.shape for n, p in planted.named_parameters()} == {n: p.shape for n, p in native.named_parameters()}
    ratios = []
    for name, module in native.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            ratio = spread(planted.get_submodule(name).weight) / spread(module.weight)
            count = module.weight.numel()
            assert abs(math.log(ratio)) < 4 / math.sqrt(count), (name, ratio, count)
            ratios.append((math.log(ratio), count))
    total = sum(count for _, count in ratios)
    assert abs(sum(r * count for r, count in ratios) / total) < 0.03


@pytest.mark.parametrize(
    ("name", "reference", "width"),
    [("resnet8", 1.0, 0.5), ("resnet8", 1.0, 1.5), ("wrn_16_4", 0.5, 0.25), ("mobilenet_v2", 0.5, 0.25)],
)
def test_a_planted_network_begins_like_one_that_was_built_that_way(name: str, reference: float, width: float) -> None:
    native, model = fresh(name, width, seed=1), fresh(name, reference)
    plant(make_session(model), widths_of(native))
    assert_alike(model, native)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and not module.bias.any() and not module.running_mean.any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", [8, 24])
def test_every_usual_initialisation_is_recognised_and_followed(rule: str, width: int) -> None:
    model, native = plain(16, rule), plain(width, rule)
    assert set(find_laws(model, _weights(model)).values()) == {RULES[rule][1]}
    plant(make_session(model), widths_of(native))
    assert_alike(model, native)
    for name, module in model.named_children():
        bound = 1 / math.sqrt(module.weight[0].numel())
        largest = float(module.bias.detach().abs().max())
        assert 0.6 * bound < largest <= bound, f"{name}: biases are drawn as torch draws them"
        shape = [float(net.get_submodule(name).weight.detach().abs().max()) for net in (model, native)]
        assert rule in ("he in", "constant") or abs(math.log(shape[0] / shape[1])) < 0.1, (
            f"{name}: a uniform stays a uniform"
        )


def test_a_square_layer_follows_its_neighbours() -> None:
    model = fresh("resnet8")
    laws = find_laws(model, _weights(model))
    assert laws.pop("fc") == Law("in", 1.0)
    assert set(laws.values()) == {Law("out", 2.0)}, "fan in and fan out are equal in most of these layers"


def test_an_unknown_scale_keeps_its_distance_from_the_law_of_its_kind() -> None:
    model = plain(16, "he out")
    with torch.no_grad():
        model.b.weight.mul_(0.17)
    laws = find_laws(model, _weights(model))
    assert laws["b"] == laws["a"] == Law("out", 2.0)
    before = spread(model.b.weight)
    plant(make_session(model), widths_of(plain(4, "he out")))
    assert spread(model.b.weight) == pytest.approx(2 * before, rel=0.1)


def test_constants_stay_what_they_are_also_where_the_network_grows() -> None:
    model = build("residual")
    nn.init.zeros_(model.bn2.weight)
    nn.init.zeros_(model.conv2.weight)
    nn.init.constant_(model.fc.bias, -2.0)
    session = make_session(model)
    plant(session, {name: 2 * width for name, width in session.editor.widths.items()})
    assert session.editor.widths["stem"] == 24
    assert not model.bn2.weight.any() and not model.conv2.weight.any()
    assert bool((model.bn1.weight == 1).all()) and bool((model.fc.bias == -2).all())


def test_frozen_weights_keep_their_values() -> None:
    model = plain(16, "he out", frozen=True)
    before = model.b.weight.detach().clone()
    plant(make_session(model), {"a": 20, "b": 24})
    assert torch.equal(model.b.weight, before[:24, :20])


@pytest.mark.parametrize("how", ["said to be pretrained", "has counted batches"])
def test_the_weights_of_a_trained_reference_are_not_used(how: str) -> None:
    model, native = fresh("resnet8"), fresh("resnet8", 0.5, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(7.0)
        model.layers[0][0].conv1.weight.requires_grad_(False)
    if how == "has counted batches":
        model.train()(torch.rand(4, 3, 16, 16))
    said: list[str] = []
    session = make_session(model, pretrained=how == "said to be pretrained")
    session.say = said.append  # type: ignore[method-assign]
    plant(session, widths_of(native))
    assert float(model.layers[0][0].conv1.weight.mean()) > 6, "a frozen parameter stays"
    native.layers[0][0].conv1.weight.data.copy_(model.layers[0][0].conv1.weight)
    assert_alike(model, native)
    assert not model.bn1.running_mean.any() and bool((model.bn1.weight == 1).all())
    assert said == ["trained from scratch: the reference's weights are not used"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
        self.scale = nn.Parameter(torch.full((1, 8, 1, 1), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((self.conv(x) * self.scale).relu().mean((2, 3)))


def test_parameters_that_cannot_be_initialised_again_are_named() -> None:
    said: list[str] = []
    session = make_session(Scaled(), pretrained=True)
    session.say = said.append  # type: ignore[method-assign]
    plant(session, {})
    assert [line for line in said if "scale cannot be initialised again" in line]


@pytest.mark.parametrize("pretrained", [False, True])
def test_planting_depends_on_the_seed_alone(pretrained: bool) -> None:
    def planted(seed: int, noise: int) -> dict[str, torch.Tensor]:
        model = build("imported", num_classes=10)
        torch.manual_seed(noise)
        plant(make_session(model, seed=seed, pretrained=pretrained), {"features.0": 6, "features.3": 14})
        return state(model)

    assert same(planted(0, 1), planted(0, 2))
    assert not same(planted(0, 1), planted(3, 1))


def test_planting_is_told() -> None:
    session = make_session(build("residual"))
    plant(session, {"conv1": 5})
    assert session.history[-1]["event"] == "plant"
    assert session.history[-1]["widths"]["conv1"] == 5
    assert session.history[-1]["macs"] == pytest.approx(session.cost().macs)
