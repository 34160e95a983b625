"""Free adversarial training in the loop: against the paper's algorithm, written again, and across interruptions."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress import Recipe, ThreatModel
from robustcompress.data import Batches
from robustcompress.errors import InputError
from robustcompress.robust import FGSMRS, FreeAT, Natural, fgsm
from robustcompress.train import averaged, make_optimizer, train
from robustcompress.train.auxiliary import WithAuxiliary
from tests.strategies.nets import QUICK_RECIPE, build, make_session, same, small_data, state

THREAT = ThreatModel("linf", 8 / 255)
RECIPE = Recipe()


def batches(size: int = 32) -> Batches:
    return Batches(small_data().train, size, generator=torch.Generator().manual_seed(0), drop_last=True)


class Seen(FreeAT):
    """Notes the images of every step, and the weights that they were attacked at."""

    def begin(self) -> Any:
        inner = super().begin()
        plain = inner.loss

        def loss(model: nn.Module, x: torch.Tensor, *args: Any, **settings: Any) -> Any:
            step = plain(model, x, *args, **settings)
            SEEN.append((x, step.x_adv, state(model)))
            return step

        inner.loss = loss  # type: ignore[method-assign]
        return inner


SEEN: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []


def fit(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {"epochs": 2.0, "objective": FreeAT(replays=2), "threat": THREAT, "data": batches()}
    given |= settings
    data, objective, threat = given.pop("data"), given.pop("objective"), given.pop("threat")
    optimizer = given.pop("optimizer", None) or make_optimizer(RECIPE, list(model.parameters()), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    return train(
        model,
        data,
        objective,
        threat,
        RECIPE,
        optimizer=optimizer,
        lr=0.05,
        schedule="constant",
        generator=generator,
        **given,
    )


@pytest.mark.parametrize("threat", [THREAT, ThreatModel("l2", 0.5)], ids=lambda t: t.label())
def test_it_is_the_papers_algorithm(threat: ThreatModel) -> None:
    """Algorithm 1 with plain SGD, by hand: three batches an epoch, each at most twice, one backward pass a step."""
    ours, twin = build("residual").train(), build("residual").train()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    fit(ours, threat=threat, optimizer=optimizer)
    data, eps = batches(), threat.eps
    for _ in range(2):
        delta, steps = torch.zeros(32, 3, 16, 16), 0
        for x, y in data:
            for _ in range(2):
                if steps == 3:
                    break
                steps += 1
                attacked = (x + delta).clamp(0, 1).requires_grad_()
                loss = nn.functional.cross_entropy(twin(attacked), y)
                gradients = torch.autograd.grad(loss, [attacked, *twin.parameters()])
                for p, g in zip(twin.parameters(), gradients[1:], strict=True):
                    p.data.sub_(0.05 * g)
                if threat.norm == "linf":
                    delta = (delta + eps * gradients[0].sign()).clamp(-eps, eps)
                else:
                    delta = delta + eps * gradients[0] / gradients[0].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                    delta = delta * (eps / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    for (name, p), q in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)
    for (name, p), q in zip(ours.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5, msg=name)


def test_the_second_replay_is_fgsm_at_the_weights_before_the_step() -> None:
    model, twin = build("residual").train(), build("residual").train()
    SEEN.clear()
    fit(model, objective=Seen(replays=2), epochs=2 / 3)
    (x, first, before), (again, second, after) = SEEN
    assert torch.equal(x, again) and torch.equal(first, x)
    assert not same(before, after), "the weights moved in between"
    twin.train()
    y = next(iter(batches()))[1]
    expected = fgsm(twin, x, y, THREAT)
    agree = (second - expected).abs() < 1e-6  # signs of gradients near zero may differ by rounding
    assert agree.float().mean() > 0.99


def test_without_replays_it_begins_with_natural_training_and_a_fresh_epoch_too() -> None:
    """With m = 1 a step's perturbation is one step of the gradient found on the batch before."""
    SEEN.clear()
    fit(build("chain"), objective=Seen(replays=1), epochs=2.0)
    sizes = [float((x_adv - x).abs().max()) for x, x_adv, _ in SEEN]
    assert len(SEEN) == 6 and sizes[0] == 0 and sizes[3] == 0
    assert all(size == pytest.approx(THREAT.eps, rel=1e-4) for size in sizes[1:3] + sizes[4:])
    one, natural = build("chain"), build("chain")
    fit(one, objective=FreeAT(replays=1), epochs=1 / 3)
    fit(natural, objective=Natural(), epochs=1 / 3)
    assert same(state(one), state(natural))


