"""The queue of full-size runs, in its smoke mode on the CPU: it stops in time, goes on, carries, and lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_queue
from benchmarks.gpu_speed import SHAPES, Speed, measure_peak
from benchmarks.grid import read_grid

ONLY = ["--grids", "gpu-short", "--only", "none_s0"]


def call(place: Path, *more: str) -> list[str]:
    return ["--quick", "--device", "cpu", "--out", str(place / "out"), "--state", str(place / "state"), *ONLY, *more]


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_a_queue_stopped_after_every_epoch_ends_as_one_that_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    with monkeypatch.context() as patched:
        # A cell is begun although the time is over, so that each call trains for one epoch.
        patched.setattr(gpu_queue.Queue, "_time_left", lambda self: not begun or begun.pop() != "over")
        for _ in range(12):
            assert gpu_queue.main(call(tmp_path / "a", "--minutes", "0", "--carry", str(tmp_path / "carry"))) == 0
            said = capsys.readouterr().err
            if "stopped in time" not in said:
                break
            if "trained" not in said and (tmp_path / "a/state/gpu-short/none_s0/checkpoint").exists():
                assert (tmp_path / "carry/gpu-short/none_s0/checkpoint").is_dir()
        else:
            raise AssertionError("the queue gets nowhere")
    assert gpu_queue.main(call(tmp_path / "b")) == 0
    said = capsys.readouterr().err
    assert "measured peak" in said and "images/s" in said and "% of the measured peak" in said
    stopped, whole = (read(tmp_path / place / "out/gpu-short/none_s0.json")["results"] for place in ("a", "b"))
    assert [h["loss"] for h in stopped["history"]] == [h["loss"] for h in whole["history"]]
    assert not list((tmp_path / "carry").glob("*/*/checkpoint")), "nothing is left to carry of a finished run"
    assert whole["report"]["attacks"][-1]["n"] == 16, "AutoAttack was extended to all images"
    assert gpu_queue.main(call(tmp_path / "b")) == 0
    assert "none_s0 ..." not in capsys.readouterr().err


def test_the_queue_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_queue.main([*call(tmp_path)[:-3], "gpu-short", "gpu-long", "--list"]) == 0
    said = capsys.readouterr().out
    assert "gpu-short none_s0: -" in said and "gpu-long: 0 of" in said


def test_no_gpu_is_said_before_anything_else(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_queue.main([]) == 2
    assert "there is no GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--state"):
        gpu_queue.main(["--quick"])


def test_carried_checkpoints_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carry, first = tmp_path / "carry", tmp_path / "first"
    monkeypatch.setattr(gpu_queue.Queue, "_time_left", lambda self: True)
    assert gpu_queue.main(call(first, "--minutes", "0", "--carry", str(carry))) == 0
    assert (carry / "gpu-short/none_s0/checkpoint/checkpoint.json").is_file()
    assert gpu_queue.main(call(tmp_path / "second", "--carry", str(carry))) == 0
    record = read(tmp_path / "second/out/gpu-short/none_s0.json")
    epochs = [entry["epoch"] for entry in record["results"]["history"] if "epoch" in entry]
    assert epochs == list(range(1, len(epochs) + 1)), "the epochs before are in the history"


def test_compiling_pays_in_long_runs_only() -> None:
    speed = Speed(peak=1e12, eager_s=0.10, compiled_s=0.08, compile_s=60.0, macs=1e9, batch=256)
    break_even = SHAPES * 60 / 0.02
    assert speed.compiling_pays(break_even + 1) and not speed.compiling_pays(break_even - 1)
    assert not Speed(peak=1e12, eager_s=0.1, compiled_s=None, compile_s=0.0, macs=1e9, batch=256).compiling_pays(1e9)
    assert "2560 images/s" in str(speed) and "compiled: 3200 images/s" in str(speed)


def test_the_peak_is_a_rate() -> None:
    assert 1e8 < measure_peak(torch.device("cpu"), quick=True) < 1e15


def test_retrained_arms_use_the_budget_of_their_parent() -> None:
    cells = {cell.name: cell for cell in read_grid(gpu_queue._paths(["gpu-short"])[0]).cells}
    assert cells["grape-1.0+awp-retrained_s0"].retrain == "grape-1.0+awp_s0"
    for name, cell in cells.items():
        if cell.retrain is not None:
            assert cell.changes["budget"] == cells[cell.retrain].changes["budget"], name
            assert cell.changes.get("training") == cells[cell.retrain].changes.get("training"), name
