"""LARS and LAMB against their papers' formulas, written out, and against timm's; and the warm-up that they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.data import Batches
from robustcompress.robust.objectives import Natural
from robustcompress.train import Lamb, Lars, make_optimizer, train, warm_up_factor
from tests.strategies.nets import build, small_data

STEPS = 6


def problem(seed: int = 0) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    """Parameters of several shapes, one of them zero, and the gradients that they get, step by step."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(5, 3), (4, 2, 3, 3), (6, 2)]
    parameters = [nn.Parameter(torch.randn(s, generator=draw, dtype=torch.float64)) for s in shapes]
    with torch.no_grad():
        parameters[2].zero_()
    gradients = [[torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes] for _ in range(STEPS)]
    gradients[0][1].zero_()
    return parameters, gradients


def moved(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[np.ndarray]:
    parameters, gradients = problem()
    optimizer = make(parameters)
    for number, step in enumerate(gradients):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.9**number  # schedules change it
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach().numpy() for parameter in parameters]


def rates(lr: float) -> list[float]:
    return [lr * math.prod(0.9**i for i in range(number + 1)) for number in range(STEPS)]


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 1e-2), (0.0, 0.0)])
def test_lars_is_the_papers_formula(momentum: float, decay: float) -> None:
    ours = moved(lambda p: Lars(p, 2.0, momentum=momentum, weight_decay=decay, trust=0.02))
    parameters, gradients = problem()
    for place, parameter in enumerate(parameters):
        w, v = parameter.detach().numpy().copy(), 0.0
        for lr, step in zip(rates(2.0), gradients, strict=True):
            g = step[place].numpy()
            size, slope = np.sqrt((w**2).sum()), np.sqrt((g**2).sum())
            local = 0.02 * size / (slope + decay * size) if size > 0 and slope > 0 else 1.0
            v = momentum * v + local * (g + decay * w)
            w = w - lr * v
        np.testing.assert_allclose(ours[place], w, rtol=1e-10)


def test_lamb_is_the_papers_formula() -> None:
    ours = moved(lambda p: Lamb(p, 0.1, weight_decay=1e-2))
    parameters, gradients = problem()
    for place, parameter in enumerate(parameters):
        w, m, v = parameter.detach().numpy().copy(), 0.0, 0.0
        for number, (lr, step) in enumerate(zip(rates(0.1), gradients, strict=True), 1):
            g = step[place].numpy()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            r = (m / (1 - 0.9**number)) / (np.sqrt(v / (1 - 0.999**number)) + 1e-6) + 1e-2 * w
            size, length = np.sqrt((w**2).sum()), np.sqrt((r**2).sum())
            w = w - lr * (min(size, 10.0) / length if size > 0 and length > 0 else 1.0) * r
        np.testing.assert_allclose(ours[place], w, rtol=1e-10)


def test_both_are_timms() -> None:
    optim = pytest.importorskip("timm.optim")
    lars = moved(lambda p: optim.Lars(p, 2.0, momentum=0.9, weight_decay=1e-2, trust_coeff=0.02, eps=0.0))
    for a, b in zip(moved(lambda p: Lars(p, 2.0, weight_decay=1e-2, trust=0.02)), lars, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    lamb = moved(lambda p: optim.Lamb(p, 0.1, weight_decay=1e-2, max_grad_norm=None))
    for a, b in zip(moved(lambda p: Lamb(p, 0.1, weight_decay=1e-2)), lamb, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_vectors_move_as_under_sgd_and_adam(kind: Any) -> None:
    """Groups that say so are not scaled; the recipe says so of vectors, which it does not decay either."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = make_optimizer(rc.Recipe(optimizer=kind, weight_decay=0.1, trust=0.5), list(model.parameters()), lr=0.1)
    assert isinstance(optimizer, Lars if kind == "lars" else Lamb)
    assert [(g["adapt"], g["weight_decay"]) for g in optimizer.param_groups] == [(True, 0.1), (False, 0.0)]
    assert kind == "lamb" or {g["trust"] for g in optimizer.param_groups} == {0.5}
    plain = moved(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9) if kind == "lars" else torch.optim.Adam(p, 0.1))
    ours = moved(lambda p: Lars(p, 0.1, adapt=False) if kind == "lars" else Lamb(p, 0.1, adapt=False, eps=1e-8))
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_lamb_takes_steps_as_long_as_the_weights() -> None:
    weight = nn.Parameter(torch.full((10, 10), 0.3))
    for scale in (1e-4, 1e4):  # however large the gradient is
        weight.grad = scale * torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
        before = weight.detach().clone()
        Lamb([weight], 0.01).step()
        assert float((weight.detach() - before).norm() / before.norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_closure_is_called_and_what_has_no_gradient_stays() -> None:
    moving, still = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = Lars([moving, still], 0.1)

    def closure() -> float:
        moving.grad = torch.ones(2, 2)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert torch.equal(still, torch.ones(2, 2)) and not torch.equal(moving, torch.ones(2, 2))


def test_the_warm_up_is_a_line() -> None:
    assert [warm_up_factor(0.0, p) for p in (0.01, 1.0)] == [1.0, 1.0]
    assert [warm_up_factor(0.2, p) for p in (0.05, 0.1, 0.2, 0.9)] == pytest.approx([0.25, 0.5, 1.0, 1.0])


class Rates(torch.optim.SGD):
    """Remembers the rates that it was stepped with."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.0)
        self.seen: list[float] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.seen.append(self.param_groups[0]["lr"])


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.0, 0.25), (0.5, 1.0)])
def test_a_run_warms_up_over_its_first_epochs(span: tuple[float, float]) -> None:
    data, model = small_data(), build("chain")
    batches = Batches(data.train, 32, generator=torch.Generator().manual_seed(0), drop_last=True)
    optimizer = Rates(model.parameters())
    history = train(
        model,
        batches,
        Natural(),
        rc.ThreatModel(),
        rc.Recipe(warmup=0.5),
        epochs=2,
        optimizer=optimizer,
        lr=0.2,
        schedule="constant",
        generator=torch.Generator().manual_seed(0),
        span=span,
    )
    steps = 2 * len(batches)
    places = [span[0] + (span[1] - span[0]) * (done + 1) / steps for done in range(steps)]
    assert optimizer.seen == pytest.approx([0.2 * min(1.0, place / 0.5) for place in places])
    assert history[-1]["lr"] == pytest.approx(optimizer.seen[-1])


@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_a_whole_run_learns(kind: Any) -> None:
    lr = {"lars": 0.5, "lamb": 0.05}[kind]
    recipe = rc.Recipe(optimizer=kind, lr=lr, trust=0.05, batch_size=32, warmup=0.1, val_images=0, ema=0.0)
    result = rc.compress(
        build("residual"),
        "magnitude",
        data=small_data(),
        epochs=12.0,
        objective=Natural(),
        recipe=recipe,
        attacks=(),
        progress=False,
    )
    losses = [record["loss"] for record in result.history if "loss" in record]
    assert losses[-1] < 0.7 * losses[0] and result.settings["recipe"]["optimizer"] == kind
