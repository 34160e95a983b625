"""`robustcompress certify` on results saved beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustcompress.certify import CertificateReport
from tests.cli.conftest import Run

FEW = ["--test-limit", "40", "--images", "4"]


def test_smoothing_table_picture_and_file(run: Run, grape: Path, tmp_path: Path) -> None:
    picture = tmp_path / "radii.png"
    ran = run("certify", grape, *FEW, "--sigma", "0.5", "--n", "100", "--plot", picture, "--save", "--json")
    assert ran.code == 0, ran.err
    report = CertificateReport.from_json(ran.document["certificate"])
    assert report.method == "smoothing" and report.n == 4
    assert report.settings == {"sigma": 0.5, "n0": 100, "n": 100, "alpha": 0.001}
    saved = grape / "certificate.smoothing-0.5.json"
    assert ran.document["saved"] == str(saved) and picture.stat().st_size > 5000
    assert CertificateReport.from_json(json.loads(saved.read_text())) == report
    again = run("certify", grape, *FEW, "--sigma", "0.5", "--n", "100", "--json")
    assert again.document["certificate"] == ran.document["certificate"]  # seconds too: all was kept
    shown = run("certify", grape, *FEW, "--sigma", "0.5", "--n", "100")
    assert "certified %" in shown.out and "lower bound" in shown.out and "saved" not in shown.out


@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_bounds_take_the_radius_of_the_training(run: Run, grape: Path, method: str) -> None:
    ran = run("certify", grape, *FEW, "--method", method, "--json")
    assert ran.code == 0, ran.err
    assert ran.document["certificate"]["settings"] == {"eps": 0.1} and ran.document["certificate"]["norm"] == "linf"
    other = run("certify", grape, *FEW, "--method", method, "--eps", "1/255", "--json")
    assert other.document["certificate"]["settings"] == {"eps": 1 / 255}


def test_what_was_trained_for_is_what_is_certified(run: Run, grape: Path) -> None:
    path = grape / "result.json"
    record = json.loads(path.read_text())
    record["settings"]["objective"] = {"name": "smoothing", "sigma": 0.75, "label_smoothing": 0.0}
    path.write_text(json.dumps(record))
    ran = run("certify", grape, *FEW, "--n", "50", "--json")
    assert ran.document["certificate"]["settings"]["sigma"] == 0.75
    record["settings"]["objective"] = {"name": "ibp"}
    path.write_text(json.dumps(record))
    assert run("certify", grape, *FEW, "--json").document["certificate"]["method"] == "ibp"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "ipb"], "did you mean 'ibp'"),
        (["--method", "ibp", "--sigma", "0.5"], "--sigma: method 'ibp' has no such option"),
        (["--eps", "0.1"], "--eps: method 'smoothing' has no such option"),
        (["--n", "3"], "n=3: so few draws"),
        (["--plot", "nowhere/radii.png"], "there is no directory"),
        (["--data", "nothing-here"], "nothing-here"),
    ],
)
def test_refusals(run: Run, grape: Path, options: list[str], message: str) -> None:
    ran = run("certify", grape, "--images", "2", *options)
    assert ran.code == 2 and message in ran.err, ran.err
    assert not list(grape.glob("certificate*"))
