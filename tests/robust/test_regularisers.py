"""Penalties against their definitions, written out the slow way; and what a regularised objective leaves alone."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import robustcompress as rc
from robustcompress.errors import InputError
from robustcompress.robust import (
    PGDAT,
    JacobianNorm,
    LatentBoundary,
    Objective,
    Regularised,
    SemanticAT,
    Separability,
    ThreatModel,
    hierarchy_from,
)
from robustcompress.robust.objectives.penultimate import classifier_of, features, shifted, still
from robustcompress.robust.objectives.regularisers import supervised_contrast, to_boundary
from robustcompress.train import CompiledNetwork
from robustcompress.train.auxiliary import WithAuxiliary
from tests.strategies.nets import QUICK_RECIPE, small_data

THREAT = ThreatModel("linf", 8 / 255)
ALL = (JacobianNorm(), Separability(), LatentBoundary())
NAMES = [regulariser.name for regulariser in ALL]


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def labels():
    return torch.randint(0, 4, (24,), generator=seeded(0))


@pytest.fixture
def calm(convnet):
    convnet[3].p = 0.0
    return convnet.train()


def test_the_jacobian_norm_is_the_exact_one_on_average(calm, images, labels):
    model, x = calm.eval(), images[:6]
    jacobian = torch.autograd.functional.jacobian(model, x)
    exact = sum(jacobian[i, :, i].square().sum() for i in range(6)) / 6
    found = JacobianNorm(projections=2000).penalty(model, x, x, labels[:6])
    torch.testing.assert_close(found, exact / 2, rtol=0.05, atol=0)
    single = torch.stack([JacobianNorm().penalty(model, x, x + s / 1000, labels[:6]) for s in range(200)])
    assert single.std() > 0.01 * single.mean(), "other attacked images, other projections"
    torch.testing.assert_close(single.mean(), exact / 2, rtol=0.08, atol=0)


def test_the_jacobian_norm_of_a_linear_network_and_its_gradient_are_known(images, labels):
    """Of K logits W x the norm is |W|, and the gradient of half its square W: also by one projection, on average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    penalty = JacobianNorm(projections=2000).penalty(model, images, images, labels)
    weight = model[1].weight
    torch.testing.assert_close(penalty, weight.square().sum() / 2, rtol=0.02, atol=0)
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert F.cosine_similarity(gradient.flatten(), weight.detach().flatten(), dim=0) > 0.99


def test_projections_are_the_same_for_the_same_images(calm, images, labels):
    twice = [JacobianNorm().penalty(calm.eval(), images, images, labels) for _ in range(2)]
    assert torch.equal(*twice)


def test_contrast_against_its_formula():
    found, y = torch.randn(9, 5, generator=seeded()), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    unit = found / found.norm(dim=1, keepdim=True)
    terms = []
    for i in range(9):
        friends = [j for j in range(9) if j != i and y[j] == y[i]]
        others = torch.stack([(unit[i] @ unit[j] / 0.2).exp() for j in range(9) if j != i]).sum()
        if friends:  # the last image is alone in its class
            terms.append(-sum(((unit[i] @ unit[j] / 0.2).exp() / others).log() for j in friends) / len(friends))
    torch.testing.assert_close(supervised_contrast(found, y, 0.2), sum(terms) / len(terms))


def test_contrast_prefers_classes_that_lie_apart():
    y = torch.arange(4).repeat(8)
    apart = F.one_hot(y).float() + 0.01 * torch.randn(32, 4, generator=seeded())
    mixed = apart[torch.randperm(32, generator=seeded())]
    assert supervised_contrast(apart, y, 0.1) + 1 < supervised_contrast(mixed, y, 0.1)


def test_separability_sees_clean_and_attacked_features(calm, images, labels):
    x_adv = (images + 0.03).clamp(0, 1)
    before = [calm[4](calm[3](calm[2](calm[1](calm[0](x))))) for x in (images, x_adv)]
    wanted = supervised_contrast(torch.cat(before), torch.cat([labels, labels]), 0.1)
    torch.testing.assert_close(Separability().penalty(calm, images, x_adv, labels), wanted)


