"""A killed run goes on as if nothing had happened: whoever is in STRATEGIES is tested here by being there."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import robustcompress as rc
from robustcompress.checkpoint import Journal, files, journal, read, shrink
from robustcompress.distributed import ALONE
from robustcompress.robust.objectives import PGDAT
from robustcompress.session import Session
from robustcompress.shapes import uniform_widths
from robustcompress.strategies.base import Direction, prune_to
from tests.strategies.nets import QUICK_RECIPE, build, same, small_data, state

STRATEGIES = sorted(rc.STRATEGIES)
TIMES = {"images_per_s"}


def compress(net: str, strategy: str | rc.Strategy, **settings: Any) -> rc.CompressResult:
    defaults: dict[str, Any] = {
        "data": small_data(),
        "epochs": 6.0,
        "objective": PGDAT(steps=1),
        "recipe": QUICK_RECIPE,
        "attacks": (),
        "progress": False,
    }
    return rc.compress(build(net), strategy, **(defaults | settings))


def without_times(history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in json.loads(json.dumps(record)).items() if k not in TIMES} for record in history]


def assert_equal(resumed: rc.CompressResult, whole: rc.CompressResult) -> None:
    assert same(state(resumed.model), state(whole.model))
    assert without_times(resumed.history) == without_times(whole.history)
    assert resumed.edits == whole.edits
    assert dataclasses.replace(resumed.after, latency_ms=None) == dataclasses.replace(whole.after, latency_ms=None)


def until_finished(run: Callable[[], rc.CompressResult], stop: type[BaseException]) -> tuple[rc.CompressResult, int]:
    """Call again after every stop; return the result, and how often it was stopped."""
    for stops in range(40):
        try:
            return run(), stops
        except stop:
            continue
    raise AssertionError("the run gets nowhere")


def test_compiling_may_change_and_what_else_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustcompress.session.CompiledNetwork", lambda model: model)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    with pytest.raises(rc.OutOfTime):
        compress("residual", "uniform", **kept)
    with pytest.raises(rc.InputError, match=r'recipe: \{"lr": [0-9.]+\} there, \{"lr": 0.01\} here'):
        compress("residual", "uniform", **kept, recipe=dataclasses.replace(QUICK_RECIPE, lr=0.01))
    with pytest.raises(rc.OutOfTime, match="after 6 of"):
        compress("residual", "uniform", **kept, recipe=dataclasses.replace(QUICK_RECIPE, compile=True))


class Killed(BaseException):
    """What no one catches."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_stopped_after_every_epoch_ends_as_one_that_was_not(strategy: str, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    whole = compress("imported", strategy, epochs=4.0)  # dropout: torch's global generator counts too
    kept: dict[str, Any] = {"checkpoint": directory, "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = until_finished(lambda: compress("imported", strategy, epochs=4.0, **kept), rc.OutOfTime)
    assert stops >= 3
    assert_equal(resumed, whole)
    assert not directory.exists(), "a finished run leaves no checkpoint"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_killed_within_epochs_and_between_phases_ends_as_one_that_was_not(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress("residual", strategy)
    record, recalibrate, step_done = Session.record, Session.recalibrate, Journal.step_done
    epochs, between, steps = [0], ["event", "recalibrate"], [0]

    def dying(self: Session, entry: dict[str, Any]) -> None:
        record(self, entry)
        if self._journal is not None and self._journal.replaying:
            return
        epochs[0] += "epoch" in entry
        if epochs[0] == 3 or ("event" in entry and "event" in between):  # before this epoch's checkpoint
            between[:] = [place for place in between if place not in entry]
            raise Killed

    def dying_between(self: Session, *, batches: int = 20) -> None:
        recalibrate(self, batches=batches)
        if "recalibrate" in between:
            between.remove("recalibrate")
            raise Killed

    def dying_within(self: Journal, *args: Any) -> None:
        steps[0] += 1
        if steps[0] == 3:  # before it is written
            raise Killed
        step_done(self, *args)
        if steps[0] in (2, 7):
            raise Killed

    def run() -> rc.CompressResult:
        epochs[0] = 0
        return compress("residual", strategy, checkpoint=tmp_path / "checkpoint", checkpoint_every_s=0)

    monkeypatch.setattr(Journal, "step_done", dying_within)
    monkeypatch.setattr(Session, "record", dying)
    monkeypatch.setattr(Session, "recalibrate", dying_between)
    resumed, stops = until_finished(run, Killed)
    assert stops >= 3
    assert_equal(resumed, whole)


def test_a_search_over_types_goes_on_bit_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = rc.build_model("wrn_16_4", num_classes=10, width=0.125)[0]
    few: dict[str, Any] = {"evaluations": 6, "batch": 2, "finalists": 2, "recovery_steps": 1}
    strategy = rc.RCNAS(**few, blocks=("plain", "se", "rir"), searcher="random", alpha=1.0)

    def run(**kept: Any) -> rc.CompressResult:
        settings: dict[str, Any] = {"data": small_data(), "objective": PGDAT(steps=1), "recipe": QUICK_RECIPE}
        return rc.compress(copy.deepcopy(model), strategy, **settings, epochs=2.0, attacks=(), progress=False, **kept)

    whole = run()
    kept: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = until_finished(lambda: run(**kept), rc.OutOfTime)
    assert stops >= 3 and any("inserted" in record for record in whole.history)
    assert_equal(resumed, whole)


def test_parts_go_on_training_from_a_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "widths": {"layers.0.0.bn2.se.squeeze": 5},
        "inserted": [["layers.0.0", "se"], ["layers.2.0", "rir"]],
    }
    torch.manual_seed(0)
    model = rc.build_model("resnet8", num_classes=10, stem_stride=4, width=0.5)[0]

    def run(**kept: Any) -> rc.CompressResult:
        common: dict[str, Any] = {
            "data": small_data(),
            "objective": PGDAT(steps=1),
            "recipe": QUICK_RECIPE,
            "round_to": 1,
        }
        return rc.compress(
            copy.deepcopy(model), rc.Fixed(**settings), **common, epochs=3.0, attacks=(), progress=False, **kept
        )

    whole = run()
    kept: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = until_finished(lambda: run(**kept), rc.OutOfTime)
    assert stops >= 2 and whole.model.get_submodule("layers.0.0.bn2.se.squeeze").out_channels == 5
    assert_equal(resumed, whole)


@pytest.mark.parametrize(
    "recipe",
    [
        rc.Recipe(batch_size=32, val_images=20, optimizer="adamw", lr=0.01, clip_norm=1.0),
        rc.Recipe(batch_size=32, val_images=20, optimizer="lamb", lr=0.01, warmup=0.3),
        rc.Recipe(batch_size=32, val_images=0, ema=0.0),
        rc.Recipe(batch_size=32, val_images=20, momentum=0.0),
    ],
    ids=["adamw", "lamb", "without-average-and-selection", "without-momentum"],
)
def test_every_kind_of_optimizer_goes_on(recipe: rc.Recipe, tmp_path: Path) -> None:
    strategy = rc.Grape(events=2, order="random", init="clone")
    whole = compress("joined", strategy, recipe=recipe, epochs=3.0)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "checkpoint", "deadline": 0}
    resumed, stops = until_finished(
        lambda: compress("joined", strategy, recipe=recipe, epochs=3.0, **kept), rc.OutOfTime
    )
    assert stops >= 2
    assert_equal(resumed, whole)


