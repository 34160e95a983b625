"""`export`, `quantize` and `inspect FILE.onnx` as they are called."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from robustcompress.artefact import open_onnx
from robustcompress.cli import build_parser
from tests.cli.conftest import Run

LOOSE = ["--max-loss", "100", "--images", "40", "--calibration-images", "64", "--attack", "fgsm"]


def test_export_writes_what_was_asked_for(run: Run, grape: Path) -> None:
    options = ["--input", "uint8", "--resize", "--softmax", "--batch", "2", "--external-data", "--opset", "18"]
    ran = run("export", "--onnx", grape, *options, "--json")
    assert ran.code == 0, ran.err
    assert ran.document["opset"] == 18 and ran.document["compared_on"] == "digits" and len(ran.document["data"]) == 1
    file = open_onnx(grape / "model.onnx")
    assert file.resizes and file.batch == 2 and file.output_kind == "probabilities" and file.input_type == "uint8"


def test_export_of_a_name_says_that_its_weights_are_random(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("export", "--onnx", "resnet8", "--model-arg", "width=0.5", "--image-size", 24)
    assert ran.code == 0 and "random weights" in ran.out and "random weights" in ran.err
    file = open_onnx(tmp_path / "resnet8.onnx")
    assert file.image_shape == (3, 24, 24) and file.metadata["weights"] == "random"
    assert "random" in run("inspect", "resnet8.onnx").out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["resnt8"], "did you mean 'resnet8'"),
        (["runs/none"], "no directory of a saved result either"),
        (["resnet8", "--data", "digits", "--image-size", "0"], "a model without a result knows no images"),
        (["resnet8", "--model", "a:b"], "--model is for a result"),
        (["resnet8", "--resize"], "only files that take bytes resize"),
        (["."], "holds no result"),
    ],
)
def test_export_refuses(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("export", "--onnx", *argv)
    assert ran.code == 2 and said in ran.err and list(tmp_path.iterdir()) == []
    assert run("export", "resnet8", "--batch", "many").code == 2


def test_quantize_a_result_then_look_at_it(run: Run, grape: Path) -> None:
    ran = run("quantize", grape, "--target", "arm", *LOOSE, "--json")
    assert ran.code == 0, ran.err
    document = ran.document
    assert document["target"] == "arm" and document["robust"]["before"]["n"] == 40
    path = grape / "model.int8.onnx"
    assert document["path"] == str(path) and open_onnx(path).precision == "int8"
    assert run("quantize", grape, "--target", "arm", *LOOSE).code == 2, "an existing file is replaced"
    shown = run("inspect", path).out
    for part in ("int8 for arm", "QuantizeLinear", "this file", "the float network", "linf 0.1", "grape", "MACs"):
        assert part in shown, part
    described = run("inspect", path, "--json").document
    assert described["precision"] == "int8" and described["metadata"]["quantization"]["target"] == "arm"
    assert run("inspect", path, "--plot", "a.png").code == 2 and run("inspect", path, grape).code == 2


def test_quantize_a_file_with_and_without_its_result(run: Run, grape: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    assert run("export", "--onnx", grape, "-o", source, "--input", "uint8").code == 0
    ran = run("quantize", source, *LOOSE)
    assert ran.code == 0 and "under attack: not measured" in ran.out, ran.err
    assert (tmp_path / "m.int8.onnx").is_file()
    ran = run("quantize", source, "--result", grape, *LOOSE, "--to", "float16", "--json")
    assert ran.code == 0 and ran.document["robust"] is not None and ran.document["to"] == "float16", ran.err


def test_quantize_exits_with_4_where_too_much_is_lost(run: Run, grape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustcompress.artefact.changes import Change

    monkeypatch.setattr(Change, "loss", property(lambda self: 5.0))
    before = sorted(grape.iterdir())
    ran = run("quantize", grape, "--images", "40", "--attack", "fgsm", "--json")
    assert ran.code == 4 and ran.document["error"]["kind"] == "AccuracyError" and "--allow-loss" in ran.err
    assert sorted(grape.iterdir()) == before
    assert run("quantize", grape, "--images", "40", "--attack", "fgsm", "--allow-loss").code == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["foreign.onnx"], "name the images that foreign.onnx was trained on"),
        (["absent.onnx"], "does not exist"),
        (["foreign.onnx", "--result", "absent"], "holds no result"),
        (["foreign.onnx", "--data", "digits", "--calibration-images", "3"], "must be at least 32"),
    ],
)
def test_quantize_refuses(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    from onnx import TensorProto

    from tests.artefact.test_file import toy

    monkeypatch.chdir(tmp_path)
    toy(tmp_path / "foreign.onnx", ["n", 3, 32, 32], TensorProto.FLOAT)
    ran = run("quantize", *argv)
    assert ran.code == 2 and said in ran.err, ran.err
    assert json.dumps(sorted(file.name for file in tmp_path.iterdir())) == '["foreign.onnx"]'


def test_the_commands_of_the_page_are_commands_we_have() -> None:
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text()
    commands = re.findall(r"`robustcompress ([^`]+)`", page)
    assert len(commands) >= 6
    for command in commands:
        build_parser().parse_args(shlex.split(command))