def test_two_classes_are_moved_onto_fishers_boundary():
    found, y = torch.randn(40, 6, generator=seeded()), torch.tensor([0] * 20 + [3] * 20)
    found[:20] += 2
    moved = found + to_boundary(found, y, ridge=0.1)
    mean = [found[:20].mean(0), found[20:].mean(0)]
    inside = torch.cat([found[:20] - mean[0], found[20:] - mean[1]])
    covariance = inside.T @ inside / 40
    covariance += 0.1 * covariance.diagonal().mean() * torch.eye(6)
    normal = torch.linalg.inv(covariance) @ (mean[1] - mean[0])
    side = (found - (mean[0] + mean[1]) / 2) @ normal
    crossed = side * torch.tensor([-1.0] * 20 + [1.0] * 20) < 0
    after = (moved - (mean[0] + mean[1]) / 2) @ normal
    torch.testing.assert_close(after, torch.where(crossed, side, 0.0), atol=1e-4, rtol=1e-4)
    way = (moved - found)[~crossed]
    assert F.cosine_similarity(way, normal.expand_as(way)).abs().min() > 0.999, "the shortest way is along the normal"


def test_of_several_boundaries_the_nearest_is_taken():
    y = torch.arange(4).repeat_interleave(10)
    found = torch.randn(40, 6, generator=seeded()) + 4 * F.one_hot(y, 6)
    shift = to_boundary(found, y, ridge=0.1)
    member = F.one_hot(y).float()
    means = member.T @ found / 10
    inside = found - means[y]
    covariance = inside.T @ inside / 40
    covariance += 0.1 * covariance.diagonal().mean() * torch.eye(6)
    for i in range(40):
        ways = []
        for other in set(range(4)) - {int(y[i])}:
            normal = torch.linalg.inv(covariance) @ (means[other] - means[y[i]])
            side = (found[i] - (means[other] + means[y[i]]) / 2) @ normal
            ways.append(max(0.0, float(-side / normal.norm())))
        assert float(shift[i].norm()) == pytest.approx(min(ways), abs=1e-3)


def test_one_class_alone_has_no_boundary():
    assert not to_boundary(torch.randn(5, 3), torch.full((5,), 2), ridge=0.1).any()


def test_boundary_is_cross_entropy_on_moved_features(calm, images, labels):
    before = calm[4](calm[3](calm[2](calm[1](calm[0](images)))))
    moved = before + 0.5 * to_boundary(before.detach(), labels, ridge=0.1)
    wanted = F.cross_entropy(calm[5](moved), labels)
    found = LatentBoundary(reach=0.5).penalty(calm, images, images, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(found, calm[0].weight)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, calm[0].weight)[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "kinds", [ALL[:1], ALL[1:2], ALL[2:], ALL], ids=["jacobian", "separability", "boundary", "all"]
)
def test_the_loss_is_the_objectives_and_the_weighted_penalties(calm, images, labels, kinds):
    plain, model = copy.deepcopy(calm), copy.deepcopy(calm)
    inner = PGDAT(steps=2)
    step = Regularised(inner, kinds).loss(model, images, labels, THREAT, generator=seeded())
    alone = inner.loss(plain, images, labels, THREAT, generator=seeded())
    assert torch.equal(step.x_adv, alone.x_adv) and torch.equal(step.logits, alone.logits)
    assert all(torch.equal(v, plain.state_dict()[n]) for n, v in model.state_dict().items()), "no statistics move"
    penalties = sum(k.weight * k.penalty(calm, images, step.x_adv, labels) for k in kinds)
    torch.testing.assert_close(step.loss, alone.loss + penalties)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "no hook stays"


def test_an_objective_without_parts_is_refused():
    class Whole(Objective):
        name = "whole"

        def loss(self, model, x, y, threat, *, generator=None):
            raise AssertionError

        def to_json(self):
            return {"name": self.name}

    with pytest.raises(InputError, match=r"'whole' cannot be split.*or leave out the regularisers"):
        Regularised(Whole(), (JacobianNorm(),))