def stopped(directory: Path, strategy: str | rc.Strategy = "magnitude", **settings: Any) -> None:
    with pytest.raises(rc.OutOfTime, match="the same call with checkpoint="):
        compress("chain", strategy, checkpoint=directory, deadline=0, **settings)


def test_every_difference_from_the_run_in_the_checkpoint_is_named_at_once(tmp_path: Path) -> None:
    stopped(tmp_path / "c")
    with pytest.raises(rc.InputError) as caught:
        compress("chain", "magnitude", checkpoint=tmp_path / "c", seed=1, budget=0.4, recipe=rc.Recipe(lr=0.05))
    said = str(caught.value)
    assert "is of another run" in said and f"remove {tmp_path / 'c'} to begin anew" in said
    for name in ("seed: 0 there, 1 here", 'budget: {"macs": 0.5} there, {"macs": 0.4} here', "recipe: {"):
        assert name in said, said
    assert "threat" not in said and "model structure" not in said
    with pytest.raises(rc.InputError, match="initial weights"):
        rc.compress(build("chain", seed=1), "magnitude", data=small_data(), checkpoint=tmp_path / "c", progress=False)
    with pytest.raises(rc.InputError, match="model structure"):
        compress("joined", "magnitude", checkpoint=tmp_path / "c")


def test_what_only_the_report_depends_on_may_change(tmp_path: Path) -> None:
    stopped(tmp_path / "c", "none", epochs=2.0)
    result = compress(
        "chain", "none", epochs=2.0, checkpoint=tmp_path / "c", attacks=("clean",), test_images=10, out=tmp_path / "out"
    )
    assert result.report is not None and (tmp_path / "out").is_dir() and not (tmp_path / "c").exists()


def test_the_person_who_waits_is_told_what_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stopped(tmp_path / "c", "hydra")
    index = json.loads((tmp_path / "c" / files.INDEX).read_text())
    index["record"]["versions"]["torch"] = "1.0"
    del index["sha256"]
    (tmp_path / "c" / files.INDEX).write_text(files._sealed(index))
    compress("chain", "hydra", checkpoint=tmp_path / "c", progress=True)
    said = capfd.readouterr().err
    assert "going on with the run in" in said
    assert "phase 'pretrain', 3 of 8 steps done" in said
    assert "written with torch 1.0" in said
    assert said.count("search changed") == 1


