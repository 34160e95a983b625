"""The ascent in parameter space: where it goes, that it comes back, and what it leaves alone."""

from __future__ import annotations

import contextlib
import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from robustcompress import Recipe, ThreatModel
from robustcompress.data import Batches
from robustcompress.errors import InputError
from robustcompress.robust.objectives import FGSMRS, PGDAT, TRADES, Natural, Objective, ObjectiveStep
from robustcompress.train import Ascent, make_optimizer, train, weight_ascent
from robustcompress.train.ascent import forward_backward
from tests.strategies.nets import build, make_session, same, small_data, state

THREAT = ThreatModel("linf", 8 / 255)


def batch(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    images = small_data().train.first(count)
    return images.as_float(), images.labels


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() > 1]


def step_of(model: nn.Module, objective: Objective, ascent: Ascent | None) -> ObjectiveStep:
    precision, generator = contextlib.nullcontext(), torch.Generator().manual_seed(3)
    return forward_backward(model, *batch(), objective, THREAT, generator=generator, precision=precision, ascent=ascent)


def fit(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    batches = Batches(small_data().train, 32, generator=torch.Generator().manual_seed(0), drop_last=True)
    optimizer = make_optimizer(Recipe(), list(model.parameters()), lr=0.05)
    gamma, begins = settings.pop("gamma", 0.0), settings.pop("begins", 0.0)
    return train(
        model,
        batches,
        settings.pop("objective", PGDAT(steps=1)),
        THREAT,
        Recipe(),
        optimizer=optimizer,
        lr=0.05,
        schedule="constant",
        generator=torch.Generator().manual_seed(1),
        ascent=weight_ascent(optimizer, gamma, begins=begins),
        **({"epochs": 2.0} | settings),
    )


def test_it_goes_where_the_formula_says_within_the_ball_of_each_tensor_and_raises_the_loss() -> None:
    """A quadratic bowl, whose steepest ascent is known."""
    p, q = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([[0.1, 0.0]]))
    rest = nn.Parameter(torch.zeros(3))

    def bowl() -> torch.Tensor:
        return (p**2).sum() / 2 + (q - 1).square().sum() + rest.sum()

    ascent, at = Ascent([p, q], 0.1), bowl().item()
    with ascent.raised(nn.Identity(), bowl):
        assert torch.allclose(p, torch.tensor([3.0, 4.0]) * 1.1)
        g = torch.tensor([[-1.8, -2.0]])
        assert torch.allclose(q, torch.tensor([[0.1, 0.0]]) + 0.01 * g / g.norm())
        assert torch.equal(rest, torch.zeros(3))
        assert bowl().item() > at
        ascent.note(bowl())
    record = ascent.read()
    assert record["awp"] == 0.1 and record["loss_before"] == pytest.approx(at)
    assert record["loss_after"] > at
    assert ascent.read() == {}


