"""Bounds against what networks really compute: corners and random points of the boxes, and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustcompress as rc
from robustcompress.errors import UnsupportedModelError
from robustcompress.robust.bounds import Interval, box, certified_by_bounds, margins
from robustcompress.robust.bounds.interval import NoRuleError
from robustcompress.robust.bounds.relu import BoundedReLU
from robustcompress.structure import StructuralEditor
from robustcompress.structure.masks import TopK
from robustcompress.structure.weights import WeightGates, maskable_weights


def unsettled(model: nn.Module) -> nn.Module:
    """Double precision, eval mode, batch norms with statistics and weights of both signs."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.running_mean.copy_(0.3 * torch.randn(shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            module.weight.data.copy_(torch.randn(shape, generator=generator))
            module.bias.data.copy_(0.3 * torch.randn(shape, generator=generator))
    return model.double().eval()


def tried(model: nn.Module, x: Tensor, eps: float, tries: int = 60) -> list[Tensor]:
    """Logits at random corners and inner points of the boxes, and at what descends towards each class."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for index in range(tries):
        noise = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        noise = noise.sign() if index % 2 else noise
        found.append(model((x + eps * noise).clamp(0, 1)).detach())
    for goal in range(found[0].shape[1]):
        at = x.clone().requires_grad_()
        slope = torch.autograd.grad(model(at)[:, goal].sum(), at)[0]
        found += [model((x + sign * eps * slope.sign()).clamp(0, 1)).detach() for sign in (-1, 1)]
    return found


def check(model: nn.Module, x: Tensor, eps: float, *, crown: bool) -> None:
    y = torch.arange(len(x)) % 10
    bounds = margins(model, box(x, eps), y, crown=crown)
    torch.testing.assert_close(bounds.clean, model(x))
    others = torch.ones_like(bounds.ibp, dtype=torch.bool).scatter_(1, y[:, None], False)
    for found in (bounds.ibp, *([bounds.crown] if crown else [])):
        for logits in tried(model, x, eps):
            leads = logits.gather(1, y[:, None]) - logits
            assert (leads[others] >= found[others] - 1e-9).all()
    at_a_point = margins(model, box(x, 0.0), y, crown=crown)
    lead = bounds.clean.gather(1, y[:, None]) - bounds.clean
    for found in (at_a_point.ibp, *([at_a_point.crown] if crown else [])):
        torch.testing.assert_close(found, lead)  # nothing may change: nothing is lost


@pytest.mark.parametrize("crown", [False, True])
@pytest.mark.parametrize("name", ["resnet8", "preact_resnet18"])
def test_no_image_of_the_box_beats_the_bounds(name: str, crown: bool) -> None:
    torch.manual_seed(0)
    width = {"width": 0.125} if name != "resnet8" else {}
    model = unsettled(rc.build_model(name, num_classes=10, stem_stride=4, **width)[0])
    check(model, torch.rand(3, 3, 16, 16, dtype=torch.float64), 0.002, crown=crown)


@pytest.mark.parametrize("name", ["mobilenet_v2", "vgg16_bn", "densenet121"])
def test_other_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = unsettled(rc.build_model(name, num_classes=10, width=0.1)[0])
    check(model, torch.rand(2, 3, 32, 32, dtype=torch.float64), 1e-5, crown=False)


@pytest.mark.parametrize(
    "act", [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Mish(), nn.LeakyReLU(0.2), nn.ELU(), nn.Sigmoid(), nn.ReLU6()]
)
def test_activations(act: nn.Module) -> None:
    ends = torch.linspace(-4, 4, 41, dtype=torch.float64)
    for low, high in itertools.combinations(ends, 2):
        inputs = torch.linspace(low.item(), high.item(), 101, dtype=torch.float64)
        bounds = act(Interval(inputs[:1], low[None], high[None]))
        out = act(inputs)
        assert bounds.lower <= out.min() + 1e-12 and out.max() <= bounds.upper + 1e-12
        assert bounds.lower >= out.min() - 0.02 and bounds.upper <= out.max() + 0.02  # and they are tight


class Gated(nn.Module):
    """Squeeze and excitation, chunks, products of what has bounds, constants of either sign, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.gate = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.conv(x))
        a = a * torch.sigmoid(self.gate(a.mean((2, 3))))[:, :, None, None]
        first, second = a.chunk(2, 1)
        b = torch.cat([second - 2 * first, 1 - first, -second], 1)[:, :8]
        b = F.max_pool2d(b, 2) / -3.0
        b += 0.5
        return self.fc(self.drop(b).amax((2, 3)))