def test_a_deadline_needs_a_checkpoint_and_every_call_trains_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(rc.InputError, match="deadline=5 without a checkpoint"):
        compress("chain", "none", deadline=5)
    bad: dict[str, Any] = {"checkpoint": 3, "checkpoint_every_s": -1, "deadline": "soon"}
    with pytest.raises(rc.InputError) as caught:
        compress("chain", "none", **bad)
    assert all(f"{name}={value!r}: " in str(caught.value) for name, value in bad.items())
    stopped(tmp_path / "c", "none")
    done = [read(tmp_path / "c")]
    stopped(tmp_path / "c", "none")
    done.append(read(tmp_path / "c"))
    assert [found.record["phase"]["done"] for found in done if found is not None] == [3, 6]
    generous = compress("chain", "none", checkpoint=tmp_path / "c", deadline=1e6)
    assert generous.history[-1]["steps"] == 18


def test_checkpoints_are_written_when_they_are_due_and_not_without_being_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, int]] = []

    def note(directory: Path, record: Mapping[str, Any], tensors: Any) -> None:
        written.append((record["phase"]["name"], record["phase"]["done"]))

    monkeypatch.setattr(journal, "write", note)
    compress("chain", "magnitude")
    assert written == []
    compress("chain", "magnitude", checkpoint=tmp_path / "c", checkpoint_every_s=1000)
    assert written == [("pretrain", 9), ("finetune", 9)], "at the ends of phases"
    written.clear()
    compress("chain", "magnitude", checkpoint=tmp_path / "c", checkpoint_every_s=0)
    assert written == [(phase, steps) for phase in ("pretrain", "finetune") for steps in range(1, 10)]


def test_a_run_goes_on_approximately_from_a_small_copy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = compress("residual", "none")
    with pytest.raises(rc.OutOfTime):
        compress("residual", "none", checkpoint=tmp_path / "c", deadline=0)
    assert shrink(tmp_path / "c", tmp_path / "small") == tmp_path / "small"
    resumed = compress("residual", "none", checkpoint=tmp_path / "small", progress=True)
    assert "goes on approximately" in capfd.readouterr().err
    assert not same(state(resumed.model), state(whole.model))
    assert without_times(resumed.history)[0] == without_times(whole.history)[0]
    assert resumed.history[1]["loss"] == pytest.approx(whole.history[1]["loss"], abs=0.05)
    assert len(resumed.history) == len(whole.history)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Careless(rc.Strategy):
    """Cuts by weights without saying so to the session."""

    name: ClassVar[str] = "careless"
    direction: ClassVar[Direction] = "prune"

    def run(self, session: Session) -> None:
        session.train("first", share=0.5)
        session.editor.prune("conv2", session.model.get_buffer("bn2.running_mean").topk(4).indices)
        session.train("second", share=0.5)


def test_a_strategy_that_decides_behind_the_sessions_back_is_found_out(tmp_path: Path) -> None:
    for _ in range(4):
        with pytest.raises(rc.OutOfTime):
            compress("chain", Careless(), checkpoint=tmp_path / "c", deadline=0)
    with pytest.raises(rc.CheckpointError, match=r"through session\.decide"):
        compress("chain", Careless(), checkpoint=tmp_path / "c")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Teaching(rc.Strategy):
    """Keeps a network of its own, draws, and decides on more than channels."""

    name: ClassVar[str] = "teaching"
    direction: ClassVar[Direction] = "prune"
    seen: ClassVar[list[Any]] = []

    def run(self, session: Session) -> None:
        session.train("first", share=0.4)
        teacher = torch.nn.Linear(2, 2)
        session.keep("teacher", teacher)
        torch.nn.init.constant_(teacher.weight, float(session.model.get_parameter("fc.weight").detach()[0, 0]))
        drawn = session.decide("draws", lambda: torch.rand(3, generator=session.generator))
        later = torch.rand(3, generator=session.generator)
        session.train("second", share=0.3)
        session.forget("teacher")
        self.seen.append((drawn, later, teacher.weight.detach().clone()))
        prune_to(session, uniform_widths(session), {n: torch.rand(w) for n, w in session.editor.widths.items()})
        session.train("third", share=0.3)


def test_what_a_strategy_keeps_and_draws_comes_back(tmp_path: Path) -> None:
    Teaching.seen.clear()
    whole = compress("chain", Teaching())
    resumed, _ = until_finished(
        lambda: compress("chain", Teaching(), checkpoint=tmp_path / "c", deadline=0), rc.OutOfTime
    )
    assert_equal(resumed, whole)
    first, *others = Teaching.seen
    drawn_alike = [torch.equal(first[0], other[0]) and torch.equal(first[1], other[1]) for other in others]
    assert len(others) >= 2 and all(drawn_alike)
    assert any(torch.equal(first[2], other[2]) for other in others)


def test_decisions_are_plain() -> None:
    session = Session.__new__(Session)
    session._journal, session.world = None, ALONE
    assert session.decide("d", lambda: {"a": (1, 2.5)}) == {"a": [1, 2.5]}
    tensor = torch.tensor([1 / 3, 2.0], dtype=torch.float32)
    assert torch.equal(session.decide("d", lambda: [tensor])[0], tensor)
    with pytest.raises(rc.InputError, match="decision 'd' holds what JSON cannot"):
        session.decide("d", lambda: {"a": object()})
