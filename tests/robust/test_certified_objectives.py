"""Objectives that train for certificates, against losses made of their definitions."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress import build_model
from robustcompress.errors import InputError
from robustcompress.robust import IBP, CrownIBP, Smoothing, ThreatModel, objective_from_json, objective_from_name
from robustcompress.robust.bounds import Interval, box, margins
from robustcompress.robust.objectives.interval import BoundObjective
from robustcompress.robust.probe import accuracies
from robustcompress.train.remat import rematerialised

THREAT = ThreatModel("linf", 0.03)
ALL = [Smoothing(), Smoothing(sigma=0.5, label_smoothing=0.1), IBP(), IBP(steady=0.5), CrownIBP(kappa=0.2, steady=0.5)]


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(convnet: nn.Module) -> nn.Module:
    convnet[3].p = 0.0  # type: ignore[union-attr]
    return convnet.train()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_smoothing_is_cross_entropy_under_its_noise(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    step = Smoothing(sigma=0.5).loss(model, images, labels, THREAT, generator=seeded())
    noise = torch.randn(images.shape, generator=seeded())
    assert torch.equal(step.x_adv, images + 0.5 * noise)  # outside [0, 1] too: certification does not clip either
    torch.testing.assert_close(step.loss, F.cross_entropy(model(images + 0.5 * noise), labels))


def test_ibp_by_its_formula(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """kappa CE(clean) + (1 - kappa) CE(worst logits), layer by layer by hand, with clean batch statistics."""
    step = IBP(kappa=0.3).loss(model, images, labels, THREAT)
    conv, norm, _, _, _, fc = model.children()
    lower, upper = (images - 0.03).clamp(0, 1), (images + 0.03).clamp(0, 1)
    centre, radius = (lower + upper) / 2, (upper - lower) / 2
    clean = conv(images)
    mean, var = clean.mean((0, 2, 3), keepdim=True), clean.var((0, 2, 3), unbiased=False, keepdim=True)
    scale = norm.weight.view(1, -1, 1, 1) / (var + norm.eps).sqrt()
    shift = norm.bias.view(1, -1, 1, 1)
    centre = (conv(centre) - mean) * scale + shift
    radius = F.conv2d(radius, conv.weight.abs(), padding=1) * scale.abs()
    lower, upper = (centre - radius).relu().flatten(1), (centre + radius).relu().flatten(1)
    rows = fc.weight[labels][:, None] - fc.weight
    least = rows.clamp(min=0) @ lower[:, :, None] + rows.clamp(max=0) @ upper[:, :, None]
    leads = least.squeeze(2) + fc.bias[labels][:, None] - fc.bias
    logits = fc((((clean - mean) * scale) + shift).relu().flatten(1))
    expected = 0.3 * F.cross_entropy(logits, labels) + 0.7 * F.cross_entropy(-leads, labels)
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.clean_logits, logits.detach())
    ours = torch.autograd.grad(step.loss, list(model.parameters()))
    by_hand = torch.autograd.grad(expected, list(model.parameters()))
    for left, right in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
    proven = (leads.scatter(1, labels[:, None], torch.inf) > 0).all(1)
    assert torch.equal(step.logits.argmax(1) == labels, proven)


def test_the_ramp(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    objective = CrownIBP(kappa=0.5, warm_up=0.1, ramp=0.5, steady=0.0)
    assert objective.at(0.5) is objective and objective.at(1.0) is objective
    for progress, share in ((0.0, 0.0), (0.1, 0.0), (0.2, 0.25), (0.4, 0.75)):
        model.eval()
        now = objective.at(progress)
        images_at = now.attack(model, images, labels, THREAT)
        assert isinstance(images_at, Interval)
        bounds = box(images, share * 0.03)
        assert torch.equal(images_at.lower, bounds.lower) and torch.equal(images_at.upper, bounds.upper)
        found = margins(model, bounds, labels, crown=True)
        leads = (1 - share) * found.crown + share * found.ibp
        clean = 1 - 0.5 * share
        expected = clean * F.cross_entropy(found.clean, labels) + (1 - clean) * F.cross_entropy(-leads, labels)
        step = now.loss(model, images, labels, THREAT)
        torch.testing.assert_close(step.loss, expected, rtol=1e-4, atol=1e-5)
        assert now.to_json() == objective.to_json()
    assert IBP(warm_up=0.0, ramp=0.0).at(0.0) == IBP(warm_up=0.0, ramp=0.0)


def test_the_warm_up_is_steadied(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """What `steady` adds, by its formula, from what the one ReLU of the network is given."""
    conv, norm = model[0], model[1]  # type: ignore[index]
    for progress, share in ((0.0, 0.0), (0.2, 0.25), (0.4, 0.75)):
        now = IBP(kappa=0.5, warm_up=0.1, ramp=0.5, steady=2.0).at(progress)
        bounds = box(images, max(share, 1e-3) * 0.03)
        found = margins(model, bounds, labels)
        clean = 1 - 0.5 * share
        bare = clean * F.cross_entropy(found.clean, labels) + (1 - clean) * F.cross_entropy(-found.ibp, labels)
        before = conv(images)
        mean, var = before.mean((0, 2, 3), keepdim=True), before.var((0, 2, 3), unbiased=False, keepdim=True)
        scale = norm.weight.view(1, -1, 1, 1) / (var + norm.eps).sqrt()
        centre = (conv(bounds.centre) - mean) * scale + norm.bias.view(1, -1, 1, 1)
        radius = F.conv2d(bounds.radius, conv.weight.abs(), padding=1) * scale.abs()
        wide = (0.5 * radius.mean() * images.std() / bounds.radius.mean()).log().relu()
        active, inactive = centre - radius > 0, centre + radius < 0
        apart = (centre - centre.mean()).square()
        means = sorted([centre[active].sum().item(), -centre[inactive].sum().item()])
        spreads = sorted([apart[active].sum().item(), apart[inactive].sum().item()])
        unlike = sum(max(0.0, 0.5 - low / high) / 0.5 for low, high in (means, spreads))
        assert wide.item() > 0.1, "the term is at work"
        torch.testing.assert_close(
            now.loss(model, images, labels, THREAT).loss,
            bare + 2.0 * (1 - share) * (wide + unlike),
            rtol=1e-3,
            atol=1e-4,
        )
    assert torch.equal(*(IBP(steady=s).at(0.9).loss(model, images, labels, THREAT).loss for s in (0.0, 2.0)))


@pytest.mark.parametrize("objective", [IBP(steady=0.5), CrownIBP(), CrownIBP(steady=0.5)], ids=str)
@pytest.mark.parametrize("progress", [0.0, 0.2, 1.0])
def test_activations_that_are_computed_again_change_nothing(objective: BoundObjective, progress: float) -> None:
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=4, width=0.5)[0].train()
    images, labels = torch.rand(6, 3, 16, 16), torch.arange(6) % 4
    found = []
    for again in (False, True):
        model.zero_grad()
        with rematerialised(model) if again else contextlib.nullcontext(1) as blocks:
            assert blocks
            step = objective.at(progress).loss(model, images, labels, THREAT)
            step.loss.backward()
        found.append([step.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_contract(model: nn.Module, images: Tensor, labels: Tensor, objective: object) -> None:
    for progress in (0.0, 0.2, 1.0):
        now = objective.at(progress)  # type: ignore[attr-defined]
        model.zero_grad()
        before = int(model[1].num_batches_tracked)  # type: ignore[index]
        state = torch.random.get_rng_state()
        step = now.loss(model, images, labels, THREAT, generator=seeded())
        assert torch.equal(torch.random.get_rng_state(), state)
        assert model.training and all(p.grad is None for p in model.parameters())
        assert step.loss.shape == () and step.logits.shape == (24, 4) and not step.logits.requires_grad
        assert int(model[1].num_batches_tracked) == before + 1  # type: ignore[index]
        step.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        x_adv = now.attack(model, images, labels, THREAT, generator=seeded())
        torch.testing.assert_close(now.loss_on(model, images, x_adv, labels).loss, step.loss)
    objective.require_parts()  # type: ignore[attr-defined]
    assert objective_from_json(json.loads(json.dumps(objective.to_json()))) == objective  # type: ignore[attr-defined]


def test_epochs_are_chosen_by_what_is_certified(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    batches = [(images, labels)]
    model.eval()
    leads = margins(model, box(images, 0.03), labels).ibp.scatter(1, labels[:, None], torch.inf)
    proven = float((leads > 0).all(1).double().mean())
    assert accuracies(model, batches, THREAT, objective=IBP())[1] == proven
    noisy = model(images + 0.25 * torch.randn(images.shape, generator=seeded())).argmax(1) == labels
    found = accuracies(model, batches, THREAT, objective=Smoothing(), generator=seeded())
    assert found == (float((model(images).argmax(1) == labels).double().mean()), float(noisy.double().mean()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Smoothing(sigma=0), "sigma=0"),
        (lambda: IBP(kappa=1.5), "kappa=1.5"),
        (lambda: IBP(steady=-1), "steady=-1: must be at least 0"),
        (lambda: IBP(warm_up=0.5, ramp=0.2), "warm_up=0.5 lies behind ramp=0.2"),
        (lambda: objective_from_name("crown-ibp", kapa=0.5), "did you mean 'kappa'"),
        (lambda: IBP().check(ThreatModel("l2", 0.5)), "use norm='linf'"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