def test_arithmetic() -> None:
    torch.manual_seed(0)
    check(unsettled(Gated()), torch.rand(3, 3, 8, 8, dtype=torch.float64), 0.03, crown=False)


@pytest.mark.parametrize("crown", [False, True])
def test_exact_for_one_linear_layer(crown: bool) -> None:
    """The worst of `w.x` over a box is known: x - eps sign(w), clipped to the range of pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).double()
    x, y, eps = torch.rand(5, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0]), 0.2
    found = margins(model, box(x, eps), y, crown=crown).best
    for n, k in itertools.product(range(5), range(4)):
        w = (model[1].weight[y[n]] - model[1].weight[k]).view(3, 4, 4)
        worst = (x[n] - eps * w.sign()).clamp(0, 1)
        exact = (w * worst).sum() + model[1].bias[y[n]] - model[1].bias[k]
        torch.testing.assert_close(found[n, k], exact)


def test_crown_is_exact_where_no_relu_can_turn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    model[1].bias.data.copy_(torch.tensor([9.0, -9.0, 9.0, 9.0, -9.0, 9.0]))
    x, y, eps = torch.rand(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), 0.1
    found = margins(model, box(x, eps), y, crown=True)
    weight = model[3].weight @ (model[1].weight * (model[1].bias > 0)[:, None])
    bias = model[3].bias + model[3].weight @ (model[1].bias * (model[1].bias > 0))
    for n, k in itertools.product(range(4), range(3)):
        w = weight[y[n]] - weight[k]
        worst = (x[n].flatten() - eps * w.sign()).clamp(0, 1)
        torch.testing.assert_close(found.crown[n, k], w @ worst + bias[y[n]] - bias[k])
    assert (found.crown >= found.ibp - 1e-9).all() and (found.crown > found.ibp + 1e-3).any()


def test_the_relaxed_relu_by_hand() -> None:
    z = torch.tensor([[0.5, -0.2, 0.5, 2.0, -2.0]], dtype=torch.float64, requires_grad=True)
    lower = torch.tensor([[-1.0, -3.0, -1.0, 1.0, -3.0]], dtype=torch.float64)
    upper = torch.tensor([[3.0, 1.0, 3.0, 3.0, -1.0]], dtype=torch.float64)
    a = torch.tensor([[1.0, 1.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    slack = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    slope, gap = torch.autograd.grad((a * BoundedReLU.apply(z, z.detach(), lower, upper, slack)).sum(), (z, slack))
    # Lower lines: slope 1, slope 0. Upper line: 3/4 (z + 1). Always on, always off.
    torch.testing.assert_close(slope, torch.tensor([[1.0, 0.0, -0.75, -1.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(gap, torch.tensor([-0.5 + 0.75 * 1.5], dtype=torch.float64))


def test_gradients_of_the_linear_bound() -> None:
    """By finite differences: the whole of CROWN-IBP can be trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    model[1].momentum = 0.0
    x, y = torch.rand(4, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    def bound(weight: Tensor) -> Tensor:
        state = {"0.weight": weight}
        wrapped = lambda images: torch.func.functional_call(model, state, (images,))  # noqa: E731
        module = nn.Module()
        module.forward = wrapped  # type: ignore[method-assign]
        return margins(module, box(x, 0.05), y, crown=True, trains=True).crown

    weight = model[0].weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(bound, (weight,))


@pytest.mark.parametrize("crown", [False, True])
def test_gates_are_seen(crown: bool) -> None:
    """Bounds under a closed gate are those of the network without the channel; hooks cannot be bypassed."""
    torch.manual_seed(0)
    model = unsettled(rc.build_model("resnet8", num_classes=10, stem_stride=2)[0])
    x, y = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2, 3])
    editor = StructuralEditor(model, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    group = next(group for group in editor.editable if group.kind == "hidden")
    scores = {group.name: nn.Parameter(torch.rand(group.width, dtype=torch.float64))}
    whole = margins(model, box(x, 0.01), y, crown=crown).best
    with editor.gates(scores, TopK(lambda scores: {group.name: group.width // 2})) as gates:
        kept = gates.kept()[group.name]
        gated = margins(model, box(x, 0.01), y, crown=crown)
        check(model, x, 0.01, crown=crown)
        gradient = torch.autograd.grad(gated.ibp.sum(), gates.scores[group.name])[0]
    assert (gradient[kept].abs() > 0).all()
    editor.prune(group.name, kept.nonzero().flatten().tolist())
    pruned = margins(model, box(x, 0.01), y, crown=crown).best
    torch.testing.assert_close(gated.best, pruned)
    assert not torch.allclose(whole, pruned)


def test_masks_on_weights_are_seen() -> None:
    torch.manual_seed(0)
    model = unsettled(rc.build_model("resnet8", num_classes=10, stem_stride=2)[0])
    x, y = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 2])
    weights = maskable_weights(model)
    scores = {name: torch.rand(weight.shape) for name, weight in weights.items()}
    with WeightGates(model, scores, TopK(lambda scores: {name: w.numel() // 2 for name, w in scores.items()})) as gates:
        masked = margins(model, box(x, 0.01), y).ibp
        masks = gates.kept()
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    torch.testing.assert_close(masked, margins(model, box(x, 0.01), y).ibp)


def test_batch_norm_in_training() -> None:
    """Bounds hold for the network with the batch statistics of the clean images; running ones move once, as ever."""
    torch.manual_seed(0)
    model = unsettled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)))
    x, y = torch.rand(4, 3, 6, 6, dtype=torch.float64), torch.arange(4)
    fixed = unsettled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)))
    fixed.load_state_dict(model.state_dict())
    mapped = fixed[0](x)
    mapped = mapped.detach()
    fixed[1].running_mean.copy_(mapped.mean((0, 2, 3)))
    fixed[1].running_var.copy_(mapped.var((0, 2, 3), unbiased=False))
    expected = 0.9 * model[1].running_mean + 0.1 * mapped.mean((0, 2, 3))
    for crown in (False, True):
        again = model[1].running_mean.clone()
        trained = margins(model.train(), box(x, 0.02), y, crown=crown)
        torch.testing.assert_close(trained.best, margins(fixed.eval(), box(x, 0.02), y, crown=crown).best)
        torch.testing.assert_close(model[1].running_mean, expected.detach())
        model[1].running_mean.copy_(again)
    assert int(model[1].num_batches_tracked) == 2


