"""What every objective promises, tested for each of `OBJECTIVES` by its being there, under both norms."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robustcompress as rc
from robustcompress.errors import InputError
from robustcompress.robust import ThreatModel
from robustcompress.robust.objectives import OBJECTIVES, LabelLoss, Objective, objective_from_json
from tests.strategies.nets import QUICK_RECIPE, build, small_data

THREATS = [ThreatModel("linf", 8 / 255), ThreatModel("l2", 0.5), ThreatModel("linf", 0.3), ThreatModel("l2", 3.0)]
WEIGHTS = (0.5, 1.0, 2.0, 4.0)
NAMES = sorted(OBJECTIVES)
LABELLED = [name for name, kind in OBJECTIVES.items() if issubclass(kind, LabelLoss)]


def made(name: str, **options: Any) -> Objective:
    """With few steps where it takes any."""
    kind: Any = OBJECTIVES[name]
    given: dict[str, Any] = {"steps": 2} if "steps" in kind.__slots__ else {}
    if name == "semantic-at":
        given["hierarchy"] = {"classes": ["0", "1", "2", "3"], "tree": {"left": ["0", "1"], "right": ["2", "3"]}}
    return kind(**given, **options)


def ready(name: str) -> Objective:
    """With a teacher, where it needs one."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        teacher = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    return made(name).taught_by(teacher)


def suited(model: nn.Module, name: str, threat: ThreatModel) -> nn.Module:
    """The network as the objective can have it; skips what it refuses."""
    try:
        ready(name).check(threat)
    except InputError as error:
        pytest.skip(str(error))
    if "ibp" in name:
        model[3] = nn.Identity()  # there are no bounds on dropout
    return model


def has_parts(objective: Objective) -> bool:
    try:
        objective.require_parts()
    except InputError:
        return False
    return True


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(0))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.label())
@pytest.mark.parametrize("name", NAMES)
def test_a_step(convnet: nn.Module, images: Tensor, labels: Tensor, name: str, threat: ThreatModel) -> None:
    """Finite, in the ball and the bounds, modes as before, no gradients of weights before the caller asks for them."""
    objective, model = ready(name), suited(convnet.train(), name, threat)
    model[1].eval()  # modes differ within it
    for x in (images, (images > 0.5).float()):  # pixels at the bounds, too
        step = objective.loss(model, x, labels, threat, generator=seeded())
        assert step.loss.shape == () and bool(step.loss.isfinite())
        assert step.x_adv.shape == x.shape and step.logits.shape == (24, 4)
        assert not step.logits.requires_grad and not step.x_adv.requires_grad
        if name not in ("smoothing", "ibp", "crown-ibp"):  # noise keeps to no ball, and boxes are no images
            assert (threat.size(step.x_adv, x) <= threat.limit).all()
            assert float(step.x_adv.min()) >= 0 and float(step.x_adv.max()) <= 1
        assert [m.training for m in model] == [True, False, True, True, True, True] and model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    step.loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("threat", THREATS[:2], ids=lambda t: t.label())
@pytest.mark.parametrize("name", NAMES)
def test_an_attack_moves_nothing_but_images(
    convnet: nn.Module, images: Tensor, labels: Tensor, name: str, threat: ThreatModel
) -> None:
    objective, model = ready(name), suited(convnet.train(), name, threat)
    if not has_parts(objective):
        pytest.skip("attacks and learns in one pass")
    if "ibp" in name:
        pytest.skip("its attack is the whole box")
    before = state(model)
    first, second = (objective.attack(model, images, labels, threat, generator=seeded()) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_and_eval_mode_are_respected(
    convnet: nn.Module, images: Tensor, labels: Tensor, name: str
) -> None:
    threat = THREATS[0 if "ibp" in name else 1]
    model = suited(convnet.eval(), name, threat)
    model[0].weight.requires_grad_(False)
    before = state(model)
    ready(name).loss(model, images, labels, threat, generator=seeded()).loss.backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[0].weight.grad is None and model[5].weight.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_under_bfloat16_the_loss_is_finite_and_float32(
    convnet: nn.Module, images: Tensor, labels: Tensor, name: str
) -> None:
    model = suited(convnet.train(), name, THREATS[0])
    with torch.autocast("cpu", torch.bfloat16):
        step = ready(name).loss(model, images, labels, THREATS[0], generator=seeded())
    step.loss.backward()
    assert step.loss.dtype == torch.float32 and bool(step.loss.isfinite())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in convnet.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name: str) -> None:
    for options in ({}, {"label_smoothing": 0.1, "class_weights": WEIGHTS} if name in LABELLED else {}):
        objective = made(name, **options)
        assert objective_from_json(json.loads(json.dumps(objective.to_json()))) == objective


