"""Limits about another device: its networks go out, its times come back; the device is a fake clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress import calibration
from robustcompress.errors import BudgetError, InputError
from robustcompress.export.timing import Stopwatch
from robustcompress.latency_table import export_latency, read_latency_table
from robustcompress.robust.objectives import PGDAT
from robustcompress.structure import StructuralEditor
from tests.cli.conftest import Run, run  # noqa: F401
from tests.latency.fake import clock
from tests.strategies.nets import EXAMPLE, QUICK_RECIPE, SIZE, small_data

SHAPE = (3, SIZE, SIZE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model, _ = rc.build_model("resnet8", num_classes=100)
    patch = pytest.MonkeyPatch()
    patch.setattr("robustcompress.latency_table.export_onnx", _quick)
    target = tmp_path_factory.mktemp("table") / "phone"
    export_latency(model, target, image_shape=SHAPE, num_classes=10, round_to=1, name="resnet8")
    patch.undo()
    return target


def _quick(model: torch.nn.Module, path: Path, **settings: Any) -> None:
    """Two files stand for twenty: an export takes seconds, and the fake clock reads none."""
    if path.name in ("00.onnx", "01.onnx"):
        rc.export_onnx(model, path, **settings)
    else:
        path.write_bytes((path.parent / "01.onnx").read_bytes())


@pytest.fixture(scope="module")
def times(directory: Path) -> Path:
    """What the device would bring back: its clock counts operations, ten times as slow as here."""
    networks = json.loads((directory / "networks.json").read_text())
    model, _ = rc.build_model("resnet8", num_classes=10)
    stopwatch = Stopwatch(StructuralEditor(model, EXAMPLE), SHAPE)
    ms = [10 * clock(stopwatch.resized(widths), SHAPE) for widths in networks["widths"]]
    path = directory.parent / "times.json"
    path.write_text(json.dumps({"format": 1, "networks": networks, "ms": ms, "device": {"cpu": "Fake A53"}}))
    return path


def compress(strategy: str, table: Path, budget: rc.Budget, **settings: Any) -> rc.CompressResult:
    model, _ = rc.build_model("resnet8", num_classes=10)
    defaults: dict[str, Any] = {
        "data": small_data(),
        "epochs": 0.4,
        "objective": PGDAT(steps=1),
        "recipe": QUICK_RECIPE,
        "attacks": (),
        "progress": False,
        "round_to": 1,
    }
    return rc.compress(model, strategy, budget=budget, latency_table=table, **(defaults | settings))


@pytest.mark.parametrize("strategy", ["magnitude", "uniform", "grape", "harp"])
def test_strategies_meet_a_limit_of_the_other_device(
    strategy: str, times: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be timed here")

    monkeypatch.setattr(Stopwatch, "time", never)
    monkeypatch.setattr(calibration, "_known", {})
    result = compress(strategy, times, rc.Budget(latency=0.5))
    assert result.before.onnx_ms is not None and result.after.onnx_ms is not None
    really = 10 * clock(result.model, SHAPE)
    assert result.before.onnx_ms == pytest.approx(json.loads(times.read_text())["ms"][0])
    assert result.after.onnx_ms == pytest.approx(really, rel=0.01)  # the fit is exact where time is a sum over layers
    assert 0.95 * 0.5 <= really / result.before.onnx_ms <= 0.505 and result.meets_budget


def test_a_result_says_that_its_latency_was_predicted(times: Path, tmp_path: Path) -> None:
    reference = json.loads(times.read_text())["ms"][0]
    result = compress("magnitude", times, rc.Budget(max_latency_ms=0.4 * reference))
    result.save(tmp_path / "saved")
    again = rc.load(tmp_path / "saved")
    assert again.settings["latency"]["device"]["cpu"] == "Fake A53"
    assert again.settings["latency"]["measured_at_the_end"] is False
    assert "latency (predicted)" in str(again)


def test_a_table_of_another_network_is_refused_before_training(times: Path) -> None:
    with pytest.raises(InputError, match="about another network"):
        compress("magnitude", times, rc.Budget(latency=0.5), data=rc.load_data("digits", train_limit=40, test_limit=20))
    with pytest.raises(BudgetError, match="cannot be reached"):
        compress("magnitude", times, rc.Budget(max_latency_ms=1e-6))
    with pytest.raises(InputError, match="says nothing of latency"):
        compress("magnitude", times, rc.Budget(macs=0.5))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record["ms"].pop(), "times of"),
        (lambda record: record["ms"].__setitem__(2, -1.0), "not positive"),
        (lambda record: record["ms"].__setitem__(2, float("nan")), "not positive"),
        (lambda record: record.__setitem__("format", 2), "newer"),
        (lambda record: record["networks"]["widths"][1].popitem(), "other groups"),
        (lambda record: record["networks"]["widths"][1].update(stem=0), "no positive whole number"),
        (lambda record: record.pop("device"), "device"),
    ],
)
def test_a_damaged_table_is_one_clear_error(times: Path, tmp_path: Path, change: Any, said: str) -> None:
    record = json.loads(times.read_text())
    change(record)
    path = tmp_path / "times.json"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=said):
        read_latency_table(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_latency_table(tmp_path / "none.json")


def test_the_script_needs_no_torch_and_measures_every_network(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this device has no torch')")
    target = tmp_path / "times.json"
    done = subprocess.run(
        [sys.executable, str(directory / "measure.py"), "--seconds", "0.01", "-o", str(target)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = read_latency_table(target)
    assert len(table.ms) == len(table.widths) >= 15 and min(table.ms) > 0
    assert table.device["onnxruntime"] and table.device["threads"] == 1
    assert table.image_shape == SHAPE and table.name == "resnet8"
    assert str(Path.home()) not in target.read_text()


def test_bad_requests_leave_nothing_behind(tmp_path: Path, run: Run) -> None:  # noqa: F811
    model, _ = rc.build_model("resnet8", num_classes=10)
    with pytest.raises(InputError) as caught:
        export_latency(model, tmp_path, image_shape=(3, 0, 8), num_classes=1, networks=5)
    for said in ("exists", "image_shape", "num_classes=1", "networks=5"):
        assert said in str(caught.value)
    with pytest.raises(InputError, match="too few networks"):
        export_latency(model, tmp_path / "few", image_shape=SHAPE, round_to=64)
    (tmp_path / "file").write_text("")
    ran = run("latency", "resnet8", tmp_path / "file" / "where")
    assert ran.code == 2 and "is no directory" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
