"""Single weights: whoever has the option `granularity` is tested here by having it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper
from torch import nn

import robustcompress as rc
from robustcompress.robust.objectives import PGDAT
from robustcompress.strategies import make_strategy
from robustcompress.structure.weights import count_weights, maskable_weights
from tests.strategies.nets import NETS, QUICK_RECIPE, build, make_session, same, small_data, state
from tests.strategies.test_resume import assert_equal, until_finished

GRANULAR = sorted(
    name for name, kind in rc.STRATEGIES.items() if "granularity" in {field.name for field in dataclasses.fields(kind)}
)
HOSTS = sorted(name for name, kind in rc.STRATEGIES.items() if issubclass(kind, rc.strategies.ScoreBased))
TENTH = rc.Budget(density=0.1)


def strategy(name: str, **options: Any) -> rc.Strategy:
    if name.startswith("s2ap over "):
        host = {"name": name.removeprefix("s2ap over "), "granularity": "weight", "search": 0.4}
        return rc.S2AP(host=host, **options)
    return make_strategy(name, granularity="weight", **({"search": 0.4} if name in HOSTS else {}) | options)


EVERY = [*GRANULAR, *(f"s2ap over {host}" for host in HOSTS)]


def compress(net: str, chosen: rc.Strategy, **settings: Any) -> rc.CompressResult:
    defaults: dict[str, Any] = {
        "data": small_data(),
        "budget": TENTH,
        "epochs": 4.0,
        "objective": PGDAT(steps=1),
        "recipe": QUICK_RECIPE,
        "attacks": (),
        "progress": False,
    }
    return rc.compress(build(net), chosen, **(defaults | settings))


def test_the_family_is_here() -> None:
    assert {"hydra", "harp", "magnitude", "taylor", "random"} <= set(GRANULAR) and {"hydra", "harp"} <= set(HOSTS)


@pytest.mark.parametrize("net", sorted(NETS))
@pytest.mark.parametrize("name", EVERY)
def test_zeros_survive_fine_tuning_saving_and_export(name: str, net: str, tmp_path: Path) -> None:
    result = compress(net, strategy(name))
    total, nonzero = count_weights(build(net, num_classes=10))[0], count_weights(result.model)[1]
    assert result.before.weights == total and result.after.nonzeros == nonzero
    assert nonzero <= 0.1 * total and nonzero >= 0.099 * total - 1, "met within 1 %"
    assert result.meets_budget and not dataclasses.replace(result, budget={"density": 0.05}).meets_budget
    assert result.edits == () or net == "imported"
    assert result.after.compressed is not None and result.before.compressed is not None
    assert result.after.compressed < 0.6 * result.before.compressed
    assert "weights not zero" in str(result) and "size, compressed" in str(result)
    cut = next(r for r in result.history if r.get("event") == "prune")
    assert cut["density"] == pytest.approx(nonzero / total, abs=2e-3)
    assert sum(cut["weights"].values()) >= nonzero and min(cut["weights"].values()) >= 1
    assert any(r.get("event") == "mask" for r in result.history)

    result.save(tmp_path / "out")
    again = rc.load(tmp_path / "out", model=NETS[net])
    assert same(state(again.model), state(result.model)) and str(again) == str(result)

    report = rc.export_onnx(result, tmp_path / "model.onnx")
    kernels = [
        array
        for array in map(numpy_helper.to_array, onnx.load(str(report.path)).graph.initializer)
        if array.ndim > 1 and array.size > 8
    ]
    zeros = sum(int((array == 0).sum()) for array in kernels)
    held = [w for name, w in maskable_weights(result.model).items() if not name.startswith("heads")]  # in evaluation
    assert zeros >= sum(int((weight == 0).sum()) for weight in held)
    assert (len(held) < len(cut["weights"])) == (net == "auxiliary")
    assert report.zeros == pytest.approx(zeros / sum(array.size for array in kernels), abs=0.02)
    assert report.compressed_bytes < 0.7 * report.bytes or total < 4000
    assert "zeros" in str(report)


@pytest.mark.parametrize("net", ["residual", "imported"])
def test_without_a_search_hydra_is_magnitude_bit_for_bit(net: str) -> None:
    for allocation in ("uniform", "global"):
        ours = compress(net, strategy("hydra", search=0.0, pretrain=0.5, allocation=allocation))
        theirs = compress(net, strategy("magnitude", pretrain=0.5, allocation=allocation))
        assert same(state(ours.model), state(theirs.model))


@pytest.mark.parametrize("granularity", ["channel", "weight"])
@pytest.mark.parametrize("host", HOSTS)
def test_s2ap_switched_off_is_its_host_bit_for_bit(host: str, granularity: str) -> None:
    chosen = make_strategy(host, granularity=granularity, search=0.5, **({} if host == "awt" else {"pretrain": 0.25}))
    budget = TENTH if granularity == "weight" else rc.Budget(macs=0.5)
    ends = [compress("residual", s, budget=budget) for s in (chosen, rc.S2AP(host=chosen, gamma=0.0, finetune_awp=0.0))]
    assert same(state(ends[0].model), state(ends[1].model))
    assert ends[0].edits == ends[1].edits


@pytest.mark.parametrize("host", HOSTS)
def test_s2ap_flips_the_wanted_share_of_single_weights(host: str) -> None:
    result = compress("residual", strategy(f"s2ap over {host}", flips=0.02, warmup=0.0), epochs=6.0)
    found = [r for r in result.history if r["phase"] == "search" and "gamma" in r]
    assert found
    for record in found:
        assert record["flips"] == pytest.approx(0.02, rel=0.6) and 0 < record["gamma"] < 1
        assert record["loss_before"] != record["loss_after"]
    assert all("awp" in r for r in result.history if r["phase"] == "finetune")


@pytest.mark.parametrize("name", EVERY)
def test_a_run_stopped_after_every_epoch_ends_as_one_that_was_not(name: str, tmp_path: Path) -> None:
    whole = compress("imported", strategy(name), epochs=5.0)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = until_finished(lambda: compress("imported", strategy(name), epochs=5.0, **kept), rc.OutOfTime)
    assert stops >= 3
    assert_equal(resumed, whole)


@pytest.mark.parametrize(
    "recipe",
    [
        rc.Recipe(batch_size=32, val_images=20, optimizer="adamw", lr=0.01, clip_norm=1.0),
        rc.Recipe(batch_size=32, val_images=0, ema=0.0, awp=0.01),
    ],
    ids=["adamw", "perturbed"],
)
@pytest.mark.parametrize("pretrained", [False, True])
def test_zeros_survive_every_kind_of_training(recipe: rc.Recipe, pretrained: bool) -> None:
    result = compress("joined", strategy("magnitude"), recipe=recipe, pretrained=pretrained)
    assert result.after.nonzeros is not None and result.after.nonzeros <= 0.1 * count_weights(build("joined"))[0]


def test_the_masks_of_a_search_are_where_the_weights_end() -> None:
    session = make_session(build("residual"), budget=TENTH, epochs=4.0)
    chosen = rc.Hydra(granularity="weight", search=0.5, pretrain=0.25, score_lr=0.3)
    chosen.run(session)
    session.settle()
    changed = next(r for r in session.history if r.get("event") == "scores")["changed"]
    hamming = [r["hamming"] for r in session.history if r["phase"] == "search" and "epoch" in r]
    assert 0 < changed <= sum(hamming) + 1e-9 and len(hamming) == 2, "a chain of changes is as long as its links"
    counts = next(r for r in session.history if r.get("event") == "prune")["weights"]
    for name, weight in maskable_weights(session.model).items():
        assert int(weight.count_nonzero()) <= counts[name]


@pytest.mark.parametrize(
    ("chosen", "budget", "said"),
    [
        (rc.Hydra(granularity="weight"), rc.Budget(macs=0.5), "leaves macs as they are: give Budget(density=0.1)"),
        (rc.Hydra(granularity="weight"), rc.Budget(macs=0.5, density=0.1), "leaves macs as they are"),
        (rc.Hydra(), TENTH, "density=0.1 counts single zeros, and hydra removes channels"),
        (rc.Grape(), TENTH, "density=0.1 counts single zeros, and grape removes channels"),
        (rc.S2AP(host={"name": "hydra", "granularity": "weight"}), rc.Budget(params=0.5), "leaves params as they are"),
    ],
    ids=str,
)
def test_a_budget_of_the_other_kind_is_refused(chosen: rc.Strategy, budget: rc.Budget, said: str) -> None:
    with pytest.raises(rc.InputError, match=said.replace("(", r"\(").replace(")", r"\)")):
        compress("chain", chosen, budget=budget)


def test_budgets_that_leave_too_few_weights_are_refused() -> None:
    with pytest.raises(rc.BudgetError, match=r"density=0\.0001 leaves 0 weights for 4 layers"):
        compress("chain", rc.Magnitude(granularity="weight"), budget=rc.Budget(density=0.0001))
    for density in (1.0, 2, -0.1, "half"):
        with pytest.raises(rc.InputError, match=f"density={density!r}: must be"):
            rc.Budget(density=density)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GRANULAR)
def test_bad_options_are_named_with_the_nearest(name: str) -> None:
    wrong: dict[str, Any] = {"granularity": "weights", "residual": "frozen"}
    with pytest.raises(rc.InputError) as caught:
        make_strategy(name, **wrong)
    assert "granularity='weights' does not exist; did you mean 'weight'" in str(caught.value)
    assert "residual='frozen' does not exist" in str(caught.value)
    assert json.loads(json.dumps(strategy(name).to_json()))["granularity"] == "weight"
    assert strategy(name).granularity == "weight"


def test_options_that_say_nothing_for_single_weights_are_refused() -> None:
    with pytest.raises(rc.InputError, match="residual='freeze'"):
        rc.Magnitude(granularity="weight", residual="freeze")
    with pytest.raises(rc.InputError, match="round_to=8 is for widths"):
        compress("chain", strategy("magnitude"), round_to=8)


def test_a_layer_that_forward_never_uses_is_no_reason_to_refuse_an_export(tmp_path: Path) -> None:
    class Spare(NETS["chain"]):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Linear(16, 4)

    result = rc.compress(
        Spare(), strategy("magnitude"), budget=TENTH, data=small_data(), epochs=1.0, attacks=(), progress=False
    )
    report = rc.export_onnx(result, tmp_path / "spare.onnx")
    assert 0.8 < report.zeros < 0.95 and report.parity
