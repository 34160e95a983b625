"""Robust distillation against its formulas, written out by hand."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from torch import nn

from robustcompress.errors import InputError
from robustcompress.robust import (
    ARD,
    IAD,
    LTD,
    PGDAT,
    RSLAD,
    AdaAD,
    RobustDistillation,
    ThreatModel,
    objective_from_json,
    objective_from_name,
    pgd,
)
from robustcompress.train.ascent import Ascent, forward_backward

THREAT = ThreatModel("linf", 8 / 255)
ALL = [
    RSLAD(steps=3),
    AdaAD(steps=3),
    ARD(steps=3),
    IAD(steps=3),
    LTD(steps=3),
    RobustDistillation(target="attacked", labels=0.5, trust=0.3, temperature=2.0, teacher_temperature=0.7, steps=2),
]
each = pytest.mark.parametrize("objective", ALL, ids=lambda o: o.name)


def seeded():
    return torch.Generator().manual_seed(5)


def divergence(p, q):
    """KL(P || Q), batchmean, of probabilities."""
    return (p * (p.log() - q.log())).sum(1).mean()


@pytest.fixture
def student(convnet):
    convnet[3].p = 0.0
    return convnet.train()


@pytest.fixture
def teacher():
    torch.manual_seed(7)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    net[1].running_mean.normal_()
    with torch.no_grad():
        net[4].weight.mul_(4)
    return net.train()  # asked in eval mode all the same


@pytest.fixture
def labels():
    return torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(0))


def asked(teacher, x):
    with torch.no_grad():
        return copy.deepcopy(teacher).eval()(x)


def by_hand(objective, teacher, student, x, x_adv, y):
    clean, attacked, on_clean, on_attacked = student(x), student(x_adv), asked(teacher, x), asked(teacher, x_adv)
    t = clean.softmax(1)
    match objective.name:
        case "rslad":
            p = on_clean.softmax(1)
            return 5 / 6 * divergence(p, attacked.softmax(1)) + 1 / 6 * divergence(p, t)
        case "adaad":
            return divergence(on_attacked.softmax(1), attacked.softmax(1))
        case "ard":
            return 900 * divergence((on_clean / 30).softmax(1), (attacked / 30).softmax(1))
        case "iad":
            sure = on_attacked.softmax(1)[torch.arange(24), y] ** 0.1
            own = (t * (t.log() - attacked.log_softmax(1))).sum(1)
            return divergence(on_clean.softmax(1), attacked.softmax(1)) + ((1 - sure) * own).mean()
        case "ltd":
            return divergence((on_clean / 0.5).softmax(1), attacked.softmax(1))
    sure = on_attacked.softmax(1)[torch.arange(24), y] ** 0.3
    own = (t * (t.log() - attacked.log_softmax(1))).sum(1)
    return (
        5 / 6 * 4 * divergence((on_attacked / 0.7).softmax(1), (attacked / 2).softmax(1))
        + 1 / 6 * 4 * divergence((on_clean / 0.7).softmax(1), (clean / 2).softmax(1))
        - 0.5 * t.log()[torch.arange(24), y].mean()
        + ((1 - sure) * own).mean()
    )


@each
def test_loss_and_gradient_are_the_formula(objective, student, teacher, images, labels):
    before = copy.deepcopy(teacher.state_dict())
    step = objective.taught_by(teacher).loss(student, images, labels, THREAT, generator=seeded())
    wanted = by_hand(objective, teacher, student, images, step.x_adv, labels)
    torch.testing.assert_close(step.loss, wanted, rtol=1e-4, atol=1e-6)
    ours = torch.autograd.grad(step.loss, list(student.parameters()))
    theirs = torch.autograd.grad(wanted, list(student.parameters()))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
    assert (step.x_adv - images).abs().max() <= THREAT.eps + 1e-6 and student.training
    assert teacher.training and all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_rslad_attack_is_the_papers(student, teacher, images, labels):
    """Noise of 0.001, then sign steps on KL(teacher(x) || student(x')) in eval mode."""
    objective = RSLAD(steps=3, step_size=0.01).taught_by(teacher)
    found = objective.attack(student, images, labels, THREAT, generator=seeded())
    net, p = copy.deepcopy(student).eval(), asked(teacher, images).softmax(1)
    x = images + 0.001 * torch.randn(images.shape, generator=seeded())
    for _ in range(3):
        x.requires_grad_()
        apart = (p * (p.log() - net(x).log_softmax(1))).sum()
        x = x.detach() + 0.01 * torch.autograd.grad(apart, x)[0].sign()
        x = x.clamp(images - THREAT.eps, images + THREAT.eps).clamp(0, 1)
    assert ((found - x).abs() < 1e-6).float().mean() > 0.99


def test_the_adaad_attack_goes_through_the_teacher_too(student, teacher, images, labels):
    found = (
        AdaAD(steps=3, step_size=0.01).taught_by(teacher).attack(student, images, labels, THREAT, generator=seeded())
    )
    net, master = copy.deepcopy(student).eval(), copy.deepcopy(teacher).eval()
    x = images + 0.001 * torch.randn(images.shape, generator=seeded())
    for _ in range(3):
        x.requires_grad_()
        p = master(x).softmax(1)
        apart = (p * (p.log() - net(x).log_softmax(1))).sum()
        x = x.detach() + 0.01 * torch.autograd.grad(apart, x)[0].sign()
        x = x.clamp(images - THREAT.eps, images + THREAT.eps).clamp(0, 1)
    assert ((found - x).abs() < 1e-6).float().mean() > 0.99


def test_the_ce_attack_is_pgd(student, teacher, images, labels):
    found = ARD(steps=3).taught_by(teacher).attack(student, images, labels, THREAT, generator=seeded())
    wanted = PGDAT(steps=3).attack(student, images, labels, THREAT, generator=seeded())
    assert torch.equal(found, wanted)
    assert torch.equal(found, pgd(student.eval(), images, labels, THREAT, steps=3, generator=seeded()))


def test_who_is_taught_by_oneself_has_nothing_to_learn(student, images, labels):
    student.eval()
    objective = RSLAD(steps=3).taught_by(copy.deepcopy(student))
    at_rest = objective.loss_on(student, images, images, labels)
    assert float(at_rest.loss.detach()) == pytest.approx(0, abs=1e-6)
    gradients = torch.autograd.grad(at_rest.loss, list(student.parameters()))
    assert all(float(g.abs().max()) < 1e-5 for g in gradients)
    assert float(objective.loss(student, images, labels, THREAT, generator=seeded()).loss.detach()) > 0


@pytest.mark.parametrize(
    ("objective", "asks", "passes"),
    [
        (RSLAD(steps=3), 1, 3 + 2),
        (ARD(steps=3), 1, 3 + 1),
        (AdaAD(steps=3), 3 + 1, 3 + 1),
        (IAD(steps=3), 2, 3 + 2),
        (LTD(steps=3), 1, 3 + 1),
    ],
    ids=lambda o: getattr(o, "name", o),
)
def test_what_a_step_asks_of_teacher_and_network(objective, asks, passes, student, teacher, images, labels, count):
    of_teacher, of_student = count(teacher), count(student)
    taught = objective.taught_by(teacher)
    taught.loss(student, images, labels, THREAT, generator=seeded())
    assert (of_teacher.calls, of_student.calls) == (asks, passes)
    taught.loss(student, images.clone(), labels, THREAT, generator=seeded())
    assert of_teacher.calls == 2 * asks, "other images are asked about again"


def test_images_that_were_changed_in_place_are_asked_about_again(student, teacher, images, labels):
    objective = RSLAD().taught_by(teacher)
    objective.loss_on(student, images, images, labels)
    images.mul_(0.5)
    after = objective.loss_on(student, images, images, labels).loss
    torch.testing.assert_close(after, by_hand(RSLAD(), teacher, student, images, images, labels), rtol=1e-4, atol=1e-6)


def test_only_the_network_moves_under_weight_perturbation(student, teacher, images, labels, count):
    """Two losses and one attack a step: the teacher is asked once, and its answer is the same above."""
    weights = copy.deepcopy(teacher.state_dict())
    asks = count(teacher)
    step = forward_backward(
        student,
        images,
        labels,
        RSLAD(steps=2).taught_by(teacher),
        THREAT,
        generator=seeded(),
        precision=contextlib.nullcontext(),
        ascent=Ascent([p for p in student.parameters() if p.dim() > 1], 0.05),
    )
    assert asks.calls == 1 and torch.isfinite(step.loss)
    assert all(torch.equal(v, weights[n]) for n, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


@each
def test_json_and_names(objective, teacher):
    assert objective_from_json(json.loads(json.dumps(objective.to_json()))) == objective
    assert objective.taught_by(teacher).to_json() == objective.to_json()
    assert objective.needs_teacher and not objective.taught_by(teacher).needs_teacher
    objective.taught_by(teacher).require_parts()


def test_others_need_none(teacher):
    objective = PGDAT()
    assert not objective.needs_teacher and objective.taught_by(teacher) is objective


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RSLAD(inner="kl"), "inner='kl' is unknown"),
        (lambda: RSLAD(target="both"), "target='both' is unknown"),
        (lambda: RSLAD(natural=-1), "natural=-1"),
        (lambda: RSLAD(temperature=0), "temperature=0"),
        (lambda: RSLAD(trust=-0.1), "trust=-0.1"),
        (lambda: RSLAD(adversarial=0, natural=0, labels=1.0), "the teacher says nothing"),
        (lambda: objective_from_name("rslda"), "did you mean 'rslad'"),
        (lambda: objective_from_name("rslad", temprature=2), "did you mean 'temperature'"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_without_a_teacher_it_says_so(student, images, labels):
    with pytest.raises(InputError, match="'rslad' needs a teacher"):
        RSLAD().loss(student, images, labels, THREAT)
