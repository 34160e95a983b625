from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustcompress.errors import InputError
from robustcompress.robust import AttackSpec, ThreatModel, attack_by_name, fgsm, pgd
from robustcompress.robust.attacks import eval_mode, input_gradient, losses
from tests.robust.conftest import Linear


def linear_case(linear, seed, n=4, size=3):
    torch.manual_seed(seed)
    weight, x = torch.randn(1, size, size), torch.rand(n, 1, size, size)
    return linear(weight), x, torch.randint(0, 2, (n,)), weight


def away_from(y, weight):
    """The direction that hurts: the logit of class 0 is w.x, that of class 1 is 0."""
    return weight * torch.where(y == 0, -1.0, 1.0).view(-1, 1, 1, 1)


@given(st.integers(0, 99), st.floats(0.001, 0.9), st.integers(1, 5), st.sampled_from(["ce", "margin"]))
@settings(deadline=None, max_examples=40)
def test_linf_on_a_linear_model_finds_the_optimum(seed, eps, size, loss):
    model, x, y, weight = linear_case(Linear, seed, size=size)
    optimum = (x + eps * away_from(y, weight).sign()).clamp(0, 1)
    threat = ThreatModel("linf", eps)
    assert torch.equal(fgsm(model, x, y, threat, loss=loss), optimum)
    generator = torch.Generator().manual_seed(seed)
    x_adv = pgd(model, x, y, threat, steps=10, loss=loss, generator=generator)
    torch.testing.assert_close(x_adv, optimum, rtol=0, atol=1e-6)
    # and nothing the adversary may do is worse for the model
    worst = losses(model(x_adv), y, loss="margin")
    for start in range(5):
        rival = threat.random_start(x, torch.Generator().manual_seed(start))
        assert (losses(model(rival), y, loss="margin") <= worst + 1e-4).all()


