"""Training of networks that return a tuple in training mode: the loss against one that is written out by hand."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import robustcompress as rc
from robustcompress.errors import InputError
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives import FGSMRS, PGDAT, TRADES, Natural
from robustcompress.structure.layout import Layout
from robustcompress.train.auxiliary import WithAuxiliary, with_auxiliary
from tests.strategies.nets import QUICK_OBJECTIVE, Auxiliary, make_session

X, Y = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(6)
THREAT = rc.ThreatModel()


def network() -> Auxiliary:
    torch.manual_seed(0)
    return Auxiliary().train()


def losses(net: nn.Module, x: torch.Tensor, smoothing: float = 0.0) -> list[torch.Tensor]:
    return [F.cross_entropy(logits, Y, label_smoothing=smoothing) for logits in net(x)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_head_adds_its_weighted_cross_entropy(smoothing: float) -> None:
    net = network()
    step = WithAuxiliary(Natural(label_smoothing=smoothing)).loss(net, X, Y, THREAT)
    logits, first, second = losses(net, X, smoothing)
    torch.testing.assert_close(step.loss, logits + 0.3 * first + 0.3 * second)
    torch.testing.assert_close(step.logits, net(X)[0].detach())


def test_attacked_images_are_what_the_heads_are_given() -> None:
    net = network()
    step = WithAuxiliary(PGDAT(steps=2)).loss(net, X, Y, THREAT, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(step.x_adv, X)
    logits, first, second = losses(net, step.x_adv)
    torch.testing.assert_close(step.loss, logits + 0.3 * (first + second))


def test_of_two_passes_the_mean_counts() -> None:
    net = network()
    step = WithAuxiliary(TRADES(steps=1, beta=2.0)).loss(net, X, Y, THREAT)
    clean, attacked = net(X), net(step.x_adv)
    divergence = F.kl_div(attacked[0].log_softmax(1), clean[0].log_softmax(1), reduction="batchmean", log_target=True)
    others = [F.cross_entropy(logits, Y) for logits in (*clean[1:], *attacked[1:])]
    torch.testing.assert_close(step.loss, F.cross_entropy(clean[0], Y) + 2 * divergence + 0.3 * sum(others) / 2)


def test_the_attack_sees_the_logits_alone() -> None:
    net, plain = network(), network()
    plain.heads = None
    for objective in (PGDAT(steps=2, attack_mode="train"), FGSMRS()):
        found, wanted = (
            o.attack(m, X, Y, THREAT, generator=torch.Generator().manual_seed(0))
            for o, m in ((WithAuxiliary(objective), net), (objective, plain))
        )
        assert torch.equal(found, wanted) and net.training


class Whole(Objective):
    name = "whole"

    def loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor, *_: Any, **__: Any) -> ObjectiveStep:
        logits = model(x)
        return ObjectiveStep(F.cross_entropy(logits, y), logits.detach(), x)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name}


def test_an_objective_without_parts_trains_the_logits_alone() -> None:
    net = network()
    objective = WithAuxiliary(Whole())
    torch.testing.assert_close(objective.loss(net, X, Y, THREAT).loss, losses(net, X)[0])
    with pytest.raises(InputError, match="objective 'whole' cannot be split"):
        objective.require_parts()


def test_the_weight_is_that_of_the_network() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        inception = torchvision.models.inception_v3(init_weights=False)
    for net, weight in ((inception, 0.4), (network(), 0.3)):
        found = with_auxiliary(
            Natural(), cast("Any", SimpleNamespace(model=net, layout=Layout({}, {}, {}, "", auxiliary=("x",))))
        )
        assert vars(found)["_weight"] == weight
    plain = SimpleNamespace(model=inception, layout=Layout({}, {}, {}, ""))
    assert with_auxiliary(objective := Natural(), cast("Any", plain)) is objective


def test_a_session_trains_the_heads_and_leaves_nothing_behind() -> None:
    net = network()
    session, before = make_session(net, epochs=0.5), copy.deepcopy(net.state_dict())
    session.train("train", share=1.0)
    session.settle()
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"heads.0.2.weight", "heads.1.2.weight", "heads.0.1.running_mean", "fc.weight"} <= moved
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert isinstance(net.train()(X), tuple) and isinstance(net.eval()(X), torch.Tensor)


@pytest.mark.slow
def test_a_small_googlenet_from_end_to_end(tmp_path: Any) -> None:
    pytest.importorskip("torchvision")
    spec = rc.ModelSpec("torchvision:googlenet", {"aux_logits": True, "init_weights": False})
    data = rc.load_data("digits", image_size=32, train_limit=48, test_limit=8)
    result = rc.compress(
        spec,
        "uniform",
        data=data,
        objective=QUICK_OBJECTIVE,
        recipe=rc.Recipe(batch_size=8, val_images=4),
        epochs=1,
        attacks=("clean",),
        progress=False,
        out=tmp_path / "out",
    )
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.model.aux1.fc2.out_features == result.model.fc.out_features == 10
    loaded = rc.load(tmp_path / "out")
    x = data.test.as_float()[:2]
    assert torch.equal(loaded.model(x), result.model(x))
    assert [tuple(logits.shape) for logits in loaded.model.train()(x)] == [(2, 10)] * 3
    report = rc.export_onnx(loaded.model.eval(), tmp_path / "model.onnx", image_shape=(3, 32, 32))
    assert report.bytes < 4 * sum(p.numel() for n, p in loaded.model.named_parameters() if "aux" not in n) * 1.1 + 3e5


@pytest.mark.parametrize("strategy", [rc.AWT(), rc.Hydra(diagnose=True)])
def test_attacks_in_training_mode_see_the_logits_alone(strategy: rc.Strategy) -> None:
    session = make_session(network(), objective=PGDAT(steps=1, attack_mode="train"), epochs=0.5)
    strategy.run(session)
