"""`robustcompress evaluate FILE.onnx`, as a user calls it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.artefact import ArtefactReport, verify_artefact
from robustcompress.artefact.formats import apbench, robustbench
from robustcompress.errors import InputError
from robustcompress.robust import AttackResult
from tests.artefact.nets import Linear, linear_data, linear_file
from tests.cli.conftest import Run

FEW = ["--images", "12", "--attack-images", "6"]


@pytest.fixture(scope="module")
def written(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "model.onnx"
    rc.export_onnx(rc.load(saved / "grape"), path, verify=False)
    return path


@pytest.fixture
def exported(grape: Path, written: Path) -> Path:
    return Path(shutil.copy(written, grape / "model.onnx"))


def test_a_file_beside_its_result_is_attacked_with_its_gradients(exported: Path, run: Run) -> None:
    ran = run("evaluate", exported, *FEW, "--attacks", "pgd-2,square-20", "--curve", "--save", "--json")
    assert ran.code == 0, ran.err
    names = [attack["name"] for attack in ran.document["robust"]["attacks"]]
    assert names == ["clean", "pgd-2 on the twin", "square-20"]
    assert ran.document["robust"]["threat"]["eps"] == 0.1  # as the file says of itself
    saved = json.loads((exported.parent / "model.verify.json").read_text())
    assert saved == ran.document and len(saved["curve"]) >= 5
    again = run("evaluate", exported, *FEW, "--attacks", "pgd-2,square-20")
    assert again.code == 0 and "worst case over 2 attacks" in again.out and "no certificate" in again.out


def test_a_file_alone_a_twin_elsewhere_and_another_models_images(exported: Path, tmp_path: Path, run: Run) -> None:
    alone = shutil.copy(exported, tmp_path / "alone.onnx")
    picture = tmp_path / "curve.png"
    ran = run("evaluate", alone, *FEW, "--attacks", "square-5", "--plot", picture, "--corruptions")
    assert ran.code == 0 and "no torch twin" in ran.out and "jpeg_compression" in ran.out and picture.is_file()
    ran = run("evaluate", alone, *FEW, "--attacks", "fgsm", "--twin", exported.parent, "--transfer-from", exported)
    assert ran.code == 0 and "fgsm on the twin" in ran.out and "square-1000 on model.onnx" in ran.out


def test_a_result_that_merely_lies_beside_a_file_is_no_twin(exported: Path, tmp_path: Path, run: Run) -> None:
    torch.manual_seed(5)
    model, _ = rc.build_model("resnet8", num_classes=10, stem_stride=4)
    torch.nn.init.normal_(model.get_submodule("fc").get_parameter("weight"), std=3.0)
    data = rc.load_data("digits")
    rc.export_onnx(model.eval(), exported, image_shape=data.image_shape, classes=data.classes, overwrite=True)
    ran = run("evaluate", exported, *FEW, "--data", "digits", "--eps", "0.1", "--attacks", "square-3")
    assert ran.code == 0 and "is not used as the file's twin: they agree on" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attacks", "pgd-20"], "needs gradients"),
        (["--norm", "l2"], "give --eps as well"),
        (["--compare", "runs/other"], "--compare is for saved results"),
        (["--format", "robustbench"], "RobustBench has cifar10"),
        (["--format", "apbench"], "there is no twin"),
        (["--plot", "curve.xyz"], "name one of the formats"),
        (["--device", "cuda"], "run on the CPU here"),
        (["-o", "nowhere/report.json"], "name a file in a directory that exists"),
        (["--image-size", "24"], "image_size=32"),
    ],
)
def test_bad_input_is_one_error_before_any_work(
    written: Path, tmp_path: Path, run: Run, words: list[str], said: str
) -> None:
    alone = Path(shutil.copy(written, tmp_path / "alone.onnx"))
    ran = run("evaluate", alone, *words)
    assert ran.code == 2 and said in ran.err and not ran.out, ran.err
    assert not list(tmp_path.glob(".alone*"))


def test_foreign_files_need_to_be_told_and_directories_keep_their_arguments(
    grape: Path, tmp_path: Path, run: Run
) -> None:
    foreign = linear_file(tmp_path / "foreign.onnx")
    ran = run("evaluate", foreign)
    assert ran.code == 2 and "pass --eps" in ran.err and "pass --data" in ran.err
    ran = run("evaluate", tmp_path / "missing.onnx")
    assert ran.code == 2 and "does not exist" in ran.err
    ran = run("evaluate", grape, "--curve", "-o", "x.json")
    assert ran.code == 2 and "--curve, -o is for ONNX files" in ran.err


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ArtefactReport:
    path = linear_file(tmp_path_factory.mktemp("formats") / "net.onnx")
    pixels, labels, _ = linear_data(10, 8 / 255)
    found = verify_artefact(path, (pixels, labels), rc.ThreatModel(), twin=Linear(), attacks=["fgsm", "square-3"])
    return replace(found, data="cifar10")


def with_autoattack(report: ArtefactReport, **changes: Any) -> ArtefactReport:
    correct = torch.arange(report.robust.n) < 4
    attack = AttackResult(name="autoattack on the twin", correct=correct, seconds=1.0, suite="standard")
    robust = replace(report.robust, attacks=(*report.robust.attacks, replace(attack, **changes)))
    return replace(report, robust=robust)


def test_robustbench_never_gets_a_cheaper_attack_as_autoattack(report: ArtefactReport) -> None:
    card = robustbench(report)
    assert "autoattack_acc" not in card and card["eps"] == "8/255" and card["clean_acc"] == "100.00"
    assert float(card["robustcompress"]["worst_case_acc"]) < 100
    assert robustbench(with_autoattack(report))["autoattack_acc"] == "40.00"
    for less in (
        with_autoattack(report, suite="custom (square_queries=5)"),
        with_autoattack(report, correct=torch.ones(3, dtype=torch.bool)),
        replace(with_autoattack(report), parity=()),
        replace(with_autoattack(report), file={**report.file, "precision": "int8"}),
    ):
        assert "autoattack_acc" not in robustbench(less)
    with pytest.raises(InputError, match="RobustBench has"):
        robustbench(replace(report, data="digits"))


def test_the_pruning_benchmark_gets_its_keys_or_a_reason(report: ArtefactReport, saved: Path) -> None:
    with pytest.raises(InputError, match="standard AutoAttack was not run") as caught:
        apbench(report, None)
    assert "there is no twin" in str(caught.value)
    result = rc.load(saved / "grape")
    keys = apbench(with_autoattack(report), result)
    assert keys["architecture"] == "resnet8" and keys["dataset"] == "CIFAR10" and keys["structure"] == "filters"
    assert 10 < float(keys["sparsity_rate"]) < 70 and keys["Robust Accuracy (AA)"] == "40.00"
    assert keys["Robust Accuracy (HO-FMN)"] is None
    with pytest.raises(InputError, match="was not pruned"):
        apbench(with_autoattack(report), rc.load(saved / "none"))