@pytest.mark.parametrize("seed", range(5))
def test_l2_on_a_linear_model_finds_the_closed_form(linear, seed):
    model, x, y, weight = linear_case(linear, seed)
    x = 0.4 + 0.2 * x  # far enough from the bounds for eps
    optimum = x + 0.3 * away_from(y, weight) / weight.norm()
    torch.testing.assert_close(fgsm(model, x, y, ThreatModel("l2", 0.3)), optimum, rtol=0, atol=1e-5)
    x_adv = pgd(model, x, y, ThreatModel("l2", 0.3), steps=40)
    torch.testing.assert_close(x_adv, optimum, rtol=0, atol=2e-2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pgd_stays_in_the_ball_and_keeps_the_layout(convnet, images, norm, loss, layout):
    convnet.eval()
    x = images.contiguous(memory_format=layout)
    threat = ThreatModel(norm, 0.2)
    y = convnet(x).argmax(1)
    x_adv = pgd(convnet, x, y, threat, steps=7, step_size=0.3, loss=loss, restarts=2)
    assert not x_adv.requires_grad
    assert x_adv.is_contiguous(memory_format=layout)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (threat.size(x_adv, x) <= threat.limit).all()
    assert threat.size(x_adv, x).max() > 0.5 * threat.eps


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_training_attack_costs_exactly_its_steps(mlp, images, count, steps):
    model = mlp(4)
    counter = count(model)
    y = torch.zeros(len(images), dtype=torch.int64)
    pgd(model, images, y, ThreatModel(), steps=steps)
    assert (counter.calls, counter.images) == (steps, steps * len(images))
    pgd(model, images, y, ThreatModel(), steps=steps, loss="kl", clean_logits=torch.zeros(len(images), 4))
    assert counter.calls == 2 * steps
    pgd(model, images, y, ThreatModel(), steps=steps, restarts=3)
    assert counter.calls == 2 * steps + 3 * (steps + 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_weight_gradients_whatever_the_caller_is_in(convnet, images, frozen, context):
    convnet.train()
    convnet[5].weight.grad = torch.full_like(convnet[5].weight, 7.0)
    convnet.requires_grad_(not frozen)
    with context():
        x, y = images.clone(), torch.zeros(len(images), dtype=torch.int64)
        logits = torch.zeros(len(images), 4)
        pgd(convnet, x, y, ThreatModel(), steps=2, restarts=2)
        pgd(convnet, x, y, ThreatModel(), steps=2, loss="kl", clean_logits=logits)
        fgsm(convnet, x, y, ThreatModel())
    assert convnet.training
    assert all(p.requires_grad is not frozen for p in convnet.parameters())
    assert (convnet[5].weight.grad == 7).all()
    assert all(p.grad is None for name, p in convnet.named_parameters() if name != "5.weight")
    assert images.grad is None


def test_losses_against_their_definitions():
    torch.manual_seed(0)
    logits, clean, y = torch.randn(6, 5), torch.randn(6, 5), torch.randint(0, 5, (6,))
    p, q = clean.softmax(1), logits.softmax(1)
    for i in range(6):
        others = [float(logits[i, j]) for j in range(5) if j != y[i]]
        assert losses(logits, y)[i] == pytest.approx(-float(q[i, y[i]].log()), rel=1e-5)
        margin = max(others) - float(logits[i, y[i]])
        assert losses(logits, y, loss="margin")[i] == pytest.approx(margin, rel=1e-5)
        divergence = float((p[i] * (p[i] / q[i]).log()).sum())
        assert losses(logits, y, loss="kl", clean_logits=clean)[i] == pytest.approx(divergence, rel=1e-4)


def test_input_gradient_against_finite_differences(mlp):
    model = mlp(3).double().requires_grad_(False)
    torch.manual_seed(1)
    x, y = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    for loss in ("ce", "margin"):
        gradient = input_gradient(model, x, y, loss=loss)
        for place in ((0, 1, 2, 3), (1, 0, 7, 7)):
            step = torch.zeros_like(x)
            step[place] = 1e-6
            rise = losses(model(x + step), y, loss=loss).sum() - losses(model(x - step), y, loss=loss).sum()
            assert float(gradient[place]) == pytest.approx(float(rise) / 2e-6, abs=1e-5)


def test_restarts_keep_the_best_of_each_image(mlp, images):
    # Replaying the starts one by one with the same generator gives the candidates to choose from.
    model, threat = mlp(4, gain=5.0), ThreatModel("linf", 0.05)
    y = model(images).argmax(1)
    best = pgd(model, images, y, threat, steps=2, restarts=5, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    tried = [pgd(model, images, y, threat, steps=2, generator=generator) for _ in range(5)]
    for i in range(len(images)):
        with torch.no_grad():
            logits = torch.cat([model(candidate[i : i + 1]) for candidate in tried])
        rank = [(bool(logit.argmax() != y[i]), float(F.cross_entropy(logit[None], y[i : i + 1]))) for logit in logits]
        assert torch.equal(best[i], tried[max(range(5), key=rank.__getitem__)][i])


def test_restarts_prefer_misclassified_to_high_loss():
    class Steps(nn.Module):
        """Wrong above 0.5, by a little (cross-entropy 0.74); right below, but hardly sure (2.3)."""

        def forward(self, x):
            wrong = torch.tensor([0.0, 0.1] + 8 * [-9.0])
            right = torch.tensor([0.01] + 9 * [0.0])
            at = x.flatten(1).mean(1, keepdim=True)
            return torch.where(at > 0.5, wrong, right) + 0 * at

    x = torch.full((1, 1, 1, 1), 0.5)
    y = torch.tensor([0])
    threat = ThreatModel("linf", 0.4)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x_adv = pgd(Steps(), x, y, threat, steps=1, restarts=12, generator=generator)
        assert float(x_adv) > 0.5


def test_start_is_used_and_brought_into_the_ball(linear, images):
    model = linear(torch.zeros(3, 8, 8))  # a flat loss: the attack stays where it starts
    y = torch.zeros(len(images), dtype=torch.int64)
    threat = ThreatModel("linf", 0.1)
    x_adv = pgd(model, images, y, threat, steps=3, start=images + 0.05)
    assert torch.equal(x_adv, threat.project(images + 0.05, images))
    assert torch.equal(pgd(model, images, y, threat, steps=3, random_start=False), images)


def test_same_seed_same_attack_and_others_differ(mlp, images):
    model, y = mlp(4), torch.zeros(24, dtype=torch.int64)
    runs = [
        pgd(
            model,
            images,
            y,
            ThreatModel(),
            steps=1,
            step_size=1e-3,
            generator=torch.Generator().manual_seed(s),
        )
        for s in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_default_step_is_a_quarter_of_eps(linear):
    model, x = linear(torch.ones(1, 2, 2)), torch.full((1, 1, 2, 2), 0.5)
    x_adv = pgd(model, x, torch.tensor([1]), ThreatModel(), steps=2, random_start=False)
    torch.testing.assert_close(x_adv, x + 4 / 255)


def test_eval_mode_gives_each_module_its_own_flag_back(convnet):
    convnet.train()
    convnet[1].eval()  # a batch norm that its owner froze
    with pytest.raises(KeyError), eval_mode(convnet):
        assert not any(module.training for module in convnet.modules())
        raise KeyError
    assert convnet.training
    assert [module.training for module in convnet] == [True, False, True, True, True, True]


def test_names_read_back_what_they_say():
    for steps, restarts, loss in itertools.product((1, 20), (1, 5), ("ce", "margin", "kl")):
        spec = AttackSpec(kind="pgd", steps=steps, restarts=restarts, loss=loss)
        assert attack_by_name(spec.name) == spec
    for kind in ("clean", "fgsm", "autoattack"):
        assert attack_by_name(kind) == AttackSpec(kind=kind)
    assert attack_by_name("PGD-10x5-margin") == AttackSpec(kind="pgd", steps=10, restarts=5, loss="margin")
    assert attack_by_name("pgd-20x1-ce").name == "pgd-20"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("pgd20", "pgd-20"), ("autoatack", "autoattack"), ("pgd-0", "pgd-20"), ("fgms", "fgsm")],
)
def test_unknown_names_offer_the_nearest(name, hint):
    with pytest.raises(InputError, match=f"did you mean '{hint}'"):
        attack_by_name(name)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"restarts": 0}, "restarts=0"),
        ({"loss": "cw"}, "loss='cw'"),
        ({"restarts": 2, "random_start": False}, "all begin alike"),
    ],
)
def test_bad_options(mlp, images, kwargs, message):
    with pytest.raises(InputError, match=message):
        pgd(mlp(3), images, torch.zeros(24, dtype=torch.int64), ThreatModel(), **kwargs)


def test_fgsm_refuses_the_loss_that_is_flat_at_its_start(mlp, images):
    with pytest.raises(InputError, match="flat at the clean image"):
        fgsm(mlp(3), images, torch.zeros(24, dtype=torch.int64), ThreatModel(), loss="kl")
