"""The rise of the loss within the ball: against S2AP's own ascent, and against one made by hand."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import robustcompress as rc
from robustcompress.diagnostics import attacked_loss, sharpness
from robustcompress.robust.objectives import PGDAT
from robustcompress.strategies.s2ap import ScoreAscent
from tests.diagnostics.test_curvature import THREAT, open_gates, tiny
from tests.strategies.nets import same, state

Granularity = Literal["channel", "weight"]
each_granularity = pytest.mark.parametrize("granularity", ["channel", "weight"])


@each_granularity
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), gamma=st.floats(0.01, 1.0))
def test_it_is_the_rise_along_the_normalised_gradient(granularity: Granularity, seed: int, gamma: float) -> None:
    net, x, y = tiny(seed, width=4)
    gates = open_gates(net, granularity, seed)
    with gates:
        loss = attacked_loss(net, x, y, PGDAT(steps=2), THREAT, generator=torch.Generator().manual_seed(seed))
        found = sharpness(gates, loss, gamma=gamma)
        here = loss()
        slopes = torch.autograd.grad(here, gates.parameters())
        masks = gates.kept()
        with torch.no_grad():
            for score, slope in zip(gates.parameters(), slopes, strict=True):
                assert slope.norm() > 0 or bool((slope == 0).all())
                score += gamma * score.norm() * slope / slope.norm().clamp_min(1e-20)
            there = loss()
        moved = gates.kept()
    bits = sum(m.numel() for m in masks.values())
    assert found.gamma == gamma and found.loss_before == pytest.approx(here.item())
    assert found.loss_after == pytest.approx(there.item(), rel=1e-6)
    assert found.rise == found.loss_after - found.loss_before
    assert found.flips == pytest.approx(sum(int((masks[n] != moved[n]).sum()) for n in masks) / bits)


@each_granularity
def test_the_ball_is_the_one_that_s2ap_searches_in(granularity: Granularity) -> None:
    net, x, y = tiny(5, width=4)
    gates = open_gates(net, granularity, 5)
    with gates:
        loss = attacked_loss(net, x, y, PGDAT(steps=2), THREAT, generator=torch.Generator().manual_seed(0))
        found = sharpness(gates, loss, flips=0.1)
        ascent = ScoreAscent(gates, gamma=None, flips=0.1)
        with ascent.raised(net, loss):
            ascent.note(loss())
    assert ascent.read() == {
        "gamma": found.gamma, "flips": found.flips, "loss_before": found.loss_before, "loss_after": found.loss_after
    }  # fmt: skip
    assert found.flips >= 0.1


@each_granularity
@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(granularity: Granularity, training: bool) -> None:
    net, x, y = tiny(4, width=4)
    net.train(training)
    gates = open_gates(net, granularity, 1)
    before, scores = state(net), [s.detach().clone() for s in gates.parameters()]
    with gates:
        loss = attacked_loss(net, x, y, PGDAT(steps=2), THREAT, generator=torch.Generator().manual_seed(0))
        assert sharpness(gates, loss, flips=0.3) == sharpness(gates, loss, flips=0.3)
    assert same(state(net), before)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(gates.parameters(), scores, strict=True))


def test_scores_that_cannot_flip_have_no_ball() -> None:
    gates = open_gates(tiny(4)[0], "channel", 1)

    def flat() -> Tensor:
        return 0.0 * torch.stack([m.sum() for m in gates.masks().values()]).sum() + 1.0

    found = sharpness(gates, flat)
    assert (found.gamma, found.flips, found.rise) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("wrong", [{"gamma": 0.0}, {"gamma": 2.0}, {"flips": 0.0}, {"flips": 1.5}, {"flips": None}])
def test_bad_radii_are_named(wrong: dict[str, float]) -> None:
    net, *_ = tiny(0)
    ((name, value),) = wrong.items()
    with pytest.raises(rc.InputError, match=f"{name}={value!r}"):
        sharpness(open_gates(net, "channel", 0), lambda: 1 / 0, **wrong)  # type: ignore[arg-type]