def test_what_has_no_rule_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x, 1)

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), Odd())
    with pytest.raises(UnsupportedModelError, match=r"layer '2' \(Odd\): there is no rule for softmax"):
        margins(model, box(torch.rand(2, 3, 2, 2), 0.1), torch.tensor([0, 1]))
    vit, _ = rc.build_model("vit_micro", num_classes=10)
    with pytest.raises(UnsupportedModelError, match="layer "):
        margins(vit, box(torch.rand(2, 3, 32, 32), 0.1), torch.tensor([0, 1]))
    with pytest.raises(UnsupportedModelError, match="dropout"):
        dropping = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 4))
        margins(dropping, box(torch.rand(2, 3, 2, 2), 0.1), torch.tensor([0, 1]))
    pooled = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(UnsupportedModelError, match=r"layer '0' \(MaxPool2d\): crown-ibp has no linear bounds"):
        margins(pooled, box(torch.rand(2, 3, 2, 2), 0.1), torch.tensor([0, 1]), crown=True)


@pytest.mark.parametrize(
    "leak",
    [
        lambda x: x.detach().flatten(1),
        lambda x: x.data.flatten(1),
        lambda x: torch.tensor(x.tolist()).flatten(1),
        lambda x: torch.from_numpy(x.numpy()).flatten(1),
        lambda x: x.flatten(1) * (2.0 if x.max() > 0.5 else 1.0),
        lambda x: torch.zeros(2, 12).copy_(x.flatten(1)),
        lambda x: torch.stack([row.clone() for row in x]).flatten(1),
        lambda x: x[x > 0.5],
    ],
)
def test_nothing_slips_past_the_rules(leak: object) -> None:
    """Values, detached values, copies: each is refused or bounded, never taken for a constant."""

    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(leak(x))  # type: ignore[operator]

    torch.manual_seed(0)
    model, x, y = Leaky(), torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
    for crown in (False, True):
        try:
            found = margins(model, box(x, 0.1), y, crown=crown)
        except (UnsupportedModelError, TypeError, RuntimeError):
            continue
        straight = nn.Sequential(nn.Flatten(), model.fc)
        torch.testing.assert_close(found.best, margins(straight, box(x, 0.1), y, crown=crown).best)


