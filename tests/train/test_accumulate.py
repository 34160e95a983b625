"""A step in parts is the step of the whole batch, and takes the memory of a part."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from robustcompress import Recipe, ThreatModel, build_model
from robustcompress.data import Batches, Images
from robustcompress.distributed import ALONE, Parts
from robustcompress.errors import InputError
from robustcompress.robust import PGDAT, TRADES, Natural, Objective
from robustcompress.train import Ascent, make_optimizer, train
from robustcompress.train.accumulate import step_in_parts
from robustcompress.train.engine import Engine

THREAT = ThreatModel("linf", 0.05)


def without_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5))
    ).double()


def step(model: nn.Module, objective: Objective, parts: int, n: int = 22, ascent: Ascent | None = None):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(n, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (n,), generator=generator)
    model.train()
    model.zero_grad(set_to_none=True)
    drawn = torch.Generator().manual_seed(1)
    return step_in_parts(
        *(Parts(parts), model, x, y, [objective], THREAT),
        generator=drawn,
        precision=contextlib.nullcontext(),
        ascent=ascent,
        engine=Engine(model, list(model.parameters()), world=ALONE),
    )


@pytest.mark.parametrize("objective", [Natural(), PGDAT(steps=3), TRADES(steps=2)], ids=lambda o: o.name)
@pytest.mark.parametrize("parts", [2, 3, 22, 50])
def test_the_gradient_is_that_of_the_whole_batch(objective: Objective, parts: int) -> None:
    # 22 images do not divide by 3: the larger parts have to weigh more.
    whole, cut = without_statistics(), without_statistics()
    expected, found = step(whole, objective, 1), step(cut, objective, parts)
    if objective.name != "trades":  # which draws normal numbers, in blocks
        for ours, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.x_adv, expected.x_adv)
    assert found.logits.shape == expected.logits.shape and found.x_adv.shape == expected.x_adv.shape
    assert (found.clean_logits is None) == (expected.clean_logits is None)
    assert not found.loss.requires_grad


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


def fit(recipe: Recipe, size: int = 8) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
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
        PGDAT(steps=2),
        THREAT,
        recipe,
        epochs=2,
        optimizer=make_optimizer(recipe, list(model.parameters()), lr=0.05),
        lr=0.05,
        schedule="constant",
        generator=torch.Generator().manual_seed(1),
    )
    return model.state_dict(), history


def test_training_in_parts_goes_where_training_at_once_goes() -> None:
    (ours, history), (theirs, expected) = fit(Recipe(batch_size=12, accumulate=4)), fit(Recipe(batch_size=12))
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