@pytest.mark.filterwarnings("ignore")  # googlenet's own about its initialisation
def test_auxiliary_classifiers_are_trained_as_well(labels):
    model = rc.build_model("torchvision:googlenet", num_classes=4, aux_logits=True)[0].train()
    objective = WithAuxiliary(Regularised(PGDAT(steps=1, label_smoothing=0.1), ALL))
    step = objective.loss(model, torch.rand(4, 3, 64, 64), labels[:4], THREAT, generator=seeded())
    step.loss.backward()
    assert float(model.aux1.fc2.weight.grad.abs().sum()) > 0 and float(model.fc.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("name", "size", "classifier"),
    [
        ("resnet8", 32, "fc"),
        ("densenet121", 32, "classifier"),
        ("mobilenet_v2", 32, "classifier"),
        ("vit_micro", 32, "fc"),
        ("torchvision:squeezenet1_1", 64, "classifier.1"),
        ("torchvision:googlenet", 64, "fc"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # googlenet's own about its initialisation
def test_the_classifier_is_found_and_its_features_give_the_logits(name, size, classifier):
    torch.manual_seed(0)
    model = rc.build_model(name, num_classes=7)[0].eval()
    found = classifier_of(model, torch.rand(3, 3, size, size))
    assert found is model.get_submodule(classifier), [n for n, m in model.named_modules() if m is found]
    x = torch.rand(2, 3, size, size, generator=seeded())
    vectors = features(model, x, found)
    assert vectors.dim() == 2 and len(vectors) == 2
    none = shifted(model, x, found, torch.zeros_like)
    torch.testing.assert_close(none, model(x))
    if isinstance(found, nn.Linear):
        torch.testing.assert_close(found(vectors), model(x), rtol=1e-4, atol=1e-4)
        moved = shifted(model, x, found, torch.ones_like)
        torch.testing.assert_close(moved, found(vectors + 1), rtol=1e-4, atol=1e-4)


def test_a_network_without_a_classifier_is_told_so(linear, images):
    with pytest.raises(InputError, match="leave out the regularisers"):
        classifier_of(linear(torch.randn(3, 8, 8)), images)


def test_still_passes_move_nothing_and_have_second_derivatives(calm, images):
    before = copy.deepcopy(calm.state_dict())
    x = images.clone().requires_grad_()
    logits = still(calm, x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert float(calm[0].weight.grad.abs().sum()) > 0
    assert all(torch.equal(v, before[n]) for n, v in calm.state_dict().items())
    torch.testing.assert_close(logits, calm(images))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_networks_are_regularised_alike(images, labels):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).train()
    compiled = CompiledNetwork(copy.deepcopy(network), backend="aot_eager")
    objective = Regularised(PGDAT(steps=1), ALL)
    steps = [objective.loss(model, images, labels, THREAT, generator=seeded()) for model in (network, compiled)]
    torch.testing.assert_close(steps[0].loss, steps[1].loss, rtol=1e-4, atol=1e-5)
    for step in steps:
        step.loss.backward()
    for ours, theirs in zip(network.parameters(), compiled.network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


PAIRS = hierarchy_from({"classes": ["a", "b", "c", "d"], "tree": {"ab": ["a", "b"], "cd": ["c", "d"]}})


def test_aimed_attacks_go_to_the_farthest_classes(images, labels):
    """Of a linear model under a small linf ball, the best step towards t is along the sign of log p_t's gradient."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    aim = SemanticAT(hierarchy=PAIRS, steps=5)
    aimed, towards = aim._targets(labels, seeded())
    assert aimed.all() and bool((towards // 2 != labels // 2).all()), "a and b are apart from c and d"
    assert len(set(zip(labels.tolist(), towards.tolist(), strict=True))) == 8, "every farthest class is drawn"
    x_adv = aim.attack(model, images, labels, THREAT, generator=seeded())
    before, after = (model(i).log_softmax(1).gather(1, towards[:, None]) for i in (images, x_adv))
    assert bool((after > before).all())
    assert bool((THREAT.size(x_adv, images) <= THREAT.limit).all())


def test_images_without_a_target_are_attacked_as_usual(calm, images, labels):
    usual = PGDAT(steps=3).attack(calm, images, labels, THREAT, generator=seeded())
    share = SemanticAT(hierarchy=PAIRS, steps=3, share=1e-9)
    generator = seeded()
    share._targets(labels, generator)  # what its targets draw comes before the start
    expected = PGDAT(steps=3).attack(calm, images, labels, THREAT, generator=generator)
    found = share.attack(calm, images, labels, THREAT, generator=seeded())
    assert torch.equal(found, expected) and not torch.equal(found, usual)
    half, _ = SemanticAT(hierarchy=PAIRS, share=0.5)._targets(torch.zeros(2000, dtype=torch.int64), seeded())
    assert 0.45 < float(half.float().mean()) < 0.55


@pytest.mark.parametrize("name", [*(f"pgd-at+{n}" for n in NAMES), "pgd-at+" + "+".join(NAMES), "semantic-at"])
def test_a_run_is_told_and_read_back(name):
    options = {"hierarchy": "digits"} if name == "semantic-at" else {}
    objective = rc.robust.objective_from_name(name, steps=1, **options)
    result = rc.compress(
        rc.ModelSpec("resnet8", {"width": 0.25, "stem_stride": 4}),
        "magnitude",
        data=small_data(),
        objective=objective,
        epochs=1,
        recipe=QUICK_RECIPE,
        attacks=(),
        progress=False,
    )
    assert rc.robust.objective_from_json(result.settings["objective"]) == objective


def test_recipes_name_them(tmp_path):
    (tmp_path / "tree.json").write_text(json.dumps(hierarchy_from("digits").to_json()))
    base = {"model": "resnet8", "strategy": "none"}
    for written in (
        {"name": "pgd-at+jacobian+separability", "steps": 2, "jacobian_weight": 0.1},
        {"name": "semantic-at+boundary", "hierarchy": str(tmp_path / "tree.json"), "step_size": "2/255"},
    ):
        recipe = rc.RunRecipe.from_mapping(base | {"objective": written})
        assert recipe.objective.to_json()["name"] == written["name"]
        assert rc.RunRecipe.from_mapping(recipe.to_json()) == recipe
    (tmp_path / "tree.json").unlink()
    assert rc.RunRecipe.from_mapping(recipe.to_json()) == recipe, "the recipe of a result needs no file"


def test_ascents_see_the_penalties_too(calm, images, labels):
    """AWP computes the same loss twice on one attack: projections must not differ between the two looks."""
    objective = Regularised(PGDAT(steps=1), ALL)
    x_adv = objective.attack(calm, images, labels, THREAT, generator=seeded())
    looks = [objective.loss_on(copy.deepcopy(calm), images, x_adv, labels).loss for _ in range(2)]
    assert torch.equal(*looks)


def test_other_classes_are_refused_before_any_training():
    with pytest.raises(InputError, match="does not know '0', '1'"):
        SemanticAT(hierarchy=PAIRS).check_classes(["0", "1"])
    with pytest.raises(InputError, match="in another order"):
        Regularised(SemanticAT(hierarchy=PAIRS), (Separability(),)).check_classes(["b", "a", "c", "d"])
    with pytest.raises(InputError, match="compress\\(\\) cannot start: hierarchy 'unnamed' is not about these classes"):
        rc.compress("resnet8", "none", data=small_data(), objective=SemanticAT(hierarchy=PAIRS), progress=False)


def test_every_pair_of_regularisers_composes(calm, images, labels):
    for pair in itertools.permutations(ALL, 2):
        step = Regularised(PGDAT(steps=1), pair).loss(calm, images, labels, THREAT, generator=seeded())
        assert bool(step.loss.isfinite())
