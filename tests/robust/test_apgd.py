from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from robustcompress.errors import InputError
from robustcompress.robust import ThreatModel, apgd_fast, attack_by_name, evaluate, pgd
from robustcompress.robust.apgd import PASSES


class Classes(nn.Module):
    """Logits that are linear in the image, any number of them: the worst case is known class by class."""

    def __init__(self, classes: int, size: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 3 * size * size, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.T

    def worst(self, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
        """Smallest margin that any perturbation can reach; for l2 where the bounds are far."""
        margins = torch.full((len(x), len(self.weight)), torch.inf)
        for i, true in enumerate(y.tolist()):
            for wrong in set(range(len(self.weight))) - {true}:
                slope = self.weight[true] - self.weight[wrong]
                if threat.norm == "linf":
                    at = (x[i].flatten() - threat.eps * slope.sign()).clamp(*threat.bounds)
                    margins[i, wrong] = slope @ (at - 0.5)
                else:
                    margins[i, wrong] = slope @ (x[i].flatten() - 0.5) - threat.eps * slope.norm()
        return margins.amin(1).detach()


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.008), ThreatModel("l2", 0.06)], ids=lambda t: t.norm)
def test_on_linear_models_it_breaks_what_can_be_broken_and_nothing_else(classes, threat):
    model = Classes(classes, 6, seed=classes)
    x = 0.3 + 0.4 * torch.rand(120, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    worst = model.worst(x, y, threat)
    sure = worst.abs() > 0.01 * worst.abs().mean()
    breakable = worst < 0
    assert 10 < breakable.sum() < 110, "the case tests nothing"
    x_adv = apgd_fast(model, x, y, threat)
    assert torch.equal(right(model, x_adv, y)[sure], ~breakable[sure])
    # And of those that stand the worst point that there is was nearly found.
    left = x_adv[~breakable]
    margin = model(left).gather(1, y[~breakable, None]).squeeze(1)
    margin -= model(left).scatter(1, y[~breakable, None], -torch.inf).amax(1)
    clean = model(x[~breakable]).topk(2).values.diff(dim=1).squeeze(1).neg()
    assert ((margin - worst[~breakable]) <= 0.35 * (clean - worst[~breakable]) + 1e-4).all()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_stays_in_the_ball_and_keeps_the_layout(convnet, images, norm, bounds, layout):
    convnet.eval()
    x = (bounds[0] + (bounds[1] - bounds[0]) * images).contiguous(memory_format=layout)
    threat = ThreatModel(norm, 0.2, bounds)
    y = convnet(x).argmax(1)
    x_adv = apgd_fast(convnet, x, y, threat, passes=60, batch_size=10)
    assert not x_adv.requires_grad
    assert x_adv.is_contiguous(memory_format=layout)
    assert (threat.size(x_adv, x) <= threat.limit).all()
    assert bounds[0] <= x_adv.min() and x_adv.max() <= bounds[1]
    assert (threat.size(x_adv, x) > 0).all()


def test_more_passes_only_add_to_what_fewer_break(mlp, images):
    model, threat = mlp(6, gain=4.0), ThreatModel("linf", 0.03)
    y = model(images).argmax(1)
    stands = [right(model, apgd_fast(model, images, y, threat, passes=n), y) for n in (1, 4, 15, 40, PASSES, 500)]
    counts = [int(flags.sum()) for flags in stands]
    assert counts[0] > counts[-1], "the case tests nothing"
    assert all((more <= fewer).all() for fewer, more in itertools.pairwise(stands))


@pytest.mark.parametrize("norm, eps", [("linf", 0.02), ("l2", 0.5)])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_on_random_networks_it_is_at_least_as_strong_as_pgd(norm, eps, classes):
    threat = ThreatModel(norm, eps)
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = theirs = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()), nn.Flatten(), nn.Linear(128, classes)
        ).eval()
        y = model(x).argmax(1)
        found = int(right(model, apgd_fast(model, x, y, threat), y).sum())
        rival = pgd(model, x, y, threat, steps=20, generator=torch.Generator().manual_seed(0))
        ours, theirs = ours + found, theirs + int(right(model, rival, y).sum())
        assert found <= int(right(model, rival, y).sum()) + 1
    assert ours <= theirs


def test_what_becomes_of_an_image_does_not_depend_on_its_neighbours(mlp, images):
    # In double precision, so that the rounding of differently shaped products is too small to tell.
    model, threat = mlp(6, gain=4.0).double(), ThreatModel("linf", 0.03)
    x = images.double()
    y = model(x).argmax(1)
    whole = apgd_fast(model, x, y, threat)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    mixed = torch.empty_like(x)
    mixed[order] = apgd_fast(model, x[order], y[order], threat, batch_size=5)
    alone = torch.cat([apgd_fast(model, x[i : i + 1], y[i : i + 1], threat) for i in range(len(x))])
    torch.testing.assert_close(mixed, whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-9)
    other = apgd_fast(model, x, y, threat, seed=1)
    assert not torch.equal(other, whole)


