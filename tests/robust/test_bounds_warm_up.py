"""The regularisers of the warm-up: against plain sums, and whether following them does what they are for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from robustcompress import ThreatModel, build_model
from robustcompress.robust import IBP
from robustcompress.robust.bounds import box, imbalance, margins, widening

Layer = list[tuple[float, float]]


def layers() -> st.SearchStrategy[list[Layer]]:
    """Centre and radius of each entry of a few layers."""
    entry = st.tuples(st.floats(-3, 3), st.floats(0.001, 2))
    return st.lists(st.lists(entry, min_size=2, max_size=9), max_size=3)


def trail_of(found: list[Layer]) -> list[tuple[Tensor, Tensor]]:
    tensors = [torch.tensor(layer, dtype=torch.float64).unbind(1) for layer in found]
    return [(centre - radius, centre + radius) for centre, radius in tensors]


def short(value: float) -> float:
    return max(0.0, 0.5 - value) / 0.5


@given(layers())
def test_they_are_their_sums(found: list[Layer]) -> None:
    images = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounds, trail = box(images, 0.1), trail_of(found)
    start = float(bounds.radius.mean()) / float(images.std())
    wide, unlike = 0.0, 0.0
    for layer in found:
        wide += max(0.0, math.log(0.5 * sum(r for _, r in layer) / len(layer) / start))
        middle = sum(c for c, _ in layer) / len(layer)
        for power in (1, 2):
            around = middle if power == 2 else 0.0
            active = sum(abs(c - around) ** power for c, r in layer if c - r > 0) / len(layer)
            inactive = sum(abs(c - around) ** power for c, r in layer if c + r < 0) / len(layer)
            unlike += short(min(active, inactive) / max(active, inactive, 1e-12))
    count = max(1, len(found))
    assert math.isclose(float(widening(bounds, trail)), wide / count, abs_tol=1e-6)
    assert math.isclose(float(imbalance(trail)), unlike / count, abs_tol=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e18, 1e30])
def test_imbalance_does_not_know_the_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    centre = torch.randn(200, generator=generator, requires_grad=True)
    radius = 0.1 * torch.rand(200, generator=generator)
    found = []
    for factor in (1.0, scale):
        value = imbalance([((centre - radius - 0.5) * factor, (centre + radius - 0.5) * factor)])
        found.append((value.detach(), torch.autograd.grad(value, centre)[0]))
    assert float(found[0][0]) > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet56", "wrn_28_10"])
def test_networks_of_many_batch_norms_begin_finite(name: str) -> None:
    torch.manual_seed(0)
    model, _ = build_model(name, width=0.125)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    step = IBP(steady=0.5).at(0.0).loss(model.train(), images, labels, ThreatModel("linf", 8 / 255))
    step.loss.backward()
    assert step.loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_half_precision_does_not_make_bounds_vanish() -> None:
    model, _ = build_model("resnet8", width=0.5)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    losses, now = [], IBP(steady=0.5).at(0.0)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(now.loss(model.train(), images, labels, ThreatModel("linf", 8 / 255)).loss)
    assert torch.equal(*losses)


def test_every_activation_is_on_the_trail() -> None:
    layers = (nn.ReLU6(), nn.LeakyReLU(), nn.SiLU(), nn.Hardswish(), nn.ReLU(inplace=True), nn.ELU(), nn.Sigmoid())
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.MaxPool2d(1))), nn.Flatten())
    trail: list[tuple[Tensor, Tensor]] = []
    margins(model, box(torch.rand(2, 1, 3, 3), 0.1), torch.zeros(2, dtype=torch.int64), trail=trail)
    assert len(trail) == len(layers)


def deep(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    inner = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *inner, nn.Flatten(), nn.Linear(8 * 36, 3))


@pytest.mark.parametrize("seed", range(3))
def test_following_them_keeps_bounds_narrow_and_relus_alive(seed: int) -> None:
    model = deep(seed)
    images = torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(16) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = []
    for _ in range(60):
        trail: list[tuple[Tensor, Tensor]] = []
        margins(model, box(images, 0.01), labels, trail=trail)
        terms = widening(box(images, 0.01), trail), imbalance(trail)
        optimizer.zero_grad()
        torch.autograd.backward(sum(terms, torch.zeros(())))
        optimizer.step()
        first, *_, last = ((upper - lower).detach().mean() for lower, upper in trail)
        seen.append([float(value.detach()) for value in (*terms, last / first)])
    assert len(trail) == 4
    assert seen[-1][0] < seen[0][0] - 1 and seen[-1][1] <= seen[0][1] + 0.05
    assert seen[-1][2] < 0.5 * seen[0][2], "bounds before the last ReLU, against those before the first"


def test_what_each_relu_was_given_in_order() -> None:
    model = deep(0).double().eval()
    images = torch.rand(3, 1, 6, 6, dtype=torch.float64)
    given: list[Tensor] = []
    for module in model:
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    model(images)
    plain, given[:] = list(given), []
    trail: list[tuple[Tensor, Tensor]] = []
    margins(model, box(images, 0.02), torch.zeros(3, dtype=torch.int64), trail=trail)
    assert len(trail) == len(plain) == 4
    for (lower, upper), value in zip(trail, plain, strict=True):
        assert (lower <= value).all() and (value <= upper).all() and (upper > lower).any()


def test_dead_layers_and_none_at_all_have_finite_gradients() -> None:
    images = torch.rand(2, 1, 3, 3)
    below = torch.full((2, 4), -2.0, requires_grad=True)
    for trail in ([(below - 0.1, below + 0.1)], [(below - 9, below + 9)], [(0 * below, 0 * below)]):
        terms = widening(box(images, 0.1), trail), imbalance(trail)
        assert all(0 <= float(term.detach()) < 5 for term in terms)
        (slope,) = torch.autograd.grad(sum(terms, torch.zeros(())), below, allow_unused=True, materialize_grads=True)
        assert slope.isfinite().all()
    assert float(widening(box(images, 0.1), [])) == float(imbalance([])) == 0
