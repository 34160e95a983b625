"""MART against its formula, written again from the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustcompress.errors import InputError
from robustcompress.robust import MART, PGDAT, ThreatModel
from robustcompress.robust.objectives.mart import runner_up

THREAT = ThreatModel("linf", 8 / 255)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def by_hand(p: Tensor, q: Tensor, y: Tensor, lam: float) -> Tensor:
    """Example by example, from probabilities."""
    losses = []
    for clean, attacked, label in zip(p, q, y.tolist(), strict=True):
        wrong = torch.stack([attacked[k] for k in range(len(attacked)) if k != label]).amax()
        boosted = -attacked[label].log() - (1 - wrong).log()
        divergence = sum(clean[k] * (clean[k] / attacked[k]).log() for k in range(len(clean)))
        losses.append(boosted + lam * divergence * (1 - clean[label]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_is_the_papers_formula_and_so_is_its_gradient(convnet: nn.Module, images: Tensor, norm: str) -> None:
    convnet[3].p = 0.0
    model, y = convnet.train(), torch.arange(24) % 4
    threat = ThreatModel(norm, 0.1)  # type: ignore[arg-type]
    step = MART(lam=3.0, steps=3).loss(model, images, y, threat, generator=seeded())
    expected = by_hand(model(images).softmax(1), model(step.x_adv).softmax(1), y, 3.0)
    torch.testing.assert_close(step.loss, expected)
    torch.testing.assert_close(step.clean_logits, model(images).detach())
    torch.testing.assert_close(step.logits, model(step.x_adv).detach())
    ours = torch.autograd.grad(step.loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for left, right in zip(ours, theirs, strict=True):  # through p, p' and p_y
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)


def test_its_attack_is_that_of_adversarial_training(convnet: nn.Module, images: Tensor) -> None:
    y = torch.arange(24) % 4
    examples = [kind(steps=3).attack(convnet.train(), images, y, THREAT, generator=seeded()) for kind in (MART, PGDAT)]
    assert torch.equal(*examples)


def test_running_statistics_move_by_the_clean_batch_and_then_by_the_attacked(
    convnet: nn.Module, images: Tensor
) -> None:
    convnet[3].p = 0.0
    model, before = convnet.train(), convnet[1].running_mean.clone()
    step = MART(steps=2).loss(model, images, torch.arange(24) % 4, THREAT, generator=seeded())
    for batch in (images, step.x_adv):
        before = 0.9 * before + 0.1 * model[0](batch).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, before.detach(), rtol=1e-4, atol=1e-6)


def test_smoothed_labels_are_those_of_its_first_term(convnet: nn.Module, images: Tensor) -> None:
    model, y = convnet.eval(), torch.arange(24) % 4
    x_adv = MART(steps=1).attack(model, images, y, THREAT, generator=seeded())
    plain, smooth = (MART(label_smoothing=s).loss_on(model, images, x_adv, y).loss for s in (0.0, 0.2))
    log_q = model(x_adv).log_softmax(1)
    expected = 0.2 * (log_q[torch.arange(24), y].mean() - log_q.mean())
    torch.testing.assert_close(smooth - plain, expected, rtol=1e-4, atol=1e-6)


def test_the_second_logarithm_is_finite_where_the_probability_rounds_to_one() -> None:
    logits = torch.tensor([[0.0, 200.0, 1.0], [200.0, 0.0, -3.0], [0.0, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0, 2])
    found = runner_up(logits, y)
    probabilities = logits.detach().double().softmax(1)
    assert found[0].item() == pytest.approx(200 - torch.tensor([0.0, 1.0]).logsumexp(0).item()), "p of class 1 is one"
    assert found[1].item() == pytest.approx(-float((1 - probabilities[1, 1]).log()), abs=1e-6)
    assert found[2].item() == pytest.approx(-float((1 - probabilities[2, 0]).log()))
    found.sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_its_weight_has_to_be_positive() -> None:
    with pytest.raises(InputError, match="lam=-1"):
        MART(lam=-1)
