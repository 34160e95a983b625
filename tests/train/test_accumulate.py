"""A step in parts is the step of the whole batch, and takes the memory of a part."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from robustcompress import Recipe, ThreatModel, build_model
from robustcompress.data import Batches, Images
from robustcompress.distributed import ALONE, Parts, World
from robustcompress.errors import InputError
from robustcompress.robust import PGDAT, TRADES, FreeAT, Natural, Objective, ObjectiveStep
from robustcompress.train import Ascent, make_optimizer, train
from robustcompress.train.accumulate import step_in_parts
from robustcompress.train.engine import Engine

THREAT = ThreatModel("linf", 0.05)


def without_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5))
    ).double()


def make_batch(n: int = 22) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (n,), generator=generator)


def step(
    model: nn.Module,
    objective: Objective,
    parts: int | Parts,
    n: int = 22,
    ascent: Ascent | None = None,
    batch: tuple[torch.Tensor, torch.Tensor] | None = None,
    count: int | None = None,
) -> ObjectiveStep:
    x, y = make_batch(n) if batch is None else batch
    model.train()
    model.zero_grad(set_to_none=True)
    drawn = torch.Generator().manual_seed(1)
    return step_in_parts(
        *(Parts(parts) if isinstance(parts, int) else parts, model, x, y, [objective], THREAT),
        generator=drawn,
        precision=contextlib.nullcontext(),
        ascent=ascent,
        engine=Engine(model, list(model.parameters()), world=ALONE),
        count=count,
    )


@pytest.mark.parametrize("objective", [Natural(), PGDAT(steps=3), TRADES(steps=2)], ids=lambda o: o.name)
@pytest.mark.parametrize("parts", [2, 3, 22, 50])
def test_the_gradient_is_that_of_the_whole_batch(objective: Objective, parts: int) -> None:
    # 22 images do not divide by 3: the larger parts have to weigh more.
    whole, cut = without_statistics(), without_statistics()
    found = step(cut, objective, parts)
    x, y = make_batch()
    expected = objective.loss_on(whole.train(), x, found.x_adv, y)  # of the same adversarial images
    expected.loss.backward()
    for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.logits, expected.logits)
    assert (found.clean_logits is None) == (expected.clean_logits is None)
    assert not found.loss.requires_grad


@pytest.mark.parametrize("objective", [PGDAT(steps=2), TRADES(steps=2)], ids=lambda o: o.name)
def test_a_part_finds_the_same_whoever_computes_it(objective: Objective) -> None:
    """Process by process, without the sum that they would make of it."""
    expected = step(without_statistics(), objective, 6)
    found = []
    for rank in range(4):
        parts = Parts(6, World(rank, 4))
        x, y = (values[parts.rows(22)] for values in make_batch())
        found.append(step(without_statistics(), objective, parts, batch=(x, y), count=22))
    assert torch.equal(torch.cat([one.x_adv for one in found]), expected.x_adv)
    assert torch.equal(torch.cat([one.logits for one in found]), expected.logits)
    torch.testing.assert_close(sum(one.loss for one in found), expected.loss)


def test_running_statistics_are_the_mean_of_the_parts_which_all_begin_alike() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).double()

    cut, alone = network(), [network(), network()]
    step(cut, Natural(), 2, n=9)
    x, _ = make_batch(9)
    for part, one in zip((slice(0, 5), slice(5, 9)), alone, strict=True):
        one.train()(x[part])
    for name in ("running_mean", "running_var"):
        values = [one.get_submodule("1").get_buffer(name) for one in alone]
        mean = (5 * values[0] + 4 * values[1]) / 9
        torch.testing.assert_close(cut.get_submodule("1").get_buffer(name), mean)
    assert int(cut.get_submodule("1").get_buffer("num_batches_tracked")) == 1


def test_parts_leave_torchs_own_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 5)).double()
    torch.set_rng_state(before)
    first = step(model, Natural(), 3).logits
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(step(model, Natural(), 3).logits, first), "dropout is drawn from the step's own seed"


def test_the_whole_batch_is_never_seen_at_once() -> None:
    model, seen = without_statistics(), []
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    step(model, PGDAT(steps=2), 4)
    assert max(seen) == 6 and sum(seen) == 3 * 22


def test_an_ascent_is_made_by_each_part_and_leaves_the_weights() -> None:
    model = without_statistics()
    before = copy.deepcopy(model.state_dict())
    ascent = Ascent([p for p in model.parameters() if p.dim() > 1], 0.05)
    step(model, PGDAT(steps=1), 2, ascent=ascent)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    told = ascent.read()
    assert told["loss_after"] > told["loss_before"]


def fit(recipe: Recipe, objective: Objective, size: int = 8) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    generator = torch.Generator().manual_seed(5)
    images = Images(
        torch.randint(256, (24, 3, size, size), dtype=torch.uint8, generator=generator), torch.arange(24) % 5
    )
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )
    history = train(
        model,
        Batches(images, 12, generator=torch.Generator().manual_seed(0)),
        objective,
        THREAT,
        recipe,
        epochs=2,
        optimizer=make_optimizer(recipe, list(model.parameters()), lr=0.05),
        lr=0.05,
        schedule="constant",
        generator=torch.Generator().manual_seed(1),
    )
    return model.state_dict(), history


@pytest.mark.parametrize("objective", [Natural(), FreeAT(replays=2)], ids=lambda o: o.name)
def test_training_in_parts_goes_where_training_at_once_goes(objective: Objective) -> None:
    (ours, history) = fit(Recipe(batch_size=12, accumulate=4), objective)
    (theirs, expected) = fit(Recipe(batch_size=12), objective)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5)
    assert [row["steps"] for row in history] == [row["steps"] for row in expected] == [2, 4]
    assert history[-1]["robust"] == expected[-1]["robust"]


def test_images_of_224_pixels_in_parts_and_with_checkpointing() -> None:
    torch.manual_seed(0)
    model, _ = build_model("torchvision:resnet18", num_classes=5)
    images = Images(torch.randint(256, (4, 3, 224, 224), dtype=torch.uint8), torch.arange(4))
    recipe = Recipe(batch_size=4, accumulate=4, checkpointing=True)
    before = model.get_parameter("layer1.0.conv1.weight").detach().clone()
    (row,) = train(
        model,
        Batches(images, 4, generator=torch.Generator().manual_seed(0)),
        PGDAT(steps=1),
        ThreatModel("linf", 4 / 255),
        recipe,
        epochs=1,
        optimizer=make_optimizer(recipe, list(model.parameters()), lr=0.05),
        lr=0.05,
        schedule="constant",
        generator=torch.Generator().manual_seed(1),
    )
    assert row["steps"] == 1 and row["loss"] > 0
    assert not torch.equal(before, model.get_parameter("layer1.0.conv1.weight"))
    assert int(model.get_buffer("bn1.num_batches_tracked")) == 1, "once a step"


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"accumulate": 0}, "accumulate=0"),
        ({"accumulate": 2.0}, "accumulate=2.0"),
        ({"accumulate": 9, "batch_size": 8}, "a batch of 8"),
        ({"checkpointing": 1}, "checkpointing=1"),
        ({"checkpointing": True, "compile": True}, "leave one out"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Recipe(**settings)


def test_the_optimizer_is_fused_where_all_weights_lie_on_a_gpu() -> None:
    here = make_optimizer(Recipe(), list(without_statistics().parameters()), lr=0.1)
    assert here.defaults["fused"] is None
