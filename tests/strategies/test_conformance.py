"""One suite for every strategy: whoever is in STRATEGIES is tested here by being there."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import robustcompress as rc
from robustcompress.robust.objectives import PGDAT
from robustcompress.strategies import make_strategy
from robustcompress.strategies.base import Direction
from tests.strategies.nets import NETS, QUICK_RECIPE, SIZE, build, same, small_data, state

STRATEGIES = sorted(rc.STRATEGIES)
SHRINKING = [name for name in STRATEGIES if rc.STRATEGIES[name].direction != "none"]
EVERYWHERE = [
    pytest.param(s, n, marks=pytest.mark.xdist_group(f"conformance-{s}-{n}")) for s in STRATEGIES for n in NETS
]
everywhere = pytest.mark.parametrize(("strategy", "net"), EVERYWHERE)


FEWER: dict[str, dict[str, Any]] = {"rcnas": {"evaluations": 10, "finalists": 2, "recovery_steps": 2}}
"""Where a strategy's defaults would take most of this suite's time: the same in all else."""


def compress(model: nn.Module | str, strategy: str | rc.Strategy, **settings: Any) -> rc.CompressResult:
    defaults: dict[str, Any] = {
        "data": small_data(),
        "epochs": 1.0,
        "objective": PGDAT(steps=1),
        "recipe": QUICK_RECIPE,
        "attacks": ("clean", "fgsm"),
        "test_images": 20,
        "progress": False,
    }
    if isinstance(strategy, str):
        strategy = make_strategy(strategy, **FEWER.get(strategy, {}))
    return rc.compress(model, strategy, **(defaults | settings))


@functools.cache
def outcome(strategy: str, net: str) -> rc.CompressResult:
    return compress(build(net), strategy)


def images() -> torch.Tensor:
    return small_data().test.as_float()


def thop_macs(model: nn.Module) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about distutils, on its first import
        import thop
    twin = copy.deepcopy(model).eval()
    return float(thop.profile(twin, inputs=(torch.zeros(1, 3, SIZE, SIZE),), verbose=False)[0])


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@everywhere
def test_the_budget_is_met_by_thops_own_count(strategy: str, net: str) -> None:
    result, reference = outcome(strategy, net), build(net, num_classes=10)
    assert thop_macs(reference) == result.before.macs
    assert params(reference) == result.before.params
    assert thop_macs(result.model) == result.after.macs
    assert params(result.model) == result.after.params
    assert result.meets_budget
    if strategy in SHRINKING:
        assert thop_macs(result.model) <= 0.5 * thop_macs(reference)
        assert thop_macs(result.model) >= 0.35 * thop_macs(reference), "most of the budget lies idle"
    else:
        assert result.edits == () or net == "imported"
        assert thop_macs(result.model) == thop_macs(reference)


@everywhere
def test_the_result_is_a_plain_module(strategy: str, net: str) -> None:
    model = outcome(strategy, net).model
    assert type(model) is NETS[net]
    for name, module in model.named_modules():
        assert not module.training, name
        assert not parametrize.is_parametrized(module), name
        hooks = [key for key in vars(module) if key.endswith(("_hooks", "_pre_hooks")) and vars(module)[key]]
        assert not hooks, (name, hooks)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None and parameter.is_contiguous(), name
        assert parameter.device.type == "cpu" and bool(parameter.isfinite().all()), name
    assert model(images()).shape == (40, 10)
    assert {"total_ops", "total_params"}.isdisjoint(name for name, _ in model.named_buffers(recurse=True))


@everywhere
def test_replaying_the_edits_on_a_fresh_reference_gives_equal_logits(strategy: str, net: str) -> None:
    result, fresh = outcome(strategy, net), build(net, seed=5)
    rc.StructuralEditor.replay(fresh, torch.zeros(2, 3, SIZE, SIZE), result.edits)
    fresh.load_state_dict(result.model.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(images()), result.model(images()))


@everywhere
def test_saving_and_loading_changes_no_bit(strategy: str, net: str, tmp_path: Path) -> None:
    result = outcome(strategy, net)
    result.save(tmp_path / "out")
    again = rc.load(tmp_path / "out", model=NETS[net])
    assert same(state(again.model), state(result.model))
    assert torch.equal(again.model(images()), result.model(images()))
    assert again.to_json() == json.loads(json.dumps(result.to_json()))
    assert [dict(r) for r in again.history] == json.loads(json.dumps(result.history))
    assert str(again) == str(result)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@everywhere
def test_the_history_names_phases_and_holds_finite_numbers(strategy: str, net: str) -> None:
    history = outcome(strategy, net).history
    assert history
    for record in history:
        assert isinstance(record["phase"], str) and record["phase"]
        assert all(math.isfinite(n) for n in numbers(record)), record
    trained = [record for record in history if "epoch" in record]
    assert trained, "no phase trained"
    for record in trained:
        assert {"steps", "lr", "loss", "macs", "params"} <= record.keys()
        assert "robust" in record or "kernel_distance" in record, "only a search on clean images says nothing of it"
    assert trained[-1]["macs"] == outcome(strategy, net).after.macs
    assert trained[-1]["params"] == outcome(strategy, net).after.params
    assert json.loads(json.dumps(history)) is not None


@everywhere
def test_the_report_is_that_of_the_returned_weights(strategy: str, net: str) -> None:
    result = outcome(strategy, net)
    assert result.report is not None
    again = rc.evaluate(result.model, small_data().test, result.threat, attacks=("clean", "fgsm"), max_images=20)
    assert torch.equal(again.attacks[0].correct, result.report.attacks[0].correct)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_callers_model_is_never_touched(strategy: str) -> None:
    model = build("residual").train()
    model.bn2.eval()
    model.bn0.weight.requires_grad_(False)
    model.fc.weight.grad = torch.full_like(model.fc.weight, 3.0)
    before, identities = state(model), [id(p) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    compress(model, strategy)
    assert same(state(model), before)
    assert [id(p) for p in model.parameters()] == identities
    assert [module.training for module in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["bn0.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert torch.equal(model.fc.weight.grad, torch.full_like(model.fc.weight, 3.0))
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("net", ["residual", "imported"])
def test_one_seed_gives_one_result_and_another_seed_another(strategy: str, net: str) -> None:
    torch.manual_seed(99)  # what the caller's generator happens to hold must not matter
    again = compress(build(net), strategy)
    assert again.edits == outcome(strategy, net).edits
    assert same(state(again.model), state(outcome(strategy, net).model))
    other = compress(build(net), strategy, seed=1)
    assert not same(state(other.model), state(again.model))


@pytest.mark.parametrize("strategy", ["magnitude"])
def test_one_seed_gives_one_result_also_where_the_model_is_built_here(strategy: str) -> None:
    torch.manual_seed(1)
    first = compress("tests.strategies.nets:Chain", strategy)
    torch.manual_seed(2)
    second = compress("tests.strategies.nets:Chain", strategy)
    assert same(state(first.model), state(second.model))


@pytest.mark.parametrize("strategy", SHRINKING)
@pytest.mark.parametrize(
    "budget",
    [
        rc.Budget(params=0.6),
        rc.Budget(macs=0.7, params=0.4),
        rc.Budget(macs=0.4, params=0.9),
        rc.Budget(max_macs=100_000, max_params=4_000),
    ],
    ids=str,
)
def test_every_kind_of_budget_is_kept(strategy: str, budget: rc.Budget) -> None:
    reference = build("residual")
    result = compress(reference, strategy, budget=budget, epochs=0.2, attacks=())
    macs, weights = budget.limits(rc.measure(reference, torch.zeros(1, 3, SIZE, SIZE)))
    assert thop_macs(result.model) <= macs and params(result.model) <= weights
    assert result.meets_budget and result.report is None
    assert max(thop_macs(result.model) / macs, params(result.model) / weights) > 0.85, "the budget lies idle"


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if rc.STRATEGIES[s].direction == "prune"])
def test_a_pretrained_model_is_not_pretrained_again(strategy: str) -> None:
    options = make_strategy(strategy).to_json()
    options |= options.get("host", {})
    from_scratch = "pretrain" not in options
    pretrains = any(r["phase"] == "pretrain" for r in outcome(strategy, "residual").history)
    assert pretrains == bool(options.get("pretrain")), "at 0 the network is cut at its initialisation"
    history = compress(build("residual"), strategy, pretrained=True, epochs=4.0).history
    assert not any(r["phase"] == "pretrain" for r in history)
    assert any(r.get("event") == ("plant" if from_scratch else "prune") for r in history)
    steps = {r["phase"]: r["steps"] for r in history if "steps" in r}  # counted within a phase: the last is its length
    assert sum(steps.values()) == 12, "the epochs that pretraining would have had go to the other phases"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_is_printed_when_progress_is_off(strategy: str, capfd: pytest.CaptureFixture[str]) -> None:
    compress(build("imported"), strategy, epochs=0.2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_progress_tells_of_every_phase(strategy: str, capfd: pytest.CaptureFixture[str]) -> None:
    result = compress(build("imported"), strategy, epochs=0.2, progress=True)
    out, err = capfd.readouterr()
    assert out == "", "standard output belongs to the caller"
    for record in result.history:
        if "steps" in record:
            assert f"{strategy}: {record['phase']}" in err
    assert "1000 outputs" in err and "10 classes" in err


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_options_survive_json(strategy: str) -> None:
    made = make_strategy(strategy)
    record = json.loads(json.dumps(made.to_json()))
    assert record.pop("name") == strategy
    assert make_strategy(strategy, **record) == made
    assert set(record) == {field.name for field in dataclasses.fields(made)}  # type: ignore[arg-type]


def test_changed_options_survive_json() -> None:
    grown = rc.Grape(order="random", events=2, cap=1.2)
    pruned = (rc.Hydra(search=0.2), rc.Magnitude(pretrain=0.1), rc.RandomChannels(pretrain=0.2))
    for made in (grown, *pruned, rc.Scaling(last=0.3, cap=2.0), rc.Fixed(widths={"stem": 4})):
        record = json.loads(json.dumps(made.to_json()))
        assert make_strategy(record.pop("name"), **record) == made


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Halve(rc.Strategy):
    """Keeps the first half of every group."""

    name: ClassVar[str] = "halve"
    direction: ClassVar[Direction] = "prune"
    epochs: float = 0.5

    def run(self, session: Any) -> None:
        for group in session.editor.editable:
            session.editor.prune(group.name, range(group.width // 2))
        session.train("only", share=self.epochs)


@pytest.fixture
def registry() -> Iterator[dict[str, type[rc.Strategy]]]:
    kept = dict(rc.STRATEGIES)
    yield rc.STRATEGIES
    rc.STRATEGIES.clear()
    rc.STRATEGIES.update(kept)


def test_a_strategy_of_someone_else_works_by_name(registry: dict[str, type[rc.Strategy]], tmp_path: Path) -> None:
    with pytest.raises(rc.InputError, match="'halve' does not exist"):
        compress(build("residual"), "halve")
    assert rc.register_strategy(Halve) is Halve
    assert rc.register_strategy(Halve) is Halve, "registering twice is harmless"
    result = compress(build("residual"), "halve")
    assert result.strategy == {"name": "halve", "epochs": 0.5}
    assert result.model.conv1.out_channels == 8
    result.save(tmp_path / "out")
    assert rc.load(tmp_path / "out", model=NETS["residual"]).strategy["name"] == "halve"
    with pytest.raises(rc.InputError, match="exists already"):
        rc.register_strategy(type("Other", (Halve,), {"name": "halve"}))
    with pytest.raises(rc.InputError, match="'epoch' does not exist; did you mean 'epochs'"):
        make_strategy("halve", epoch=1)


def test_a_strategy_that_misses_the_budget_is_found_out(registry: dict[str, type[rc.Strategy]]) -> None:
    class Idle(Halve):
        name = "idle"

        def run(self, session: Any) -> None:
            session.train("only", share=0.1)

    with pytest.raises(rc.BudgetError, match="idle ended at"):
        compress(build("residual"), Idle())


def test_narrow_strided_shortcuts_do_not_crash_the_process() -> None:
    """Weight gradients of 1x1 convolutions of stride 2 that read few channels, laid out channels_last on the CPU,
    write beyond their memory in some builds of torch: a crash that only another process survives.
    """
    code = """
import torch
torch.set_num_threads(1)
from robustcompress.models import resnet8
from tests.strategies.test_conformance import compress
for strategy in ("none", "magnitude", "grape"):
    compress(resnet8(width=0.25), strategy, epochs=3.0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-500:]}"