@pytest.mark.parametrize(("replays", "distinct"), [(1, 3), (2, 2), (3, 1), (8, 1)])
def test_an_epoch_has_as_many_steps_as_ever_and_sees_fewer_images(replays: int, distinct: int) -> None:
    SEEN.clear()
    ema = averaged(build("chain"), 0.9)
    history = fit(build("chain"), objective=Seen(replays=replays), epochs=2.0, ema=ema)
    assert [record["steps"] for record in history] == [3, 6] and int(ema.n_averaged) == 6
    epochs = [{x.sum().item() for x, _, _ in SEEN[part]} for part in (slice(3), slice(3, 6))]
    assert [len(sums) for sums in epochs] == [distinct] * 2
    assert replays == 1 or epochs[0] != epochs[1], "other images in the next epoch"


def test_perturbations_stay_in_the_ball_under_bfloat16_too() -> None:
    SEEN.clear()
    model = build("residual")
    history = fit(model, objective=Seen(replays=3), epochs=3.0, autocast=True)
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in history)
    for x, x_adv, _ in SEEN:
        assert (THREAT.size(x_adv, x) <= THREAT.limit).all() and 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_network_with_auxiliary_classifiers_is_replayed_as_well() -> None:
    model, plain = build("auxiliary"), build("auxiliary")
    objective = WithAuxiliary(FreeAT(replays=2))
    assert objective.begin().replays == 2
    fit(model, objective=objective, epochs=2.0)
    fit(plain, objective=WithAuxiliary(Natural()), epochs=2.0)
    assert not torch.equal(model.fc.weight, plain.fc.weight)


def test_a_batch_of_another_size_begins_anew() -> None:
    """As accumulation over parts of a batch would give it, or a last batch that is not full."""
    model, epoch = build("chain").train(), FreeAT(replays=2).begin()
    x, y = next(iter(batches()))
    moved = []
    for count in (32, 16, 16):
        step = epoch.loss(model, x[:count], y[:count], THREAT)
        step.loss.backward()
        moved.append(not torch.equal(step.x_adv, x[:count]))
    assert moved == [False, False, True]


@pytest.mark.parametrize("make", [lambda: Recipe(awp=0.005, batch_size=32)], ids=["awp"])
def test_what_needs_an_attack_of_its_own_is_refused_before_any_work(make: Any) -> None:
    model = build("chain")
    before = state(model)
    with pytest.raises(InputError, match="'free-at' attacks with the gradient of its own training step"):
        make_session(model, objective=FreeAT(), recipe=make())
    for strategy in ("s2ap", "harp", "awt"):
        with pytest.raises(InputError, match="'free-at' attacks with the gradient of its own"):
            settings: dict[str, Any] = {"data": small_data(), "recipe": QUICK_RECIPE, "attacks": (), "progress": False}
            rc.compress(model, strategy, objective=FreeAT(), epochs=1.0, **settings)
    assert same(state(model), before)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", None])
def test_replays_that_make_no_sense_are_named(wrong: Any) -> None:
    with pytest.raises(InputError, match=f"replays={wrong!r}: give a whole number"):
        FreeAT(replays=wrong)


def test_a_run_stopped_after_every_epoch_ends_as_one_that_was_not(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": small_data(), "recipe": QUICK_RECIPE, "attacks": (), "progress": False}
    settings |= {"objective": FreeAT(replays=2), "epochs": 4.0}
    whole = rc.compress(build("imported"), "uniform", **settings)  # dropout: torch's global generator counts too
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = None, 0
    while resumed is None:
        with contextlib.suppress(rc.OutOfTime):
            resumed = rc.compress(build("imported"), "uniform", **settings, **kept)
        stops += resumed is None
    assert stops >= 3 and same(state(resumed.model), state(whole.model))
    other = rc.compress(build("imported"), "uniform", **settings | {"objective": FGSMRS()})
    assert not same(state(other.model), state(whole.model))
