"""The commands that choose a size, as a new user would call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import robustcompress as rc
from tests.cli.conftest import SMALL, Run
from tests.latency.fake import Clockwork

TINY = [word for word in SMALL if word not in ("--attacks", "clean,pgd-2")]


@pytest.fixture(autouse=True)
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["robustcompress.pareto"], "Stopwatch", Clockwork)


def test_compress_to_a_demand(run: Run, tmp_path: Path) -> None:
    demand = ["--min-robust", "0.0005", "--robust-attack", "fgsm", "--trials", "1", "--smallest-by", "params"]
    where = ["--out", tmp_path / "r", "--checkpoint", tmp_path / "c"]
    ran = run("compress", "resnet8", *SMALL, "--strategy", "uniform", *demand, *where, "--json")
    if ran.code == 3:  # so little training may leave nothing right
        assert "does not reach" in ran.err or "only the reference" in ran.err
        return
    assert ran.code == 0, ran.err
    document, result = ran.document, rc.load(tmp_path / "r")
    asked = document["budget"]["min_robust"]
    assert (asked["axis"], asked["attack"], asked["trials"]) == ("params", "fgsm", 1)
    assert document["tried"][0]["limit"] == 1 and len(document["tried"]) == 2
    assert result.budget == document["budget"] and not (tmp_path / "c").exists()
    assert "trial 1 of at most 1" in ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trials", "3"], "go with --min-robust"),
        (["--min-robust", "45"], "for 45 % write 0.45"),
        (["--min-robust", "0.4", "--strategy", "none"], "none has but one"),
        (["--min-robust", "0.4", "--robust-attack", "clean", "--trials", "0"], "trials=0"),
    ],
)
def test_a_demand_that_cannot_be_is_refused(run: Run, options: list[str], said: str) -> None:
    ran = run("compress", "resnet8", *SMALL, *options)
    assert ran.code == 2 and said in ran.err


def test_pareto_from_the_shell(run: Run, tmp_path: Path) -> None:
    asked: list[Any] = ["--strategy", "uniform", "--budgets", "0.3,0.000001", "--attacks", "clean,fgsm"]
    asked += ["--out", tmp_path / "f", "--picture", "front.svg"]
    ran = run("pareto", "resnet8", *TINY, *asked)
    assert ran.code == 0, ran.err
    assert "cannot be reached" in ran.out and "fgsm % (95 %)" in ran.out and "upper bound" in ran.out
    assert "<svg" in (tmp_path / "f" / "front.svg").read_text()
    again = run("pareto", "resnet8", *TINY, *asked, "--json")
    assert again.code == 0 and "3 of its 3 entries are done" in again.err
    document = again.document
    assert document["points"] == json.loads((tmp_path / "f" / "pareto.json").read_text())["points"]
    assert rc.load(tmp_path / "f" / "uniform-macs-0.3").after.macs == document["points"][1]["macs"]
    other = run("pareto", "resnet8", *TINY, *asked, "--seed", "1")
    assert other.code == 2 and "of another run" in other.err
    wrong = run("pareto", "resnet8", *TINY, "--strategy", "uniform,hydra", "--option", "search=0.1", "--out", tmp_path)
    assert wrong.code == 2 and "name only that one" in wrong.err


def test_sensitivity_from_the_shell(run: Run, grape: Path, tmp_path: Path) -> None:
    data = ["--test-limit", "40", "--split", "test", "--attack", "fgsm", "--shares", "0.5,0.25"]
    ran = run("sensitivity", grape, *data, "--plot", tmp_path / "s.png")
    assert ran.code == 0, ran.err
    assert "lost at 0.25" in ran.out and "layers.0.0.conv1" in ran.out and "lost without it" in ran.out
    assert "about" in ran.err and (tmp_path / "s.png").stat().st_size > 10_000
    document = run("sensitivity", grape, *data, "--groups", "conv1", "--no-depth", "--json").document
    assert [cut["part"] for cut in document["cuts"]] == ["conv1", "conv1"] and document["threat"]["eps"] == 0.1
    named = run("sensitivity", "resnet8", *data, "--model-arg", "stem_stride=4", "--eps", "0.1", "--groups", "conv1")
    assert named.code == 0 and "has no trained weights" in named.err and "not above chance" in named.out
    weights = run("sensitivity", "resnet8", *data, "--model-arg", "stem_stride=4", "--weights", grape / "nothing")
    assert weights.code == 2 and "--weights" in weights.err
    assert run("sensitivity", tmp_path).code == 2
    assert "a result has its own" in run("sensitivity", grape, "--model-arg", "width=1").err
