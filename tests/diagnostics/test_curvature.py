"""The largest eigenvalue against a dense Hessian, which autograd makes of a loss with the gates as plain inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import robustcompress as rc
from robustcompress.diagnostics import attacked_loss, top_eigenvalue
from robustcompress.robust.objectives import PGDAT, TRADES, Objective
from robustcompress.structure.masks import ScoreMasks, TopK
from robustcompress.structure.weights import WeightGates
from tests.strategies.nets import same, state

Granularity = Literal["channel", "weight"]
THREAT = rc.ThreatModel("linf", 0.1)


class Tiny(nn.Module):
    """A few gates of each kind, and curvature of both signs."""

    def __init__(self, width: int, smooth: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width + 1, 1, bias=False), nn.BatchNorm2d(width + 1)
        self.fc = nn.Linear(width + 1, 3)
        self.bend = torch.tanh if smooth else F.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bend(self.bn1(self.conv1(x)))
        x = self.bend(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def tiny(seed: int, *, width: int = 2, smooth: bool = True) -> tuple[Tiny, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Tiny(width, smooth).double()
        x, y = torch.rand(5, 3, 4, 4, dtype=torch.float64), torch.randint(3, (5,))
        with torch.no_grad():
            for norm in (net.bn1, net.bn2):
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.2, 1.0)
                norm.bias.normal_(0, 0.5)
            net.fc.weight.mul_(3)
    return net.eval(), x, y


def open_gates(net: nn.Module, granularity: Granularity, seed: int) -> ScoreMasks:
    generator = torch.Generator().manual_seed(seed)
    half = TopK(lambda scores: {name: max(1, s.numel() // 2) for name, s in scores.items()})
    if granularity == "channel":
        editor = rc.StructuralEditor(net, torch.zeros(2, 3, 4, 4))
        return editor.gates({g.name: torch.rand(g.width, generator=generator) for g in editor.editable}, half)
    weights = {"conv2.weight": net.conv2.weight, "fc.weight": net.fc.weight}
    return WeightGates(net, {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}, half)


def gated_forward(net: Tiny, granularity: Granularity, values: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The network under gate values, written without hooks and parametrizations: the oracle's own forward pass."""
    weights = dict(net.named_parameters()) | dict(net.named_buffers())
    if granularity == "weight":
        weights = weights | {name: weights[name] * m for name, m in values.items()}
        return lambda x: functional_call(net, weights, (x,))
    first, second = (values[name][:, None, None] for name in ("conv1", "conv2"))

    def forward(x: Tensor) -> Tensor:
        x = net.bend(net.bn1(net.conv1(x))) * first
        x = net.bend(net.bn2(net.conv2(x))) * second
        return net.fc(x.mean((2, 3)))

    return forward


def dense_hessian(net: Tiny, granularity: Granularity, mask: dict[str, Tensor], loss: Any) -> Tensor:
    sizes = [m.numel() for m in mask.values()]

    def at(flat: Tensor) -> Tensor:
        parts = zip(mask.items(), flat.split(sizes), strict=True)
        return loss(gated_forward(net, granularity, {name: part.view(m.shape) for (name, m), part in parts}))

    point = torch.cat([m.flatten() for m in mask.values()]).double()
    return torch.autograd.functional.hessian(at, point)


@pytest.mark.parametrize("granularity", ["channel", "weight"])
@pytest.mark.parametrize("objective", [PGDAT(steps=2), TRADES(steps=2, beta=3.0)], ids=lambda o: o.name)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), width=st.integers(2, 4), smooth=st.booleans(), training=st.booleans())
def test_it_is_the_largest_of_the_dense_hessian(
    granularity: Granularity, objective: Objective, seed: int, width: int, smooth: bool, training: bool
) -> None:
    net, x, y = tiny(seed, width=width, smooth=smooth)
    net.train(training)
    gates = open_gates(net, granularity, seed)
    mask = {name: bits.double() for name, bits in gates.kept().items()}
    noise = torch.Generator().manual_seed(seed)
    with gates:
        loss = attacked_loss(net, x, y, objective, THREAT, generator=noise)
        found = top_eigenvalue(gates, loss, steps=60, tolerance=1e-7, generator=torch.Generator().manual_seed(seed + 1))
    noise.manual_seed(seed)
    with gates:
        x_adv = objective.attack(net, x, y, THREAT, generator=noise)
    hessian = dense_hessian(net, granularity, mask, lambda forward: objective.loss_on(forward, x, x_adv, y).loss)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    scale = float(eigenvalues.abs().max()) + 1e-9
    assert found.value == pytest.approx(float(eigenvalues[-1]), abs=1e-5 * scale)
    assert found.residual <= 1e-5 * scale


