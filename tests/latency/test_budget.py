"""A limit on latency, for every strategy; the clock is a fake except where it says otherwise."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress import calibration
from robustcompress.export.timing import Stopwatch
from robustcompress.latency import LatencyLimit, LatencyModel, Side, Term, Timing
from robustcompress.robust.objectives import PGDAT
from tests.latency.fake import Clockwork, clock
from tests.strategies.nets import EXAMPLE, QUICK_RECIPE, SIZE, build, same, small_data, state

SHRINKING = sorted(name for name, kind in rc.STRATEGIES.items() if kind.direction != "none")


@pytest.fixture(autouse=True)
def clockwork(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Clockwork]]:
    kind = type("Fresh", (Clockwork,), {"timed": 0})  # its own count: others may have used the class
    monkeypatch.setattr("robustcompress.api.Stopwatch", kind)
    monkeypatch.setattr(calibration, "_known", {})
    yield kind


FEW = {"rcnas": rc.RCNAS(evaluations=5, finalists=1, recovery_steps=2)}
"""Strategies whose price has nothing to do with latency, at a lower one."""


def compress(model: Any, strategy: str | rc.Strategy = "magnitude", **settings: Any) -> rc.CompressResult:
    if isinstance(strategy, str):
        strategy = FEW.get(strategy, strategy)
    defaults: dict[str, Any] = {
        "data": small_data(),
        "epochs": 0.4,
        "objective": PGDAT(steps=1),
        "recipe": QUICK_RECIPE,
        "attacks": (),
        "progress": False,
        "round_to": 1,
        "budget": rc.Budget(latency=0.5),
    }
    return rc.compress(model, strategy, **(defaults | settings))


@pytest.mark.parametrize("strategy", SHRINKING)
def test_every_strategy_meets_a_limit_on_latency(strategy: str) -> None:
    result = compress("resnet8", strategy, budget=rc.Budget(latency=0.4))
    assert result.before.onnx_ms is not None and result.after.onnx_ms is not None
    assert result.after.onnx_ms == pytest.approx(clock(result.model, (3, SIZE, SIZE)))
    assert 0.99 * 0.4 <= result.after.onnx_ms / result.before.onnx_ms <= 0.4
    assert result.meets_budget


@pytest.mark.parametrize("strategy", SHRINKING)
def test_where_the_predictor_errs_what_is_measured_counts(strategy: str, clockwork: type[Clockwork]) -> None:
    clockwork.jag = 0.03  # a network whose widths are no multiples of 4 is slower, which no product of widths can say
    result = compress("resnet8", strategy, budget=rc.Budget(latency=0.5))
    assert result.before.onnx_ms is not None and result.after.onnx_ms is not None
    assert 0.90 * 0.5 <= result.after.onnx_ms / result.before.onnx_ms <= 0.5


def test_other_limits_hold_beside_it_and_the_scarcest_decides() -> None:
    both = compress("resnet8", budget=rc.Budget(latency=0.6, params=0.1))
    assert both.after.params <= 0.1 * both.before.params
    assert both.after.onnx_ms is not None and both.before.onnx_ms is not None
    assert both.after.onnx_ms < 0.55 * both.before.onnx_ms and both.meets_budget
    absolute = compress("resnet8", budget=rc.Budget(max_latency_ms=0.3 * both.before.onnx_ms))
    assert absolute.after.onnx_ms is not None
    assert 0.297 <= absolute.after.onnx_ms / both.before.onnx_ms <= 0.3 and absolute.meets_budget


def test_a_process_measures_one_reference_once(clockwork: type[Clockwork]) -> None:
    first = compress("resnet8")
    before = clockwork.timed
    second = compress("resnet8")
    assert clockwork.timed - before <= 6 < calibration.NETWORKS <= before
    assert same(state(first.model), state(second.model))


@pytest.mark.parametrize("strategy", SHRINKING)
def test_a_resumed_run_takes_the_measurements_of_the_first_time(
    strategy: str, tmp_path: Path, clockwork: type[Clockwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    clockwork.jag = 0.02
    whole = compress(build("residual"), strategy, epochs=4.0)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0, "epochs": 4.0}
    stops = 0
    while True:
        try:
            resumed = compress(build("residual"), strategy, **kept)
            break
        except rc.OutOfTime:
            stops += 1
            assert stops < 20, "the run gets nowhere"
            monkeypatch.setattr(calibration, "_known", {})  # another process, on a machine that has changed
            clockwork.speed *= 2
    assert stops >= 2
    assert same(state(resumed.model), state(whole.model)) and resumed.edits == whole.edits
    assert resumed.before.onnx_ms == whole.before.onnx_ms


def test_a_limit_that_cannot_be_reached_says_what_can(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        rc.BudgetError, match=r"latency of .* ms cannot be reached: .* are left \(0\.\d+ of the reference"
    ):
        compress("resnet8", budget=rc.Budget(latency=0.001))
    with pytest.raises(rc.BudgetError, match=r"already meets latency <= 9e\+03 ms|already meets latency <= 9k ms"):
        compress("resnet8", budget=rc.Budget(max_latency_ms=9000))
    with pytest.raises(rc.BudgetError, match="already meets latency <= 1 x reference"):
        compress("resnet8", budget=rc.Budget(latency=1.0))
    with pytest.raises(rc.BudgetError, match=r"parameters cannot be reached"):
        compress("resnet8", budget=rc.Budget(latency=0.5, max_params=3))
    with pytest.raises(rc.InputError, match=r"latency=50 is a fraction .* use max_latency_ms, for 50 % write 0.5"):
        rc.Budget(latency=50)
    with pytest.raises(rc.InputError, match="max_latency_ms=-1: must be a positive number"):
        rc.Budget(max_latency_ms=-1)


def test_a_limit_that_frozen_residual_streams_cannot_meet_is_refused_before_any_training() -> None:
    limit = rc.Budget(latency=0.15)
    assert compress("resnet8", rc.Magnitude(), budget=limit).meets_budget
    with pytest.raises(rc.BudgetError, match=r"latency of .* ms cannot be reached"):
        compress("resnet8", rc.Magnitude(residual="freeze"), budget=limit)


def test_widths_that_are_given_and_too_slow_are_refused_before_training() -> None:
    editor = rc.StructuralEditor(build("residual"), EXAMPLE)
    widths = {group.name: group.width for group in editor.editable}
    with pytest.raises(rc.BudgetError, match=r"these widths take .* ms, over"):
        compress(build("residual"), rc.Fixed(widths=widths), budget=rc.Budget(latency=0.5))


def test_a_network_that_turns_out_slower_is_kept_and_it_is_said(
    clockwork: type[Clockwork], capfd: pytest.CaptureFixture[str]
) -> None:
    clockwork.late = 1.1
    result = compress("resnet8", progress=True)
    assert "warning: the network takes" in capfd.readouterr().err
    assert not result.meets_budget
    clockwork.late = 1.02
    assert compress("resnet8", progress=True).meets_budget
    said = capfd.readouterr().err
    assert "warning" not in said and "reachable:" in said and "measured, at most" in said


def test_the_report_says_both_times_and_survives_a_directory(tmp_path: Path) -> None:
    result = compress("resnet8")
    assert "latency (onnxruntime)" in str(result)
    again = rc.load(result.save(tmp_path / "r"))
    assert again.after == result.after and again.meets_budget and again.budget == {"latency": 0.5}
    record = json.loads((tmp_path / "r" / "result.json").read_text())
    for cost in ("before", "after"):
        del record[cost]["onnx_ms"]  # as it was written before this was measured
    (tmp_path / "r" / "result.json").write_text(json.dumps(record))
    assert rc.load(tmp_path / "r").after == dataclasses.replace(result.after, onnx_ms=None)
    assert "onnx_ms" not in compress("resnet8", budget=rc.Budget(macs=0.5)).after.to_json()
    record["after"]["onnx_ms"] = "fast"
    (tmp_path / "r" / "result.json").write_text(json.dumps(record))
    with pytest.raises(rc.ResultError, match="not a cost"):
        rc.load(tmp_path / "r")


def test_nothing_is_timed_where_no_limit_on_latency_applies(clockwork: type[Clockwork]) -> None:
    assert compress("resnet8", budget=rc.Budget(macs=0.5)).after.onnx_ms is None and clockwork.timed == 0
    result = compress("resnet8", "none")
    assert clockwork.timed == 0 and result.after.onnx_ms is None and result.meets_budget


def line(constant: float = 0.1, slope: float = 0.9) -> LatencyModel:
    """Time in proportion to one group of 1000 channels, and a constant."""
    return LatencyModel(
        reference_ms=1.0,
        narrowest_ms=constant,
        constant=constant,
        terms=(Term(slope, (Side((("a", 1),), 0, 1000),)),),
        widths={"a": 1000},
        held_out=0.0,
        networks=2,
    )


@pytest.mark.parametrize("error", [0.5, 0.8, 1.0, 1.3, 2.0])
@pytest.mark.parametrize("jag", [0.0, 0.05])
def test_widths_are_chosen_again_until_the_measurement_keeps_the_limit(error: float, jag: float) -> None:
    model, limit = line(), 0.4

    def measure(widths: Any) -> Timing:
        return Timing(error * model.predict(widths) * (1 + jag * (widths["a"] // 16 % 2)), 1.0)

    bound = LatencyLimit(model, limit, measure)
    widest = lambda: {"a": max([1, *(w for w in range(1, 1001) if bound.predict({"a": w}) <= limit)])}  # noqa: E731
    choice = bound.choose(widest)
    times = [measure({"a": width}).ms for width in range(1, 1001)]
    assert 0.97 * max(ms for ms in times if ms <= limit) <= choice.ms <= limit
    assert bound.factor == 1.0, "choosing alone changes nothing"
    widths = bound.settle("width", widest, decide=lambda _, compute: compute(), say=lambda _: None)
    assert widths == choice.widths and bound.measured == choice.ms
    assert bound.predict(widths) <= limit * (1 + 1e-12), "what was measured within the limit fits"


def test_between_two_steps_of_all_groups_single_groups_find_a_place() -> None:
    groups = [f"g{number}" for number in range(8)]
    sides = tuple(Term(0.9 / 8, (Side(((name, 1),), 0, 100),)) for name in groups)
    model = dataclasses.replace(line(), terms=sides, widths=dict.fromkeys(groups, 100))

    def measure(widths: Any) -> Timing:  # blocks of 50 channels
        return Timing(model.predict({name: 50 * -(-width // 50) for name, width in widths.items()}), 1.0)

    bound = LatencyLimit(model, 0.8, measure)

    def pick() -> dict[str, int]:
        best = max([1, *(w for w in range(1, 101) if bound.predict(dict.fromkeys(groups, w)) <= 0.8)])
        return dict.fromkeys(groups, best)

    assert measure(dict.fromkeys(groups, 50)).ms == pytest.approx(0.55)
    assert measure(dict.fromkeys(groups, 51)).ms == pytest.approx(1.0)
    assert bound.choose(pick).ms == pytest.approx(0.55 + 4 * 0.45 / 8), "four groups of eight are wide"
    poor = bound.choose(pick, lambda widths: sum(width > 50 for width in widths.values()) < 3)
    assert poor.ms == pytest.approx(0.55 + 2 * 0.45 / 8), "what else is limited is not to be exceeded on the way"


def test_where_nothing_keeps_the_limit_the_fastest_network_is_taken() -> None:
    bound = LatencyLimit(line(), 0.4, lambda widths: Timing(0.5 + widths["a"] / 1e6, 1.0))
    choice = bound.choose(lambda: {"a": 300 if bound.factor < 1.2 else 100})
    assert choice.widths == {"a": 100} and choice.ms > 0.4 and choice.rounds <= 10


def test_a_real_stopwatch_measures_something_and_the_narrow_network_is_the_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("robustcompress.api.Stopwatch", Stopwatch)
    editor = rc.StructuralEditor(rc.build_model("resnet8")[0], torch.zeros(2, 3, 32, 32))
    before = state(editor.model)
    stopwatch = Stopwatch(editor, (3, 32, 32))
    narrow = dict.fromkeys((group.name for group in editor.editable), 2)
    timing = stopwatch.time(stopwatch.resized(narrow), seconds=0.2)
    assert 0 < timing.ms < timing.reference_ms < math.inf and timing.ratio < 1
    assert same(state(editor.model), before) and editor.edits == ()


def test_the_command_line_and_recipes_take_a_limit_on_latency(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from robustcompress.cli import main

    small = ["resnet8", "--data", "digits", "--image-size", "16", "--train-limit", "64", "--test-limit", "10"]
    options = [*small, "--strategy", "uniform", "--epochs", "0.1", "--attack-steps", "1", "--attacks", "clean"]
    limits = ["--latency", "0.5", "--max-latency-ms", "1e3", "--out", str(tmp_path / "r"), "--json", "--quiet"]
    assert main(["compress", *options, *limits]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["budget"] == {"latency": 0.5, "max_latency_ms": 1e3} and document["meets_budget"]
    assert document["after"]["onnx_ms"] <= 0.5 * document["before"]["onnx_ms"]
    recipe = rc.RunRecipe.from_mapping({"model": "resnet8", "strategy": "uniform", "budget": {"latency": 0.5}})
    assert recipe.budget == rc.Budget(latency=0.5)
    assert rc.RunRecipe.from_mapping(recipe.to_json()) == recipe
    with pytest.raises(rc.InputError, match="'latensy' does not exist; did you mean 'latency'"):
        rc.RunRecipe.from_mapping({"model": "resnet8", "strategy": "uniform", "budget": {"latensy": 0.5}})
