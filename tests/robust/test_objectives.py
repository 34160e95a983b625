from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from robustcompress.errors import InputError
from robustcompress.robust import (
    FGSMRS,
    PGDAT,
    TRADES,
    JacobianNorm,
    LatentBoundary,
    Natural,
    Regularised,
    SemanticAT,
    Separability,
    ThreatModel,
    objective_from_json,
    objective_from_name,
    pgd,
)

PAIRS = {"name": "pairs", "classes": ["a", "b", "c", "d"], "tree": {"ab": ["a", "b"], "cd": ["c", "d"]}}
OBJECTIVES = [
    Natural(),
    Natural(label_smoothing=0.1),
    PGDAT(),
    PGDAT(steps=3, step_size=0.01, label_smoothing=0.2, attack_mode="train"),
    FGSMRS(),
    TRADES(),
    TRADES(beta=1.5, steps=2, attack_mode="train"),
    SemanticAT(hierarchy=PAIRS, steps=2),
    SemanticAT(hierarchy=PAIRS, steps=2, share=0.5, step_size=0.01, label_smoothing=0.1, attack_mode="train"),
    Regularised(PGDAT(steps=2), (JacobianNorm(), Separability(), LatentBoundary())),
    Regularised(TRADES(steps=2), (JacobianNorm(weight=0.5, projections=2),)),
    Regularised(SemanticAT(hierarchy=PAIRS, steps=2), (Separability(temperature=0.5),)),
]
THREAT = ThreatModel("linf", 8 / 255)


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def labels():
    return torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(0))


def without_dropout(model):
    model[3].p = 0.0
    return model.train()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_trades_against_the_formula(convnet, images, labels, norm):
    """Equation 5 by hand: cross-entropy and KL term by term, in train mode, around the example it returns."""
    model = without_dropout(convnet)
    threat = ThreatModel(norm, 0.1)
    step = TRADES(beta=3.0, steps=4).loss(model, images, labels, threat, generator=seeded())
    p, q = model(images).softmax(1), model(step.x_adv).softmax(1)
    natural = -p[torch.arange(24), labels].log().mean()
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(step.loss, natural + 3.0 * divergence)
    torch.testing.assert_close(step.logits, model(step.x_adv).detach())
    torch.testing.assert_close(step.clean_logits, model(images).detach())
    ours = torch.autograd.grad(step.loss, list(model.parameters()))
    by_hand = torch.autograd.grad(natural + 3.0 * divergence, list(model.parameters()))
    for left, right in zip(ours, by_hand, strict=True):  # gradients through both of KL's sides
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


def test_trades_attack_is_the_papers(convnet, images, labels):
    """Noise of 0.001, then sign steps on KL(clean || attacked) in eval mode, from a few lines of our own."""
    model = without_dropout(convnet)
    step = TRADES(steps=3, step_size=0.01).loss(copy.deepcopy(model), images, labels, THREAT, generator=seeded())
    model.eval()
    p = model(images).softmax(1).detach()
    x_adv = images + 0.001 * torch.randn(images.shape, generator=seeded())
    for _ in range(3):
        x_adv.requires_grad_()
        divergence = (p * (p.log() - model(x_adv).log_softmax(1))).sum()
        x_adv = x_adv.detach() + 0.01 * torch.autograd.grad(divergence, x_adv)[0].sign()
        x_adv = x_adv.clamp(images - THREAT.eps, images + THREAT.eps).clamp(0, 1)
    agree = (step.x_adv - x_adv).abs() < 1e-6  # signs of gradients near zero may differ by rounding
    assert agree.float().mean() > 0.99


def test_pgd_at_is_cross_entropy_on_the_attack_in_eval_mode(convnet, images, labels):
    model = without_dropout(convnet)
    model.eval()
    x_adv = pgd(model, images, labels, THREAT, steps=3, generator=seeded())
    model.train()
    step = PGDAT(steps=3, label_smoothing=0.1).loss(model, images, labels, THREAT, generator=seeded())
    assert torch.equal(step.x_adv, x_adv)
    log_p = model(x_adv).log_softmax(1)
    right, smooth = log_p[torch.arange(24), labels], log_p.mean(1)
    torch.testing.assert_close(step.loss, -(0.9 * right + 0.1 * smooth).mean())


def test_fgsm_rs_steps_one_and_a_quarter_eps(convnet, images, labels):
    model = without_dropout(convnet)
    step = FGSMRS().loss(copy.deepcopy(model), images, labels, THREAT, generator=seeded())
    model.eval()
    x = THREAT.random_start(images, seeded()).requires_grad_()
    loss = nn.functional.cross_entropy(model(x), labels, reduction="sum")
    x_adv = x.detach() + 1.25 * THREAT.eps * torch.autograd.grad(loss, x)[0].sign()
    x_adv = x_adv.clamp(images - THREAT.eps, images + THREAT.eps).clamp(0, 1)
    assert ((step.x_adv - x_adv).abs() < 1e-6).float().mean() > 0.99


