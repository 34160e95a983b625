"""Objectives that train for certificates, in whole runs: in every phase, resumed, and with what climbs around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.robust import IBP, CrownIBP, Objective, Smoothing
from robustcompress.robust.bounds import Interval
from tests.strategies.nets import small_data
from tests.strategies.test_resume import assert_equal, compress, until_finished


@pytest.mark.parametrize(
    ("strategy", "objective"),
    [("hydra", Smoothing(sigma=0.5)), ("hydra", CrownIBP(warm_up=0.1, ramp=0.6)), ("grape", IBP())],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_run_stopped_after_every_epoch_ends_as_one_that_was_not(
    strategy: str, objective: Objective, tmp_path: Path
) -> None:
    whole = compress("residual", strategy, objective=objective, epochs=3.0)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = until_finished(
        lambda: compress("residual", strategy, objective=objective, epochs=3.0, **kept), rc.OutOfTime
    )
    assert stops >= 3
    assert_equal(resumed, whole)
    assert whole.meets_budget and whole.settings["objective"] == objective.to_json()


@pytest.mark.parametrize(
    "strategy",
    [
        rc.Harp(),
        rc.S2AP(host="hydra"),
        rc.Hydra(diagnose=True),
        rc.Taylor(),
    ],
    ids=lambda strategy: strategy.name,
)
def test_strategies_take_bounds(strategy: rc.Strategy) -> None:
    result = compress("residual", strategy, objective=IBP(ramp=0.2), epochs=3.0)
    assert result.meets_budget


def test_zeros_of_weights() -> None:
    budget = rc.Budget(density=0.3)
    result = compress("residual", rc.Hydra(granularity="weight"), objective=CrownIBP(), budget=budget, epochs=3.0)
    assert result.meets_budget


def test_the_ramp_runs_over_the_run_and_not_over_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    box = IBP.box

    def spy(self: IBP, x: torch.Tensor, threat: rc.ThreatModel, share: float = 1.0) -> Interval:
        seen.append(share)
        return box(self, x, threat, share)

    monkeypatch.setattr(IBP, "box", spy)
    data = small_data()
    result = compress("residual", "hydra", data=data, objective=IBP(warm_up=0.1, ramp=0.4), epochs=10.0)
    pretraining = [record["steps"] for record in result.history if record["phase"] == "pretrain" and "steps" in record]
    share = 0.45 * 10 / 10  # hydra's pretraining, of the run
    steps = pretraining[-1]
    expected = [min(1.0, max(0.0, (share * done / steps - 0.1) / 0.3)) for done in range(steps)]
    assert seen[:steps] == pytest.approx(expected)
    assert set(seen[steps:]) == {1.0}


def test_bounds_want_linf_before_anything_is_trained() -> None:
    with pytest.raises(rc.InputError, match="use norm='linf'"):
        compress("residual", "none", objective=IBP(), threat=rc.ThreatModel("l2", 0.5))


def test_compiled_passes_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: torch.nn.Module) -> torch.nn.Module:
        raise AssertionError("bounds cannot be compiled")

    monkeypatch.setattr("robustcompress.session.CompiledNetwork", refuse)
    recipe = rc.Recipe(batch_size=32, val_images=0, compile=True)
    compress("chain", "none", objective=IBP(), recipe=recipe, epochs=1.0)
