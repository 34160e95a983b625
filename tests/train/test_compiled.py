"""Compiled passes: the same numbers, no gradients of weights in attacks, and edits in between."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.robust import PGDAT, ThreatModel, pgd
from robustcompress.robust.attacks import eval_mode
from robustcompress.train import CompiledNetwork
from robustcompress.train import compiled as module
from tests.strategies.nets import QUICK_RECIPE, build, small_data

# The compiler's own backends warn about each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")
FAST = "aot_eager"
"""The whole compiler but its code generation, which takes a minute."""


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return rc.build_model("resnet8", width=0.25, stem_stride=4)[0]


def test_a_step_is_that_of_the_network(network: nn.Module) -> None:
    plain, x, y = copy.deepcopy(network), torch.rand(4, 3, 32, 32), torch.arange(4)
    compiled, threat = CompiledNetwork(network, backend=FAST), ThreatModel("linf", 0.1)
    for model in (plain, compiled):
        model.train()
        step = PGDAT(steps=2).loss(model, x, y, threat, generator=torch.Generator().manual_seed(1))
        step.loss.backward()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(network.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [name for name, _ in compiled.named_parameters()] == [f"network.{n}" for n, _ in plain.named_parameters()]


def test_attacks_compute_no_gradients_of_weights(network: nn.Module) -> None:
    compiled, seen = CompiledNetwork(network, backend=FAST), []
    frozen = network.get_parameter("fc.weight")
    frozen.requires_grad_(False)
    network.register_forward_pre_hook(lambda *_: seen.append(any(p.requires_grad for p in network.parameters())))
    with eval_mode(compiled):
        pgd(compiled, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), ThreatModel("linf", 0.1), steps=1)
    assert all(p.grad is None for p in network.parameters())
    assert not frozen.requires_grad and sum(not p.requires_grad for p in network.parameters()) == 1
    assert seen and not any(seen)


@pytest.mark.parametrize(
    "strategy", [rc.Grape(events=1), pytest.param(rc.S2AP(), marks=pytest.mark.slow)], ids=["grape", "s2ap"]
)
def test_strategies_run_compiled(strategy: rc.Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def compile_fast(model: nn.Module) -> CompiledNetwork:
        made.append(model)
        return CompiledNetwork(model, backend=FAST)

    monkeypatch.setattr("robustcompress.session.CompiledNetwork", compile_fast)
    assert module.CompiledNetwork is CompiledNetwork
    settings = {"data": small_data(), "epochs": 2.0, "objective": PGDAT(steps=1), "attacks": (), "progress": False}
    result = rc.compress(build("residual"), strategy, recipe=replace(QUICK_RECIPE, compile=True), **settings)
    assert result.meets_budget and len(made) == 2
    assert type(result.model) is type(build("residual"))


def test_a_network_is_compiled_once_for_attacks_and_once_for_training_and_anew_after_an_edit(
    network: nn.Module,
) -> None:
    counters = torch._dynamo.utils.counters
    x, y, threat = torch.rand(4, 3, 32, 32), torch.arange(4), ThreatModel("linf", 0.1)
    editor = rc.StructuralEditor(network, x)
    group = next(name for name, found in editor.groups.items() if found.width > 4)

    def graphs(compiled: CompiledNetwork, steps: int) -> int:
        before = counters["stats"]["unique_graphs"]
        for number in range(steps):
            compiled.train()
            step = PGDAT(steps=3).loss(compiled, x, y, threat, generator=torch.Generator().manual_seed(number))
            step.loss.backward()
        return counters["stats"]["unique_graphs"] - before

    for _ in range(2):
        compiled = CompiledNetwork(network, backend="eager")
        assert graphs(compiled, 2) == 2, "one in eval mode, one in train mode"
        assert graphs(compiled, 3) == 0, "later steps find what is there"
        editor.prune(group, list(range(editor.groups[group].width - 1)))