def test_in_place_changes_reach_all_who_look() -> None:
    """A residual block whose identity is the very tensor that a ReLU then changes in place."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            a = self.fc(x.flatten(1))
            kept = a
            F.relu(a, inplace=True)
            return kept + a

    torch.manual_seed(0)
    model = Block().double()
    images = box(torch.rand(2, 3, 2, 2, dtype=torch.float64), 0.1)
    found = model(images)
    for _ in range(20):
        inner = images.lower + torch.rand_like(images.lower) * (images.upper - images.lower)
        out = model(inner)
        assert (found.lower - 1e-12 <= out).all() and (out <= found.upper + 1e-12).all()
    with pytest.raises(NoRuleError, match="in place"):
        F.relu(images.flatten(1), inplace=True)


def test_changes_after_the_last_layer_do_not_reach_back_into_it() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x.flatten(1))
            logits = self.last(a)
            F.relu(a, inplace=True)
            a *= 0.0
            return logits

    torch.manual_seed(0)
    with torch.no_grad():
        x, y = torch.rand(2, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1])
        model = Late().double()
        straight = nn.Sequential(nn.Flatten(), model.first, model.last)
        torch.testing.assert_close(margins(model, box(x, 0.1), y).ibp, margins(straight, box(x, 0.1), y).ibp)


def test_constants_in_the_shape_of_bounds() -> None:
    images = box(torch.rand(2, 3, 2, 2), 0.1)
    assert torch.equal(torch.arange(2.0).expand_as(images), torch.arange(2.0).expand(2, 3, 2, 2))
    halved = images * images.new_full((1, 3, 1, 1), -0.5) + torch.ones_like(images)
    torch.testing.assert_close(halved.upper, 1 - 0.5 * images.lower)


def test_certified_images_withstand_attacks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.rand(200, 3, 4, 4, dtype=torch.float64)
    for eps in (0.002, 0.01, 0.03):
        shares = []
        for crown in (False, True):
            y, proven = certified_by_bounds(model, x, eps, crown=crown)
            attacked = rc.robust.pgd(model, x, y, rc.ThreatModel("linf", eps), steps=20, restarts=3)
            assert (model(attacked).argmax(1) == y)[proven].all()
            shares.append(float(proven.double().mean()))
        assert 0 < shares[0] <= shares[1]
