"""The training loop: how long, with which gradients, what it records, and how it fails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from robustcompress import Recipe, ThreatModel, load_data
from robustcompress.data import Batches
from robustcompress.robust.objectives import PGDAT, Natural, Objective, ObjectiveStep
from robustcompress.train import Progress, TrainingError, averaged, loop, lr_factor, make_optimizer, train
from robustcompress.train.loop import CLEAN_EVERY, clean_every
from tests.strategies.nets import build, same, small_data, state


def batches(size: int = 32) -> Batches:
    return Batches(small_data().train, size, generator=torch.Generator().manual_seed(0), drop_last=True)


def fit(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    given: dict[str, Any] = {
        "objective": Natural(),
        "recipe": Recipe(),
        "epochs": 1.0,
        "lr": 0.05,
        "schedule": "constant",
        "data": batches(),
    }
    given |= settings
    data, objective, recipe = given.pop("data"), given.pop("objective"), given.pop("recipe")
    optimizer = given.pop("optimizer", None)
    optimizer = optimizer or make_optimizer(recipe, list(model.parameters()), lr=given["lr"])
    generator = torch.Generator().manual_seed(1)
    return train(model, data, objective, ThreatModel(), recipe, optimizer=optimizer, generator=generator, **given)


@dataclass(frozen=True)
class Scripted(Objective):
    """Counts steps, and multiplies the loss by what the script says."""

    script: Any
    name: ClassVar[str] = "scripted"

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, *_: Any, **__: Any) -> ObjectiveStep:
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y) * self.script()
        return ObjectiveStep(loss, logits.detach(), x)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}


def counted(factor: float = 1.0) -> tuple[Scripted, list[int]]:
    calls: list[int] = []

    def script() -> float:
        calls.append(1)
        return factor

    return Scripted(script), calls


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (1 / 3, 1), (1.0, 3), (1.5, 4), (2 / 3, 2), (3.0, 9)])
def test_fractions_of_epochs_are_whole_steps(epochs: float, steps: int) -> None:
    objective, calls = counted()
    records: list[dict[str, Any]] = []
    history = fit(build("chain"), objective=objective, epochs=epochs, on_epoch=records.append)
    assert len(batches()) == 3
    assert len(calls) == steps
    assert history == records
    assert history[-1]["steps"] == steps
    assert [r["epoch"] for r in history] == list(range(1, math.ceil(steps / 3) + 1))


def test_the_learning_rate_follows_the_schedule_and_each_groups_scale() -> None:
    model, seen = build("chain"), []
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "lr_scale": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=7.0)

    def script() -> float:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return 1.0

    fit(model, objective=Scripted(script), optimizer=optimizer, lr=0.2, schedule="cosine", epochs=2.0)
    for step, rates in enumerate(seen):
        factor = lr_factor("cosine", step / 6)
        assert rates == pytest.approx([0.2 * factor, 0.02 * factor])


def test_gradients_are_clipped_over_all_parameters_together() -> None:
    lengths = []
    for clip in (None, 0.5):
        model = build("chain")
        before = state(model)
        objective, _ = counted(100.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        fit(model, objective=objective, recipe=Recipe(clip_norm=clip), optimizer=optimizer, lr=1.0, epochs=0.1)
        moved = [(p.detach() - before[n]).flatten() for n, p in model.named_parameters()]
        lengths.append(float(torch.cat(moved).norm()))
    assert lengths[0] > 5
    assert lengths[1] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_remedy(training: bool, bad: float) -> None:
    model = build("chain").train(training)
    objective, calls = counted(bad)
    with pytest.raises(TrainingError, match=r"phase 'search', step .*lr=0\.125: the loss is (nan|inf).*clip_norm=1\.0"):
        fit(model, objective=objective, lr=0.125, epochs=5.0, phase="search")
    assert len(calls) <= 3, "no further epoch is wasted"
    assert model.training is training


@pytest.mark.parametrize("training", [True, False])
def test_any_failure_leaves_the_mode_as_it_was(training: bool) -> None:
    def fail() -> float:
        raise KeyboardInterrupt

    model = build("chain").train(training)
    with pytest.raises(KeyboardInterrupt):
        fit(model, objective=Scripted(fail))
    assert model.training is training


def test_the_mode_of_every_layer_is_as_it_was() -> None:
    model = build("chain").train()
    model.bn2.eval()
    fit(model)
    assert [n for n, m in model.named_modules() if not m.training] == ["bn2"]


def test_the_average_is_updated_once_a_step() -> None:
    model = build("chain")
    ema = averaged(model, 0.9)
    fit(model, epochs=5 / 3, ema=ema)
    assert int(ema.n_averaged) == 5
    assert not same(state(ema.module), state(model))


def test_one_seed_trains_one_network() -> None:
    ends = []
    for _ in range(2):
        model = build("chain")
        fit(model, objective=PGDAT(steps=1))
        ends.append(state(model))
    assert same(*ends)


@pytest.mark.parametrize("objective", [Natural(), PGDAT(steps=1)], ids=lambda o: o.name)
def test_a_network_learns_the_digits(objective: Objective) -> None:
    data = load_data("digits", image_size=16, train_limit=800, test_limit=200)
    model = build("residual")
    loader = Batches(data.train, 64, generator=torch.Generator().manual_seed(0), drop_last=True)
    history = fit(model, objective=objective, data=loader, epochs=4.0, lr=0.1, schedule="one-cycle")
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert history[-1]["clean"] > 0.35 and history[-1]["images_per_s"] > 0
    right = (model.eval()(data.test.as_float()).argmax(1) == data.test.labels).float().mean()
    assert right > 0.4, "chance is 0.1"


@pytest.mark.parametrize("images", [1_000, 20_000, 50_000, 1_281_167])
def test_clean_images_are_looked_at_until_they_tell_an_accuracy_to_a_point(images: int) -> None:
    seen = images // clean_every(images)
    assert clean_every(images) >= CLEAN_EVERY
    assert seen == images // 10 if images <= 20_000 else 2_000 <= seen < 2_100


@pytest.mark.parametrize("every", [CLEAN_EVERY, 2])
def test_clean_images_are_looked_at_once_in_so_many_steps(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "clean_every", lambda images: every)
    model, alone = build("chain"), build("chain")
    data = batches(8)
    fit(alone, data=batches(8), objective=PGDAT(steps=1))
    passes: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: passes.append(module.training))
    history = fit(model, data=data, objective=PGDAT(steps=1))
    looks = math.ceil(len(data) / every)
    assert len(data) > every and passes.count(True) == len(data)
    assert passes.count(False) == len(data) + looks, "one pass for the attack of each step, and the looks"
    assert 0 <= history[0]["clean"] <= 1 and same(state(model), state(alone))


def test_every_epoch_is_looked_at_however_few_steps_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "clean_every", lambda images: 10_000)
    assert all("clean" in record for record in fit(build("chain"), objective=PGDAT(steps=1), epochs=3.0))


def test_the_record_holds_the_loss_and_accuracy_of_its_own_epoch() -> None:
    values = iter([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    history = fit(build("chain"), objective=Scripted(lambda: next(values)), epochs=2.0, lr=1e-6)
    assert history[0]["loss"] > 1.5
    assert history[1]["loss"] == 0.0
    assert 0 <= history[0]["robust"] <= 1 and history[0]["phase"] == "train"


def test_bfloat16_autocast_runs_and_keeps_float32_weights() -> None:
    model, dtypes = build("chain"), []
    model.fc.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    history = fit(model, objective=PGDAT(steps=1), autocast=True)
    assert torch.bfloat16 in dtypes
    assert math.isfinite(history[-1]["loss"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_resumed_phase_does_what_is_left_of_it() -> None:
    whole, halves = build("chain"), build("chain")
    expected = fit(whole, epochs=4.0, schedule="cosine")
    data, recipe = batches(), Recipe()
    optimizer = make_optimizer(recipe, list(halves.parameters()), lr=0.05)

    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        fit(halves, epochs=4.0, schedule="cosine", data=data, optimizer=optimizer, on_epoch=stop)
    shown: list[tuple[int, int]] = []

    class Shown(Progress):
        def phase(self, name: str, steps: int, done: int = 0) -> Any:
            shown.append((steps, done))
            return super().phase(name, steps, done)

    rest = fit(
        halves, epochs=4.0, schedule="cosine", data=data, optimizer=optimizer, start=6, progress=Shown(enabled=False)
    )
    assert same(state(halves), state(whole))
    assert shown == [(12, 6)]
    drop = {"images_per_s"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in rest] == [
        {k: v for k, v in r.items() if k not in drop} for r in expected[2:]
    ]