def test_a_negative_eigenvalue_of_larger_magnitude_is_not_taken_for_it() -> None:
    """What plain power iteration gets wrong: here -9 dominates, and 2 is the largest."""
    gates = quadratic(torch.tensor([-9.0, 2.0, 0.5, -3.0]))
    found = top_eigenvalue(gates, gates.loss, generator=torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    assert found.value == pytest.approx(2.0, rel=1e-4) and found.residual < 0.02


def quadratic(curvatures: Tensor) -> WeightGates:
    """Gates on a layer, with a loss of known Hessian in them."""
    net = nn.Linear(len(curvatures), 1, bias=False)
    gates = WeightGates(net, {"weight": torch.ones(1, len(curvatures))})
    gates.loss = lambda: 0.5 * (curvatures * gates.rule(gates.scores)["weight"] ** 2).sum()  # type: ignore[attr-defined]
    return gates


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12), st.integers(1, 12))
def test_fewer_steps_never_overstate_it_and_the_residual_is_honest(curvatures: list[float], steps: int) -> None:
    values = torch.tensor(curvatures)
    gates = quadratic(values)
    found = top_eigenvalue(gates, gates.loss, steps=steps, tolerance=0, generator=torch.Generator().manual_seed(1))  # type: ignore[attr-defined]
    slack = 1e-4 * (1 + float(values.abs().max()))
    assert found.value <= float(values.max()) + slack
    assert float((values - found.value).abs().min()) <= found.residual + slack
    assert found.steps <= steps


def test_a_loss_that_is_linear_in_the_gates_has_none() -> None:
    gates = quadratic(torch.ones(3))
    found = top_eigenvalue(gates, lambda: gates.rule(gates.scores)["weight"].sum(), generator=torch.Generator())
    assert (found.value, found.residual, found.steps) == (0.0, 0.0, 1)


def test_a_loss_that_is_not_finite_is_said_and_not_hidden() -> None:
    gates = quadratic(torch.tensor([1.0, float("nan")]))
    found = top_eigenvalue(gates, gates.loss, generator=torch.Generator())  # type: ignore[attr-defined]
    assert found.value != found.value and found.residual == float("inf")


class Attentive(nn.Module):
    """Attention, whose fused form has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(4, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inward(x)[:, None].chunk(3, -1)
        return self.outward(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


def test_attention_too_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    net, x = Attentive(), torch.randn(3, 5, 4)
    gates = WeightGates(net, {"inward.weight": torch.randn(24, 4), "outward.weight": torch.randn(2, 8)})

    def loss() -> Tensor:
        return net(x).square().sum()

    with gates:
        found = top_eigenvalue(gates, loss, steps=40, tolerance=1e-5, generator=torch.Generator().manual_seed(0))
    scores = [s.detach().clone() for s in gates.parameters()]

    def at(flat: Tensor) -> Tensor:
        one, two = (part.view_as(s) for part, s in zip(flat.split([s.numel() for s in scores]), scores, strict=True))
        made = {"inward.weight": net.inward.weight * one, "outward.weight": net.outward.weight * two}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return functional_call(net, made, (x,)).square().sum()

    dense = torch.autograd.functional.hessian(at, torch.cat([s.flatten() for s in scores]))
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-3)


@pytest.mark.parametrize("granularity", ["channel", "weight"])
@pytest.mark.parametrize("training", [True, False])
def test_it_repeats_and_leaves_no_trace(granularity: Granularity, training: bool) -> None:
    net, x, y = tiny(3, width=3)
    net.train(training)
    gates = open_gates(net, granularity, 0)
    before, scores = state(net), [s.detach().clone() for s in gates.parameters()]
    drawn = torch.get_rng_state()
    values: list[float] = []
    with gates:
        rule, mode = gates.rule, [m.training for m in net.modules()]
        for _ in range(2):
            loss = attacked_loss(net, x, y, PGDAT(steps=2), THREAT, generator=torch.Generator().manual_seed(0))
            values.append(top_eigenvalue(gates, loss, generator=torch.Generator().manual_seed(0)).value)
        assert gates.rule is rule and [m.training for m in net.modules()] == mode
    assert values[0] == values[1] != 0
    assert same(state(net), before) and torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(gates.parameters(), scores, strict=True))
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"steps": 0}, "steps=0"), ({"steps": 2.5}, "steps=2.5"), ({"tolerance": -1}, "tolerance=-1")],
    ids=str,
)
def test_bad_settings_are_named(wrong: dict[str, Any], said: str) -> None:
    gates: AbstractContextManager[Any] = quadratic(torch.ones(2))
    with pytest.raises(rc.InputError, match=said):
        top_eigenvalue(gates, lambda: 1 / 0, generator=torch.Generator(), **wrong)  # type: ignore[arg-type]
