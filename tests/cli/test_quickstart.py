"""The quickstart as a smoke run: what it leaves, and that the table says what the files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import robustcompress as rc
from robustcompress.budget import human
from robustcompress.export import load_session
from tests.cli.conftest import Run

NAMES = ("none", "hydra", "grape")


def test_fast(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "robustcompress-quickstart"
    ran = run("quickstart", "--fast", "--out", out)
    assert ran.code == 0, ran.err
    assert {path.name for path in tmp_path.iterdir()} == {out.name}
    files = {*NAMES, *(f"{name}.onnx" for name in NAMES), "quickstart.json", "quickstart.png"}
    assert {path.name for path in out.iterdir()} == files
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((out / "quickstart.json").read_text())
    assert str(tmp_path) not in json.dumps({**document, "out": ""})
    assert set(document["versions"]) >= {"torch", "onnxruntime", "pyautoattack"} and document["hardware"]["cores"]
    images = rc.load_data("digits").test
    for name in NAMES:
        numbers, result = document["networks"][name], rc.load(out / name)
        assert result.report is not None
        assert numbers["after"]["macs"] == result.after.macs and result.meets_budget
        assert [attack.name for attack in result.report.attacks] == ["clean", "fgsm", "pgd-20", "autoattack"]
        for attack in result.report.attacks:
            stated = numbers["accuracies"][attack.name]
            assert (stated["accuracy"], stated["n"]) == (attack.accuracy, attack.n)
        assert result.report.result("autoattack").n == 8 and result.report.result("clean").n == 359
        assert result.report.result("autoattack").suite.startswith("custom")
        logits = load_session(out / f"{name}.onnx", threads=1).run(None, {"images": images.as_float().numpy()})[0]
        assert (logits.argmax(1) == images.labels.numpy()).mean() == numbers["onnxruntime"]["accuracy"]
        (row,) = re.findall(rf"^ *{name} +\S.*$", ran.out, re.MULTILINE)[:1]
        for cell in (
            human(numbers["after"]["macs"]),
            f"{100 * numbers['accuracies']['clean']['accuracy']:.1f}",
            f"{100 * numbers['accuracies']['pgd-20']['accuracy']:.1f}",
            f"{100 * numbers['onnxruntime']['accuracy']:.1f}",
        ):
            assert cell in row.split(), (cell, row)
    assert len({rc.load(out / name).report.images_sha256 for name in NAMES}) == 1  # type: ignore[union-attr]
    difference = document["differences"]["grape - none, autoattack"]["difference"]
    assert f"{100 * difference:+.2f} points" in ran.out
    assert "numbers mean nothing" in ran.out and str(out) in ran.out

    again = run("quickstart", "--fast", "--out", out)
    assert again.code == 2 and "--out" in again.err and again.out == ""


def test_an_interrupted_run_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import robustcompress.quickstart as module

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compress", interrupt)
    torch.set_num_threads(2)
    try:
        assert run("quickstart", "--out", tmp_path / "no" / "q").code == 130
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert not list(tmp_path.iterdir())


def test_the_parent_must_be_a_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ran = run("quickstart", "--out", tmp_path / "file" / "q")
    assert ran.code == 2 and "--out" in ran.err
