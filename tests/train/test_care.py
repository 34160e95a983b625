"""Steps that go wrong: left out or stopped at before the weights see them, and memory that runs out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress import Recipe
from robustcompress.checkpoint import Journal, read
from robustcompress.robust.memory import is_out_of_memory
from robustcompress.robust.objectives import PGDAT, FreeAT, Objective, ObjectiveStep
from robustcompress.train import Care, TrainingError
from robustcompress.train.care import IN_A_ROW, LEAST, RECOVERY
from tests.strategies.nets import build, same, small_data, state
from tests.train.test_loop import fit

SKIP = Recipe(nonfinite="skip")


class Bad(PGDAT):
    """NaN at some of its steps, which are counted over all instances."""

    seen: ClassVar[list[dict[str, torch.Tensor]]] = []
    bad: ClassVar[set[int]] = set()
    where: ClassVar[str] = "loss"

    def loss(self, model: nn.Module, *args: Any, **settings: Any) -> ObjectiveStep:
        step = super().loss(model, *args, **settings)
        self.seen.append(state(model))
        if len(self.seen) - 1 not in self.bad:
            return step
        if self.where == "gradient":  # of a loss that is finite
            poisoned = (step.loss - step.loss.detach()).abs().sqrt()
            return ObjectiveStep(step.loss.detach() + poisoned, step.logits, step.x_adv)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data.fill_(math.nan)
        return ObjectiveStep(step.loss * math.nan, step.logits, step.x_adv)


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> type[Bad]:
    monkeypatch.setattr(Bad, "seen", [])
    return Bad


def finite(model: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out(where: str, bad: type[Bad], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad, "bad", {2, 3})
    monkeypatch.setattr(bad, "where", where)
    model, lrs = build("residual"), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = optimizer.step

    def noted(*args: Any) -> None:
        lrs.append(optimizer.param_groups[0]["lr"])
        step(*args)

    monkeypatch.setattr(optimizer, "step", noted)
    history = fit(model, objective=bad(steps=1), recipe=SKIP, epochs=2.0, optimizer=optimizer)
    assert finite(model) and [record.get("left_out") for record in history] == [1, 1]
    weights = [{name: values for name, values in seen.items() if "num_batches" not in name} for seen in bad.seen]
    names = [name for name, _ in model.named_parameters()]
    assert all(torch.equal(weights[2][n], weights[3][n]) and torch.equal(weights[3][n], weights[4][n]) for n in names)
    assert not torch.equal(weights[4][names[0]], weights[5][names[0]])
    assert lrs == pytest.approx([0.05, 0.05, 0.0125, 0.0125 * RECOVERY])
    assert all(math.isfinite(record["loss"]) for record in history)


def test_too_many_in_a_row_are_given_up(bad: type[Bad], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad, "bad", set(range(1, 99)))
    model = build("residual")
    with pytest.raises(TrainingError, match=f"after {IN_A_ROW} steps in a row that were left out"):
        fit(model, objective=bad(steps=1), recipe=SKIP, epochs=9.0)
    assert finite(model) and len(bad.seen) == 1 + IN_A_ROW + 1


def test_the_learning_rate_falls_to_a_limit_and_comes_back() -> None:
    care, nan, one = Care(SKIP), torch.tensor(math.nan), torch.tensor(1.0)
    for _ in range(40):
        assert not care.accepts(nan, [], one, "x")
        assert care.accepts(one, [], one, "x")
    assert care.factor == pytest.approx(LEAST * RECOVERY)
    for _ in range(1000):
        care.accepts(one, [], one, "x")
    assert care.factor == 1.0
    other = Care(SKIP)
    other.load_state_dict(care.state_dict())
    assert other.state_dict() == care.state_dict() and care.read() == {"left_out": 40} and care.read() == {}


def compress(**settings: Any) -> rc.CompressResult:
    given: dict[str, Any] = {"data": small_data(), "epochs": 2.0, "attacks": (), "progress": False}
    given["recipe"] = Recipe(batch_size=32, val_images=0)
    return rc.compress(build("residual"), "none", **(given | settings))


def test_a_run_stops_with_its_last_good_state_and_goes_on_when_steps_may_be_left_out(
    tmp_path: Path, bad: type[Bad], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad, "bad", {4, 5})
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "objective": bad(steps=1)}
    with pytest.raises(TrainingError, match=r"phase 'train', step 5 of 6, .*: the loss is nan"):
        compress(**kept)
    found = read(tmp_path / "c")
    assert found is not None and found.record["phase"]["done"] == 4
    assert all(bool(t.isfinite().all()) for t in found.tensors.values() if t.is_floating_point())
    result = compress(**kept, recipe=Recipe(batch_size=32, val_images=0, nonfinite="skip"))
    assert finite(result.model) and result.history[-1]["left_out"] == 1


def test_a_checkpoint_never_holds_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step_done = Journal.step_done

    def poisoned(self: Journal, done: int, history: Any, state: Any) -> None:
        if done == 2:
            next(state.modules["average"].parameters()).data.fill_(math.inf)
        step_done(self, done, history, state)

    monkeypatch.setattr(Journal, "step_done", poisoned)
    with pytest.raises(TrainingError, match=r"weights are not finite in phase 'train' after 2 steps.*after 1 steps"):
        compress(checkpoint=tmp_path / "c", checkpoint_every_s=0)
    found = read(tmp_path / "c")
    assert found is not None and found.record["phase"]["done"] == 1


class Hungry(PGDAT):
    """Has memory for so many images and no more; draws, and moves statistics, before it finds out."""

    room: ClassVar[int] = 8
    device: ClassVar[bool] = True

    def loss(self, model: nn.Module, x: torch.Tensor, *args: Any, **settings: Any) -> ObjectiveStep:
        if len(x) > self.room:
            torch.rand(1, generator=settings["generator"])
            torch.rand(1)
            model(x)
            if self.device:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return super().loss(model, x, *args, **settings)


@pytest.mark.parametrize("device", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["gpu", "cpu"])
def test_where_memory_runs_out_it_goes_on_in_parts_as_if_it_had_begun_so(
    device: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Hungry, "device", device)
    plain = Recipe(batch_size=32, val_images=0)
    begun_so = compress(objective=PGDAT(steps=1), recipe=Recipe(batch_size=32, val_images=0, accumulate=4))
    hungry = compress(objective=Hungry(steps=1), recipe=plain, progress=True)
    assert same(state(hungry.model), state(begun_so.model))
    events = [record for record in hungry.history if record.get("event") == "out of memory"]
    assert [(event["steps"], event["accumulate"]) for event in events] == [(0, 2), (0, 4)]
    assert "passed in 4 parts from here on" in " ".join(capfd.readouterr().err.split())


def test_the_parts_come_back_with_a_checkpoint(tmp_path: Path) -> None:
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "objective": Hungry(steps=1)}
    with pytest.raises(rc.OutOfTime):
        compress(**kept, deadline=0)
    found = read(tmp_path / "c")
    assert found is not None and found.record["state"]["kept"]["care"]["parts"] == 4
    result = compress(**kept)
    assert sum(record.get("event") == "out of memory" for record in result.history) == 2


def test_one_image_that_is_too_much_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hungry, "room", 0)
    with pytest.raises(TrainingError, match=r"memory ran out on one image of phase 'train' \(CUDA out of memory"):
        fit(build("residual"), objective=Hungry(steps=1))


def test_an_objective_that_needs_the_whole_batch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Objective:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("robustcompress.robust.objectives.free.FreeEpoch.loss", full)
    with pytest.raises(TrainingError, match="a batch of 32, which this objective needs as a whole"):
        fit(build("residual"), objective=FreeAT(replays=2))


def test_errors_of_memory_are_told_from_others() -> None:
    cpu = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and is_out_of_memory(RuntimeError(cpu))
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(ValueError(cpu))
    assert not is_out_of_memory(RuntimeError("size mismatch"))


def test_other_errors_are_not_taken_for_it() -> None:
    def fails(*_: Any, **__: Any) -> ObjectiveStep:
        raise RuntimeError("size mismatch")

    objective = PGDAT(steps=1)
    with pytest.raises(RuntimeError, match="size mismatch"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PGDAT, "loss", fails)
        fit(build("residual"), objective=objective)


class Narrow(nn.Module):
    """Room for a few images at a time."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.inner, self.most, self.widest = build("residual").eval(), most, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.widest = max(self.widest, len(x))
        return self.inner(x)