@pytest.mark.parametrize("objective", [Natural(), PGDAT(steps=1), FGSMRS(), TRADES(steps=1)], ids=lambda o: o.name)
def test_a_network_is_moved_and_comes_back_with_every_bit(objective: Objective) -> None:
    model = build("residual").train()
    before, ascent, seen = state(model), Ascent(weights(model), 0.01), {}
    rises = []
    x, y = batch()
    x_adv = objective.attack(model, x, y, THREAT)

    def loss() -> torch.Tensor:
        return objective.loss_on(model, x, x_adv, y).loss

    with ascent.raised(model, loss):
        for name, parameter in model.named_parameters():
            seen[name] = parameter.detach() - before[name]
            assert parameter.grad is None
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]), "running statistics do not follow the ascent"
        rises.append(loss().item())
    assert rises[0] > ascent.read()["loss_before"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        if parameter.dim() > 1:
            moved, radius = float(seen[name].norm()), 0.01 * float(before[name].norm())
            assert moved == pytest.approx(radius, rel=1e-4), "to the edge of its ball"
        else:
            assert not seen[name].any()


def test_it_comes_back_after_an_error() -> None:
    model = build("chain").train()
    before = state(model)
    x, y = batch()
    ascent = Ascent(weights(model), 0.5)
    with pytest.raises(ZeroDivisionError), ascent.raised(model, lambda: nn.functional.cross_entropy(model(x), y)):
        assert not torch.equal(model.conv1.weight, before["conv1.weight"])
        raise ZeroDivisionError
    assert same(state(model), before)


@pytest.mark.parametrize(("objective", "passes"), [(PGDAT(steps=1), 1), (TRADES(steps=1), 2)], ids=["pgd-at", "trades"])
def test_the_gradient_and_the_running_statistics_are_those_of_the_descent_alone(
    objective: Objective, passes: int
) -> None:
    model = build("residual").train()
    step = step_of(model, objective, Ascent(weights(model), 0.01))
    assert int(model.bn0.num_batches_tracked) == passes

    twin = build("residual").train()  # by hand, from a moved copy
    x, y = batch()
    probe = copy.deepcopy(twin)
    loss = objective.loss_on(probe, x, step.x_adv, y).loss
    names = [n for n, p in probe.named_parameters() if p.dim() > 1]
    for name, g in zip(names, torch.autograd.grad(loss, weights(probe)), strict=True):
        p = twin.get_parameter(name)
        p.data.add_(g * (0.01 * p.detach().norm() / g.norm()))
    objective.loss_on(twin, x, step.x_adv, y).loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


def test_images_are_attacked_at_the_weights_themselves_and_once() -> None:
    model, twin = build("residual").train(), build("residual").train()
    plain, raised = step_of(model, PGDAT(steps=2), None), step_of(twin, PGDAT(steps=2), Ascent(weights(twin), 0.05))
    assert torch.equal(plain.x_adv, raised.x_adv)
    assert raised.loss.item() > plain.loss.item()


def test_radius_zero_is_no_ascent_bit_for_bit_and_draws_nothing() -> None:
    plain, zero, ends = build("imported", num_classes=10), build("imported", num_classes=10), []
    for model, settings in ((plain, {}), (zero, {"gamma": 0.0, "begins": 0.5})):
        torch.manual_seed(0)  # this network has dropout
        fit(model, **settings)
        ends.append(torch.random.get_rng_state())
    assert same(state(plain), state(zero)) and torch.equal(*ends)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    assert weight_ascent(optimizer, 0.0) is None
    chosen = weight_ascent(optimizer, 0.1)
    assert chosen is not None and {id(p) for p in chosen.parameters} == {id(p) for p in weights(plain)}


def test_a_frozen_weight_is_not_moved() -> None:
    model = build("chain")
    model.conv2.weight.requires_grad_(False)
    made = weight_ascent(torch.optim.SGD(model.parameters(), lr=0.1), 0.1)
    assert made is not None and all(p is not model.conv2.weight for p in made.parameters)


def test_a_weight_without_a_gradient_stays() -> None:
    used, unused, zero = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    ascent = Ascent([used, unused, zero], 0.5)
    with ascent.raised(nn.Identity(), lambda: (used * zero.detach()).sum() + 0 * zero.sum()):
        assert torch.allclose(used, torch.full((2, 2), 1.5))
        assert torch.equal(unused, torch.ones(2, 2)) and torch.equal(zero, torch.ones(2, 2))


def test_it_begins_when_it_is_told_to_and_says_so_in_the_history() -> None:
    late, plain = build("chain"), build("chain")
    records, bare = fit(late, gamma=0.01, begins=0.5), fit(plain)
    assert "awp" not in records[0] and records[1]["awp"] == 0.01
    assert records[1]["loss_after"] > records[1]["loss_before"]
    assert records[1]["loss"] == pytest.approx(records[1]["loss_after"])
    assert records[0]["loss"] == bare[0]["loss"], "before it begins nothing is different"
    assert not same(state(late), state(plain))
    assert not any("awp" in record for record in bare)


@pytest.mark.parametrize("outer", [False, True])
def test_under_bfloat16_the_descent_sees_the_moved_weights(outer: bool) -> None:
    """Autocast keeps the weights that it has cast, which are stale as soon as they move."""
    model, logits = build("chain").train(), []
    precision = torch.autocast("cpu", torch.bfloat16)
    model.register_forward_hook(lambda *args: logits.append(args[2].detach().float()))
    with precision if outer else contextlib.nullcontext():
        forward_backward(
            model,
            *batch(),
            Natural(),
            THREAT,
            generator=torch.Generator(),
            precision=torch.autocast("cpu", torch.bfloat16),
            ascent=Ascent(weights(model), 0.3),
        )
    assert len(logits) == 2 and not torch.equal(*logits)
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


def test_the_recipe_switches_it_on_for_weights_after_its_share_of_the_run() -> None:
    recipe = Recipe(batch_size=32, val_images=1, awp=0.01, awp_warmup=0.5)
    session = make_session(build("chain"), objective=PGDAT(steps=1), epochs=4.0, recipe=recipe)
    session.train("a", share=0.25)
    session.train_only("scores", [{"params": [session.model.conv2.weight]}], share=0.25, lr=0.01)
    session.editor.prune("conv1", range(6))
    session.train("b", share=0.25)
    session.train("c", share=0.25, awp=0.0)
    assert [r.get("awp") for r in session.history] == [None, None, 0.01, None]
    session = make_session(build("chain"), objective=PGDAT(steps=1), epochs=4.0, recipe=recipe)
    session.train("all", share=1.0, awp=0.02)
    assert [r.get("awp") for r in session.history] == [None, None, 0.02, 0.02]


class Whole(Objective):
    """Defines its loss in one piece."""

    name: ClassVar[str] = "whole"

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, *_: Any, **__: Any) -> ObjectiveStep:
        logits = model(x)
        return ObjectiveStep(nn.functional.cross_entropy(logits, y), logits.detach(), x)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}


def test_an_objective_in_one_piece_trains_and_is_refused_before_work_where_parts_are_needed() -> None:
    model = build("chain")
    assert fit(model, objective=Whole(), epochs=0.3)
    before = state(model)
    with pytest.raises(InputError, match=r"'whole' cannot be split.*attack\(\) and loss_on\(\)"):
        fit(model, objective=Whole(), gamma=0.1, begins=0.9)
    assert same(state(model), before)
    with pytest.raises(InputError, match="'whole' cannot be split"):
        make_session(model, objective=Whole(), recipe=Recipe(awp=0.005))
    x, y = batch()
    for call in (lambda: Whole().attack(model, x, y, THREAT), lambda: Whole().loss_on(model, x, x, y)):
        with pytest.raises(InputError, match="'whole' cannot be split"):
            call()


@pytest.mark.parametrize("gamma", [-0.1, 1.5, float("nan"), float("inf"), True, "0.1", None])
def test_a_radius_that_makes_no_sense_is_named(gamma: Any) -> None:
    with pytest.raises(InputError, match=f"gamma={gamma!r}: must be a number in"):
        Ascent([nn.Parameter(torch.ones(2))], gamma)
    with pytest.raises(InputError, match=r"gamma=.*must be a number in"):
        weight_ascent(torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1), gamma)
