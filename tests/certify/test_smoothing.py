"""Randomized smoothing against a linear classifier, whose smoothed decision is known: the margin over the norm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustcompress.certify import ABSTAINS, certify
from robustcompress.errors import InputError


class Linear(nn.Module):
    """Two logits, `w.x + b` and 0. Under Gaussian noise the vote flips exactly at distance |w.x + b| / |w|."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 4, 4, generator=generator))
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum())
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        score = (x * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([score, torch.zeros_like(score)], 1)

    def radius(self, x: Tensor) -> Tensor:
        """Of the smoothed classifier, exactly: it is the network's own (Cohen et al. 2019, proposition 3)."""
        score = (x.double() * self.weight).flatten(1).sum(1) + self.bias
        return score.abs() / self.weight.double().norm()


def images(n: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    return x, (Linear()(x).argmax(1)).long()


def test_close_to_and_below_the_known_radius() -> None:
    model, (x, y) = Linear(), images(30)
    report = certify(model, (x, y), sigma=0.25, n=20_000, seed=1)
    exact = model.radius(x)[report.indices]
    decided = report.predictions != ABSTAINS
    assert (report.radii <= exact).all()
    reachable = decided & (exact < 0.6)  # beyond, all draws agree, and their number is the limit
    assert reachable.sum() > 10 and (exact - report.radii)[reachable].max() < 0.05
    assert report.correct[decided].all() and (exact[~decided] < 0.02).all()
    assert report.mean_radius == pytest.approx(float(report.radii.mean()))


def test_certificates_fail_no_more_often_than_alpha() -> None:
    """Over many independent certifications, with an alpha large enough to count failures."""
    model, (x, y), alpha, repeats = Linear(), images(12), 0.1, 60
    failed = 0
    for seed in range(repeats):
        report = certify(model, (x, y), sigma=0.5, n0=20, n=300, alpha=alpha, seed=seed)
        failed += int((report.radii > model.radius(x)[report.indices]).sum())
    total = 12 * repeats
    assert failed / total <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / total)
    assert failed > 0


def test_deterministic_by_seed_and_by_image() -> None:
    model, data = Linear(), images(20)
    before = torch.random.get_rng_state()
    first = certify(model, data, n=200, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = certify(model, data, n=200, seed=3)
    few = certify(model, data, n=200, seed=3, max_images=7)
    assert torch.equal(first.radii, again.radii) and torch.equal(first.radii[:7], few.radii)
    assert not torch.equal(first.radii, certify(model, data, n=200, seed=4).radii)


def test_batches_are_full_and_guess_and_bound_use_other_draws() -> None:
    model, data = Linear(), images(1)
    certify(model, data, n0=50, n=250, batch_size=100)
    # A look at the model, on a copy like the rest: the counter list is shared by no one.
    assert model.calls == []
    copied: list[int] = []
    model.register_forward_hook(lambda module, args, out: copied.append(len(args[0])))
    certify(model, data, n0=50, n=250, batch_size=100)
    assert copied[1:] == [50, 100, 100, 50]


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    model, data = Linear(), images(10)
    whole = certify(model, data, n=200)
    seen = 0

    def stop(step: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify(model, data, n=200, resume_dir=tmp_path, progress=stop)
    (file,) = tmp_path.glob("smoothing-*.jsonl")
    file.write_text(file.read_text() + "[4, 0, 0.3")  # a crash in the middle of a line
    counted: list[int] = []
    model.register_forward_hook(lambda module, args, out: counted.append(len(args[0])))
    resumed = certify(model, data, n=200, resume_dir=tmp_path)
    assert counted.count(200) == 6 and torch.equal(resumed.radii, whole.radii)
    counted.clear()
    certify(model, data, n=200, resume_dir=tmp_path, max_images=10)
    assert counted == [2]  # all is kept; other settings are not
    certify(model, data, n=300, resume_dir=tmp_path)
    assert counted.count(300) == 10


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(InputError) as error:
        certify(Linear(), images(3), sigma=-1, n=5, alpha=0.001, eps=0.1, max_images=0, device="gpu")
    for part in ("sigma=-1", "n=5", "at least 10", "eps=0.1", "max_images=0", "device='gpu'"):
        assert part in str(error.value)
    with pytest.raises(InputError, match="did you mean 'smoothing'"):
        certify(Linear(), images(3), method="smooting")
    with pytest.raises(InputError, match="needs eps"):
        certify(Linear(), images(3), method="ibp")
    with pytest.raises(InputError, match="does not take images"):
        certify(Linear(), (torch.rand(2, 3, 8, 8), torch.tensor([0, 1])))