def test_an_evaluation_goes_on_in_smaller_batches() -> None:
    model, data = Narrow(10).eval(), small_data().test
    report = rc.evaluate(model, data, attacks=("clean", "pgd-2"), batch_size=20, device="cpu")
    small = rc.evaluate(model, data, attacks=("clean", "pgd-2"), batch_size=10, device="cpu")
    assert torch.equal(report.result("pgd-2").correct, small.result("pgd-2").correct)
    assert "memory ran out: clean was judged in batches of 10 images" in report.warnings


@pytest.mark.parametrize(("limit", "chunk"), [(None, 20), (1000.0, 8)])
def test_autoattack_halves_the_chunk_that_it_really_takes(limit: float | None, chunk: int) -> None:
    """Its chunks may be smaller than a batch: to halve the batch alone would try the same chunk again."""
    config = rc.robust.AutoAttackConfig(apgd_iterations=1, fab_iterations=1, square_queries=1, chunk_size=chunk)
    model, data = Narrow(chunk // 2), small_data().test
    answers = model.inner(data.as_float()).argmax(1)
    options = {"attacks": ("autoattack",), "autoattack_config": config, "device": "cpu", "time_limit_s": limit}
    report = rc.evaluate(model, (data.pixels, answers), **options, batch_size=32)
    said = [line for line in report.warnings if "autoattack was judged" in line]
    assert said == [f"memory ran out: autoattack was judged in batches of {chunk // 2} images"]
    assert model.widest == chunk // 2
