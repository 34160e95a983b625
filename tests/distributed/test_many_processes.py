"""Two and four processes over all strategies, killed, resized, interrupted: what takes minutes."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import endurance_distributed
from tests.distributed.jobs import Case, compress_all, compressed, stopped_after_an_epoch
from tests.distributed.spawned import together

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def close(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    assert a["edits"] == b["edits"]
    for name, values in b["weights"].items():
        np.testing.assert_allclose(a["weights"][name], values, atol=tolerance, rtol=tolerance, err_msg=name)


def test_every_strategy_equal_killed_and_resized() -> None:
    found = endurance_distributed.run(quick=False, seed=0)
    count = len(found["strategies"])
    assert found["equal"] == found["compared"] == count
    assert found["near"] == count, found["distances"]
    assert found["killed_equal"] == found["kills"] == count
    assert found["resized_near"] == count


def test_four_processes_that_stop_are_two_that_go_on(tmp_path: Path) -> None:
    case = Case("grape", kept={"checkpoint": str(tmp_path / "c"), "checkpoint_every_s": 0})
    together(4, stopped_after_an_epoch, [case], 1)
    (mine,), other = together(2, compress_all, [case])
    assert not (tmp_path / "c").exists() and other[0]["edits"] == mine["edits"]
    close(mine, compressed(Case("grape"), parts=4), endurance_distributed.NEAR)


@pytest.mark.parametrize("compression", ["fp16", "bf16", "powersgd"])
def test_gradients_that_travel_compressed_train_nearly_the_same(compression: str) -> None:
    epochs = 12.0 if compression == "powersgd" else 4.0  # it begins after ten steps of a phase
    case = Case("magnitude", epochs=epochs, recipe={"gradient_compression": compression})
    (mine,), (other,) = together(2, compress_all, [case])
    for name, values in mine["weights"].items():
        assert np.array_equal(values, other["weights"][name]), "both processes end alike"
    whole = compressed(dataclasses.replace(case, recipe={}), parts=2)
    moved = [mine["weights"][name] for name in whole["weights"]]
    assert any(not np.array_equal(a, b) for a, b in zip(moved, whole["weights"].values(), strict=True))
    losses = [[r["loss"] for r in run["history"] if "loss" in r][-1] for run in (mine, whole)]
    assert abs(losses[0] - losses[1]) < 0.2


def test_sigterm_stops_all_processes_after_the_same_step_and_the_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["robustcompress", "compress", "resnet8", "--model-arg", "stem_stride=2", "--epochs", "4"]
    command += ["--strategy", "magnitude", "--eps", "0.1", "--batch-size", "64", "--attacks", "clean"]
    settings: dict[str, Any] = {
        "cwd": ROOT,
        "env": dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    }
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, timeout=600, **settings)
    first = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **settings,
    )
    assert first.stderr is not None
    told = ""
    while "magnitude: pretrain" not in told:  # the line that a phase leaves behind
        told += first.stderr.readline()
        assert first.poll() is None, told
    first.send_signal(signal.SIGTERM)
    told += first.communicate(timeout=120)[1]
    assert first.returncode != 0 and "stopped in phase" in told and "the same torchrun command" in told
    assert not (tmp_path / "out").exists() and (tmp_path / "out.checkpoint").is_dir()
    subprocess.run([*command, "--out", str(tmp_path / "out")], check=True, timeout=600, **settings)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