def test_natural_is_cross_entropy_on_the_images(convnet, images, labels):
    model = without_dropout(convnet)
    step = Natural().loss(model, images, labels, THREAT)
    torch.testing.assert_close(step.loss, nn.functional.cross_entropy(model(images), labels))
    assert step.x_adv is images


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("kind", "passes"),
    [(Natural, 1), (PGDAT, 1), (FGSMRS, 1), (TRADES, 2)],
    ids=lambda k: getattr(k, "name", k),
)
def test_running_statistics_move_once_for_each_pass_of_the_loss(convnet, images, labels, kind, passes, attack_mode):
    model = without_dropout(convnet)
    before = model[1].running_mean.clone()
    objective = kind() if kind is Natural else kind(attack_mode=attack_mode)
    step = objective.loss(model, images, labels, THREAT, generator=seeded())
    assert int(model[1].num_batches_tracked) == passes
    expected = before
    for batch in (images, step.x_adv)[-passes:]:  # clean then attacked, or the attacked alone
        expected = 0.9 * expected + 0.1 * model[0](batch).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "passes"),
    [(Natural(), 1), (PGDAT(steps=7), 8), (FGSMRS(), 2), (TRADES(steps=7), 10)],
    ids=lambda o: getattr(o, "name", o),
)
def test_cost_in_forward_passes(convnet, images, labels, count, objective, passes):
    counter = count(convnet.train())
    objective.loss(convnet, images, labels, THREAT)
    assert counter.calls == passes


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_contract_of_every_objective(convnet, images, labels, objective):
    model = convnet.train()
    model[1].eval()
    step = objective.loss(model, images, labels, THREAT, generator=seeded())
    assert model.training
    assert not model[1].training
    assert all(p.grad is None for p in model.parameters())
    assert step.loss.shape == ()
    assert not step.logits.requires_grad
    assert not step.x_adv.requires_grad
    assert step.logits.shape == (24, 4)
    assert (THREAT.size(step.x_adv, images) <= THREAT.limit).all()
    step.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_loss_is_the_attack_and_then_the_loss_on_what_it_found(convnet, images, labels, objective):
    model = without_dropout(convnet)
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    step = objective.loss(whole, images, labels, THREAT, generator=seeded())
    before = copy.deepcopy(parts.state_dict())
    x_adv = objective.attack(parts, images, labels, THREAT, generator=seeded())
    assert not x_adv.requires_grad and parts.training
    assert all(torch.equal(v, before[n]) for n, v in parts.state_dict().items()), "an attack moves no statistics"
    again = objective.loss_on(parts, images, x_adv, labels)
    assert torch.equal(again.loss, step.loss) and torch.equal(again.logits, step.logits)
    assert torch.equal(again.x_adv, step.x_adv)
    assert all(torch.equal(v, whole.state_dict()[n]) for n, v in parts.state_dict().items())
    objective.require_parts()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_generator_is_the_only_randomness(convnet, images, labels, objective):
    model = without_dropout(convnet).eval()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    examples = [objective.loss(model, images, labels, THREAT, generator=seeded()).x_adv for _ in range(2)]
    assert torch.equal(*examples)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_train_mode_attacks_see_batch_statistics(convnet, images, labels):
    model = without_dropout(convnet)
    model[1].running_mean.fill_(3.0)  # far from the batch's
    examples = [
        PGDAT(steps=2, attack_mode=mode).loss(model, images, labels, THREAT, generator=seeded()).x_adv
        for mode in ("eval", "train")
    ]
    assert not torch.equal(*examples)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_json_round_trip(objective):
    assert objective_from_json(json.loads(json.dumps(objective.to_json()))) == objective


def test_names():
    assert objective_from_name("trades", steps=5, beta=None) == TRADES(steps=5)
    assert objective_from_name("PGD-AT") == PGDAT()
    assert objective_from_name("fgsm-rs", steps=None) == FGSMRS()
    assert objective_from_name("natural") == Natural()
    both = objective_from_name("trades+boundary+jacobian", beta=2.0, jacobian_projections=3, boundary_reach=None)
    assert both == Regularised(TRADES(beta=2.0), (LatentBoundary(), JacobianNorm(projections=3)))
    assert both.to_json()["name"] == "trades+boundary+jacobian"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objective_from_name("pgdat"), "did you mean 'pgd-at'"),
        (lambda: objective_from_name("natural", steps=3), "no option 'steps'"),
        (lambda: objective_from_name("trades", betta=3), "did you mean 'beta'"),
        (lambda: objective_from_json({"steps": 3}), "'name' is missing"),
        (lambda: TRADES(beta=-1), "beta=-1"),
        (lambda: TRADES(beta=float("nan")), "beta=nan"),
        (lambda: PGDAT(steps=0), "steps=0"),
        (lambda: PGDAT(label_smoothing=1.0), "label_smoothing=1.0"),
        (lambda: PGDAT(attack_mode="evil"), "did you mean 'eval'"),
        (lambda: FGSMRS(step_scale=0), "step_scale=0"),
        (lambda: objective_from_name("semantic-at"), "needs the option 'hierarchy'"),
        (lambda: SemanticAT(hierarchy="cifar"), "did you mean 'cifar10'"),
        (lambda: SemanticAT(hierarchy=PAIRS, share=0), "share=0: must lie in"),
        (lambda: objective_from_name("pgd-at+jacobean"), "did you mean 'jacobian'"),
        (lambda: objective_from_name("pgd-at+jacobian", jacobian_wait=1), "did you mean 'jacobian_weight'"),
        (lambda: objective_from_name("pgd-at", jacobian_weight=1), "no option 'jacobian_weight'"),
        (lambda: objective_from_name("pgd-at+jacobian+jacobian"), "'jacobian' is there twice"),
        (lambda: Regularised(PGDAT(), ()), "there are no regularisers"),
        (lambda: Regularised(Regularised(PGDAT(), (Separability(),)), (Separability(),)), "has regularisers already"),
        (lambda: JacobianNorm(projections=0), "projections=0"),
        (lambda: LatentBoundary(reach=1.5), "reach=1.5: must lie in"),
        (lambda: Separability(weight=0), "weight=0"),
    ],
)
def test_bad_objectives(make, message):
    with pytest.raises(InputError, match=message):
        make()
