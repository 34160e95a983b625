"""The queue of full-size runs, in its smoke mode on the CPU: it stops in time, goes on, carries, and lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from benchmarks import carry, cells, gpu_queue
from benchmarks.gpu_speed import Speed, measure_peak, shapes_of
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
            assert (tmp_path / "carry/gpu-short/none_s0").is_dir(), "wherever it stopped, that can be carried"
        else:
            raise AssertionError("the queue gets nowhere")
    assert gpu_queue.main(call(tmp_path / "b")) == 0
    said = capsys.readouterr().err
    assert "measured peak" in said and "images/s" in said and "% of the measured peak" in said
    stopped, whole = (read(tmp_path / place / "out/gpu-short/none_s0.json")["results"] for place in ("a", "b"))
    assert [h["loss"] for h in stopped["history"]] == [h["loss"] for h in whole["history"]]
    assert [p.name for p in (tmp_path / "carry").iterdir()] == ["carry.json"], (
        "nothing is left to carry of a finished run"
    )
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


def test_a_run_that_waits_for_its_judgement_is_carried_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> None:
        raise rc.OutOfTime("no time to judge")

    monkeypatch.setattr(carry, "PIECE", 1000)  # as if these files were too large
    monkeypatch.setattr(cells, "_judge", late)
    assert gpu_queue.main(call(tmp_path / "first", "--carry", str(tmp_path / "carry"))) == 0
    there = tmp_path / "first/state/gpu-short/none_s0"
    carried = tmp_path / "carry/gpu-short/none_s0"
    assert (carried / "result/model.safetensors.piece1").is_file() and (carried / "training-so-far").is_file()
    assert max(path.stat().st_size for path in carried.rglob("*") if path.is_file()) <= 1000
    taken = carry.take_up(tmp_path / "carry", tmp_path / "second/state")
    assert taken == ["gpu-short/none_s0"] and not carry.take_up(tmp_path / "carry", tmp_path / "second/state")
    for path in (there / "result").iterdir():
        assert (tmp_path / "second/state/gpu-short/none_s0/result" / path.name).read_bytes() == path.read_bytes()


def test_a_directory_with_other_things_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    assert gpu_queue.main(call(tmp_path / "a", "--carry", str(mine))) == 2
    assert "holds other things" in capsys.readouterr().err and (mine / "thesis.tex").read_text() == "years"


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_queue.QUEUE)
def test_every_cell_of_the_queue_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]
    assert gpu_queue.main([*options, "--grids", name, "--only", "*_s0"]) == 0, capsys.readouterr().err
    grid = read_grid(gpu_queue._paths([name])[0])
    wanted = {cell.name for cell in grid.cells if cell.seed == 0}
    assert {path.stem for path in (tmp_path / "out" / name).glob("*.json")} == wanted


def test_compiling_pays_in_long_runs_only() -> None:
    speed = Speed(peak=1e12, eager_s=0.10, compiled_s=0.08, compile_s=60.0, macs=1e9, batch=256)
    assert speed.compiling_pays(3001, 1) and not speed.compiling_pays(2999, 1) and not speed.compiling_pays(3001, 2)
    shapes = {name: shapes_of(rc.STRATEGIES[name]().to_json()) for name in rc.STRATEGIES}
    assert shapes["grape"] == 5 and shapes["hydra"] == shapes["s2ap"] == shapes["random"] == 2
    assert shapes["none"] == shapes["uniform"] == shapes["fixed"] == shapes["scaling"] == 1
    assert not Speed(peak=1e12, eager_s=0.1, compiled_s=None, compile_s=0.0, macs=1e9, batch=256).compiling_pays(1e9, 1)
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