@pytest.mark.parametrize("name", LABELLED)
def test_a_class_counts_as_if_its_examples_came_so_often(
    convnet: nn.Module, images: Tensor, labels: Tensor, name: str
) -> None:
    """Weight 2 for a class, against the plain loss on a batch in which each of its images comes twice."""
    model = convnet.eval()  # batch statistics would differ between the two batches
    weights = (2.0, 1.0, 1.0, 1.0)
    weighted = made(name, class_weights=weights).loss(model, images, labels, THREATS[0], generator=seeded())
    again = torch.cat([torch.arange(24), torch.nonzero(labels == 0).flatten()])
    objective = made(name)
    if has_parts(objective):
        plain = objective.loss_on(model, images[again], weighted.x_adv[again], labels[again])
    else:
        plain = objective.loss(model, images[again], labels[again], THREATS[0])
    assert len(again) > 24
    torch.testing.assert_close(weighted.loss, plain.loss)
    ours = torch.autograd.grad(weighted.loss, list(model.parameters()))
    theirs = torch.autograd.grad(plain.loss, list(model.parameters()))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", LABELLED)
def test_equal_weights_are_no_weights_and_smoothing_counts(
    convnet: nn.Module, images: Tensor, labels: Tensor, name: str
) -> None:
    model = convnet.eval()

    def loss(**options: Any) -> Tensor:
        return made(name, **options).loss(model, images, labels, THREATS[0], generator=seeded()).loss

    torch.testing.assert_close(loss(class_weights=(3.0,) * 4), loss())
    assert not torch.allclose(loss(label_smoothing=0.3), loss())
    both = {"label_smoothing": 0.3, "class_weights": (3.0,) * 4}
    torch.testing.assert_close(loss(**both), loss(label_smoothing=0.3))


@pytest.fixture(params=LABELLED)
def unresolved(request: pytest.FixtureRequest) -> Iterator[Objective]:
    yield made(request.param, class_weights="balanced")


def test_balanced_becomes_numbers(unresolved: Objective, convnet: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(InputError, match=r"'balanced' needs training labels.*for_labels"):
        unresolved.loss(convnet, images, labels, THREATS[0])
    found: Any = unresolved.for_labels(torch.tensor([0, 0, 0, 1, 3, 3]), 4)
    assert found.class_weights == pytest.approx((6 / 9, 2.0, 1.0, 1.0)), "N / (K N_c), and one where there are none"
    assert type(found) is type(unresolved) and found.for_labels(labels, 4) is found
    with pytest.raises(InputError, match="class_weights holds 4 numbers, and there are 3 classes"):
        found.for_labels(labels, 3)


@pytest.mark.parametrize("wrong", ["balance", (1.0, 0.0), (1.0, -1.0), (), (float("nan"), 1.0), ("1", 1), 0.5, None])
def test_weights_that_make_no_sense_are_named(wrong: Any) -> None:
    with pytest.raises(InputError, match="class_weights="):
        OBJECTIVES["pgd-at"](class_weights=wrong)  # type: ignore[call-arg]


def test_a_run_resolves_balanced_weights_from_its_training_images_and_records_them() -> None:
    settings: dict[str, Any] = {"data": small_data(), "recipe": QUICK_RECIPE, "attacks": (), "progress": False}
    objective = OBJECTIVES["natural"](class_weights="balanced")  # type: ignore[call-arg]
    result = rc.compress(build("chain"), "uniform", epochs=0.5, objective=objective, **settings)
    labels = small_data().train.labels
    counts = torch.tensor([int((labels == k).sum()) for k in range(10)])
    assert result.settings["objective"]["class_weights"] == pytest.approx((len(labels) / (10 * counts)).tolist())
    with pytest.raises(rc.InputError, match="class_weights holds 2 numbers, and there are 10 classes"):
        wrong = OBJECTIVES["natural"](class_weights=(1.0, 2.0))  # type: ignore[call-arg]
        rc.compress(build("chain"), "uniform", epochs=0.5, objective=wrong, **settings)
