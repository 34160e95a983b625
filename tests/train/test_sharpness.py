"""Sharpness-aware minimisation against two passes written by hand."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress import Recipe, ThreatModel
from robustcompress.errors import InputError
from robustcompress.robust import FGSMRS, MART, PGDAT, TRADES, FreeAT, Natural, Objective
from robustcompress.train import SharpnessAscent, sharpness_ascent
from robustcompress.train.ascent import forward_backward
from tests.strategies.nets import QUICK_RECIPE, build, make_session, same, small_data, state

THREAT = ThreatModel("linf", 8 / 255)
SAM = Recipe(batch_size=32, val_images=1, sam=0.05)


@pytest.mark.parametrize("adaptive", [False, True])
def test_it_goes_where_the_formula_says_within_one_ball(adaptive: bool) -> None:
    p, q = nn.Parameter(torch.tensor([3.0, -4.0])), nn.Parameter(torch.tensor([[0.5]]))
    g, h = torch.tensor([2.0, 1.0]), torch.tensor([[-4.0]])
    ascent = SharpnessAscent([p, q], 0.1, adaptive=adaptive)
    with ascent.raised(nn.Identity(), lambda: (p * g).sum() + (q * h).sum()):
        if adaptive:  # rho T^2 g / ||T g||
            length = (36 + 16 + 4) ** 0.5
            expected = torch.tensor([3.0 + 0.1 * 9 * 2 / length, -4.0 + 0.1 * 16 * 1 / length])
            last = 0.5 - 0.1 * 0.25 * 4 / length
        else:
            expected, last = torch.tensor([3.0, -4.0]) + 0.1 * g / 21**0.5, 0.5 - 0.1 * 4 / 21**0.5
        assert torch.allclose(p, expected) and q.item() == pytest.approx(last)
    assert torch.equal(p, torch.tensor([3.0, -4.0])) and q.item() == 0.5
    assert ascent.read()["sam"] == 0.1


@pytest.mark.parametrize(
    "objective", [Natural(), PGDAT(steps=1), FGSMRS(), TRADES(steps=1), MART(steps=1)], ids=lambda o: o.name
)
def test_a_step_is_the_two_passes_of_the_paper(objective: Objective) -> None:
    model, twin = build("residual").train(), build("residual").train()
    images = small_data().train.first(32)
    x, y = images.as_float(), images.labels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision, generator = contextlib.nullcontext(), torch.Generator().manual_seed(3)
    ascent = sharpness_ascent(optimizer, 0.05)
    step = forward_backward(model, x, y, objective, THREAT, generator=generator, precision=precision, ascent=ascent)
    optimizer.step()

    parameters = list(twin.parameters())
    statistics = [buffer.clone() for buffer in twin.buffers()]
    first = torch.autograd.grad(objective.loss_on(twin, x, step.x_adv, y).loss, parameters)
    for buffer, value in zip(twin.buffers(), statistics, strict=True):
        buffer.copy_(value)
    norm = sum(float(g.double().square().sum()) for g in first) ** 0.5
    kept = [p.detach().clone() for p in parameters]
    for p, g in zip(parameters, first, strict=True):
        p.data.add_(g, alpha=0.05 / norm)
    second = torch.autograd.grad(objective.loss_on(twin, x, step.x_adv, y).loss, parameters)
    for p, bits, g in zip(parameters, kept, second, strict=True):
        p.data.copy_(bits - 0.1 * g)
    for (name, p), q in zip(model.named_parameters(), parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


def test_the_recipe_switches_it_on_for_weights_alone_and_across_edits() -> None:
    session = make_session(build("chain"), objective=PGDAT(steps=1), epochs=3.0, recipe=SAM)
    session.train("a", share=1 / 3)
    session.train_only("scores", [{"params": [session.model.conv2.weight]}], share=1 / 3, lr=0.01)
    session.editor.prune("conv1", range(6))
    session.train("b", share=1 / 3)
    assert [record.get("sam") for record in session.history] == [0.05, None, 0.05]
    assert all(r["loss_after"] > r["loss_before"] for r in session.history if "sam" in r)


def test_radius_zero_is_no_ascent_bit_for_bit() -> None:
    ends = []
    for recipe in (Recipe(batch_size=32), Recipe(batch_size=32, sam=0.0, sam_adaptive=True)):
        session = make_session(build("chain"), objective=PGDAT(steps=1), recipe=recipe)
        session.train("a", share=1.0)
        ends.append(state(session.model))
    assert same(*ends)
    moved = make_session(build("chain"), objective=PGDAT(steps=1), recipe=SAM)
    moved.train("a", share=1.0)
    assert not same(ends[0], state(moved.model))


def test_what_does_not_go_with_it_is_refused_before_any_work() -> None:
    model = build("chain")
    before = state(model)
    with pytest.raises(InputError, match=r"'free-at'.*leave out AWP, SAM"):
        make_session(model, objective=FreeAT(), recipe=SAM)
    settings: dict[str, Any] = {"data": small_data(), "attacks": (), "progress": False, "epochs": 1.0}
    with pytest.raises(InputError, match=r"finetune_awp=0\.005 and the recipe's sam=0\.05"):
        rc.compress(model, "s2ap", recipe=SAM, **settings)
    session = make_session(model, recipe=SAM)
    with pytest.raises(InputError, match=r"awp=0\.01 and the recipe's sam=0\.05"):
        session.train("a", share=1.0, awp=0.01)
    assert same(state(model), before) and QUICK_RECIPE.sam == 0


@pytest.mark.parametrize("rho", [-0.1, 11, float("nan"), True, "0.1", None])
def test_a_radius_that_makes_no_sense_is_named(rho: Any) -> None:
    with pytest.raises(InputError, match=r"rho=.*must be a number in \(0, 10\]"):
        SharpnessAscent([nn.Parameter(torch.ones(2))], rho)