def test_passes_are_kept_and_batches_are_full(mlp, count):
    model, threat = mlp(6, gain=4.0), ThreatModel("linf", 0.02)
    x = torch.rand(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    counter = count(model)
    x_adv = apgd_fast(model, x, y, threat, passes=50, batch_size=20)
    images, calls = counter.images, counter.calls
    assert right(model, x_adv, y).float().mean() < 0.9, "the case tests nothing"
    # Some are broken or given up early, the others take 50 passes, and all the one they begin with.
    assert images < 300 * 51
    assert images / calls > 0.7 * 20
    stubborn = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with torch.no_grad():
        stubborn[1].weight.zero_()
        stubborn[1].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    counter = count(stubborn)
    apgd_fast(stubborn, x, torch.zeros(300, dtype=torch.int64), threat, passes=50, batch_size=300)
    assert counter.images <= 300 * 51


def test_a_cross_entropy_that_saturates_does_not_stop_it(mlp, images):
    # Logits so far apart that the cross-entropy is exactly zero in float32, and its gradient with it.
    threat, stands = ThreatModel("linf", 0.03), []
    for gain in (1.0, 1e5):
        model = mlp(6, gain=gain)
        with torch.no_grad():
            model[3].bias.mul_(gain)
        y = model(images).argmax(1)
        stands.append(right(model, apgd_fast(model, images, y, threat), y))
    saturated = right(model, pgd(model, images, y, threat, steps=20), y)
    assert saturated.sum() > stands[0].sum(), "the case tests nothing"
    assert int((stands[0] != stands[1]).sum()) <= 1


def test_nothing_of_the_network_is_touched(convnet, images):
    convnet.eval()
    convnet[5].weight.grad = torch.full_like(convnet[5].weight, 7.0)
    state = torch.random.get_rng_state()
    y = torch.zeros(len(images), dtype=torch.int64)
    with torch.inference_mode():
        apgd_fast(convnet, images.clone(), y, ThreatModel(), passes=30)
    assert (convnet[5].weight.grad == 7).all()
    assert all(p.grad is None and p.requires_grad for name, p in convnet.named_parameters() if name != "5.weight")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_broken_logits_neither_raise_nor_leave_the_ball(images):
    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5] * torch.tensor([1.0, 1.0, torch.nan, 1.0, 1.0])

    x_adv = apgd_fast(Nan(), images, torch.zeros(len(images), dtype=torch.int64), ThreatModel(), passes=40)
    assert (ThreatModel().size(x_adv, images) <= ThreatModel().limit).all()


@pytest.mark.parametrize(
    "settings, said",
    [({"passes": 0}, "passes=0"), ({"passes": 2.5}, "passes=2.5"), ({"batch_size": 0}, "batch_size=0")],
)
def test_counts_that_cannot_be(mlp, images, settings, said):
    with pytest.raises(InputError, match=said):
        apgd_fast(mlp(3), images, torch.zeros(24, dtype=torch.int64), ThreatModel(), **settings)


def test_no_images_are_no_trouble(mlp, images):
    assert apgd_fast(mlp(3), images[:0], torch.zeros(0, dtype=torch.int64), ThreatModel()).shape == (0, 3, 8, 8)


def test_it_goes_by_its_name():
    spec = attack_by_name("APGD-fast")
    assert (spec.kind, spec.steps, spec.name) == ("apgd-fast", PASSES, "apgd-fast")
    assert attack_by_name(f"apgd-fast-{PASSES}") == spec
    assert attack_by_name(attack_by_name("apgd-fast-400").name).steps == 400
    with pytest.raises(InputError, match="apgd-fast"):
        attack_by_name("apgd-fst")


def test_evaluate_runs_it_and_its_batches_change_nothing(mlp):
    model = mlp(6, gain=4.0)
    x = torch.rand(120, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    y[:20] = (y[:20] + 1) % 6
    threat = ThreatModel("linf", 0.02)
    reports = [evaluate(model, (x, y), threat, attacks=["pgd-20", "apgd-fast"], batch_size=n) for n in (16, 200)]
    first, second = (report.result("apgd-fast") for report in reports)
    # The rounding of other batches may tip an image that lies on the edge.
    assert int((first.correct != second.correct).sum()) <= 1
    assert first.accuracy <= reports[0].result("pgd-20").accuracy < 100 / 120
    assert first.max_perturbation <= threat.limit
    assert reports[0].robust_accuracy is None
