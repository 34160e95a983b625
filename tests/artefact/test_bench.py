"""Structure and arithmetic; which file is faster is no question for a shared machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto

import robustcompress as rc
from robustcompress.artefact import bench
from robustcompress.artefact.bench import CPU, bench_onnx, resolve_provider
from robustcompress.errors import InputError, RobustCompressError
from tests.artefact.nets import linear_file
from tests.cli.conftest import Run, run  # noqa: F401


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("bench")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 2)).eval()
    weight = model.get_submodule("2").get_parameter("weight")
    weight.data[:, 30:] = 0
    rc.export_onnx(model, directory / "zeros.onnx", image_shape=(3, 8, 8), verify=False)
    return linear_file(directory / "bytes.onnx", TensorProto.UINT8), directory / "zeros.onnx"


def test_every_setting_has_a_row_for_every_file(files: tuple[Path, Path]) -> None:
    report = bench_onnx(files, threads=(1, 2), batches=(1, 3), seconds=0.02)
    assert [(row.threads, row.batch, row.file) for row in report.rows] == [
        (threads, batch, file.name) for threads in (1, 2) for batch in (1, 3) for file in files
    ]
    for row in report.rows:
        assert 0 < row.p50_ms <= row.p95_ms and row.calls >= 30 and row.loading_s > 0
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.ratio == 1 or row.file == "zeros.onnx"
        assert row.peak_bytes is None or 10e6 < row.peak_bytes < 400e6  # torch is not in it
        assert row.added_bytes is None or 0 < row.added_bytes < row.peak_bytes  # type: ignore[operator]
    document = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert document["files"]["zeros.onnx"]["zeros"] > 0.5 and document["provider"] == CPU
    assert document["files"]["bytes.onnx"]["bytes"] == files[0].stat().st_size
    assert "zeros, which save no time" in str(report) and str(files[0].parent) not in json.dumps(document)


def test_arithmetic_of_the_rows(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Known:
        loading_s = 0.5

        def __init__(self, name: str, process: Any, provider: str) -> None:
            self.slow = 2.0 if name == "zeros.onnx" else 1.0

        def ask(self, seconds: float) -> dict[str, Any]:
            return {"calls": [0.001 * self.slow] * 19 + [0.01 * self.slow]}

        def end(self) -> dict[str, Any]:
            return {"peak": 300, "before": 100}

    monkeypatch.setattr(bench, "_Child", Known)
    first, second = bench_onnx(files, batches=(4,), seconds=0.1).rows
    assert (first.p50_ms, second.p50_ms) == (1, 2) and (first.ratio, second.ratio) == (1, 2)
    assert first.p95_ms == 10 and first.calls == 200 and first.added_bytes == 200
    assert first.images_per_s == pytest.approx(4 * 20 / 0.029)


def test_two_files_of_one_name_are_told_apart(files: tuple[Path, Path], tmp_path: Path) -> None:
    again = linear_file(tmp_path / files[0].name)
    report = bench_onnx([files[0], again], seconds=0.01)
    assert len({row.file for row in report.rows}) == 2 and all("/bytes.onnx" in row.file for row in report.rows)


def test_all_that_is_wrong_is_said_before_any_timing(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        bench_onnx([files[0], tmp_path / "none.onnx"], threads=(0,), batches=(), seconds=-1, provider="cudo")
    for said in ("none.onnx does not exist", "threads=(0,)", "batches=()", "seconds=-1", CPU):
        assert said in str(caught.value)
    with pytest.raises(InputError, match="no file is named"):
        bench_onnx([])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
    rc.export_onnx(model, tmp_path / "fixed.onnx", image_shape=(3, 4, 4), batch=2, verify=False)
    with pytest.raises(InputError, match="takes 2 images a call, not 1"):
        bench_onnx(tmp_path / "fixed.onnx")
    assert resolve_provider("cpu") == CPU


def test_a_file_that_fails_while_it_runs_is_named(tmp_path: Path) -> None:
    path = linear_file(tmp_path / "liar.onnx")
    proto = onnx.load(str(path))
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 5  # its weights are for 8 rows
    onnx.save(proto, str(path))
    with pytest.raises(RobustCompressError, match=r"liar\.onnx"):
        bench_onnx(path, seconds=0.01)


def test_the_command_prints_a_table_and_writes_json(files: tuple[Path, Path], run: Run) -> None:  # noqa: F811
    ran = run("bench", *files, "--batch", "1,2", "--seconds", "0.02", "--save", "--json")
    assert ran.code == 0 and ran.document == json.loads((files[0].parent / "bytes.bench.json").read_text())
    shown = run("bench", *files, "--seconds", "0.02")
    assert shown.code == 0 and "p95 ms" in shown.out and "save no time" in shown.out
    assert run("bench", files[0], "--threads", "0").code == 2
    assert "name a file in a directory" in run("bench", files[0], "-o", "nowhere/x.json").err
