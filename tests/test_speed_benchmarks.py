"""The benchmarks of speed and strength run, count what they say they count, and draw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import evaluation_speed, strong_attack, training_memory, training_scaling, training_step
from robustcompress import ThreatModel
from robustcompress.robust import pgd

SCRIPTS = (strong_attack, evaluation_speed, training_scaling, training_memory)


def run(script: Any, tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / f"{script.MODULE}.json"
    assert script.main(["--quick", "--out", str(out), *words]) == 0
    value: dict[str, Any] = json.loads(out.read_text())
    assert value["benchmark"] == script.MODULE and value["quick"] is True
    assert str(tmp_path) not in out.read_text()
    assert script.plot(value, tmp_path / "p.png").stat().st_size > 10_000
    return value


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.MODULE)
def test_help_and_quick_runs_are_as_for_all_benchmarks(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0 and "example: python -m benchmarks." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--out"):
        script.main(["--quick"])


def test_passes_are_those_that_an_attack_makes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    spent = strong_attack.Passes()
    with spent.counting(model):
        pgd(model, torch.rand(5, 3, 2, 2), torch.zeros(5, dtype=torch.int64), ThreatModel(), steps=4, restarts=2)
    # Two restarts of four steps, and a look without a gradient at the end of each.
    assert (spent.forward, spent.backward, spent.calls) == (2 * 5 * 5, 2 * 4 * 5, 2 * 5)
    model(torch.rand(5, 3, 2, 2))
    assert spent.forward == 50, "it no longer counts"


def test_strong_attack(tmp_path: Path) -> None:
    words = ("--nets", str(tmp_path / "nets"))
    value = run(strong_attack, tmp_path, *words)
    (net,) = value["results"]
    reference, *others = net["attacks"]
    assert reference["attack"] == "autoattack" and [row["attack"] for row in others] == ["pgd-20", "apgd-fast-15"]
    for row in others:
        assert row["gap"] == pytest.approx(100 * (row["right"] - reference["right"]) / net["n"], abs=1e-3)
        assert row["only_reference"] - row["only_attack"] == row["right"] - reference["right"]
    assert others[0]["backward"] == pytest.approx(20 * net["clean"] / net["n"], abs=0.01)
    assert others[1]["backward"] <= 15 * net["clean"] / net["n"] + 0.01
    (piece,) = (tmp_path / "nets" / "autoattack").iterdir()
    piece.write_text(piece.read_text().replace('"forward": ', '"forward": 1'))
    again = run(strong_attack, tmp_path, *words)
    assert again["results"][0]["attacks"][0]["forward"] > reference["forward"], "what is kept is read"


def test_evaluation_speed(tmp_path: Path) -> None:
    value = run(evaluation_speed, tmp_path, "--nets", str(tmp_path / "nets"))
    found = value["results"]["rivals"]
    assert list(found) == ["reference", "ours", "ours, 250", "ours, timed", "apgd-fast", "pgd-20"]
    for row in found.values():
        assert row["seconds"] > 0 and 0 < row["a_batch"] <= 12
        assert row["speed_up"] == pytest.approx(found["reference"]["seconds"] / row["seconds"], rel=0.05)


def test_training_scaling(tmp_path: Path) -> None:
    value = run(training_scaling, tmp_path)
    first, second = value["results"]["cells"]
    assert (first["batch_size"], second["batch_size"]) == (8, 16)
    agreed = value["results"]["agreement"]["rivals"]
    ours, public = agreed["ours"]["losses"], agreed["public"]["losses"]
    # From the same draws the loops take the same steps, but for the rounding of where they add and clip.
    assert ours[0] == pytest.approx(public[0], abs=1e-3) and ours[1] == pytest.approx(public[1], abs=0.05)
    if training_step.library_is_installed():
        assert agreed["library"]["losses"][0] == pytest.approx(ours[0], abs=1e-3) and first["over_library"] > 0
    assert agreed["ours, another seed"]["losses"][0] != ours[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_memory(tmp_path: Path) -> None:
    (row,) = run(training_memory, tmp_path)["results"]
    assert 0 < row["accumulate"] < row["plain"] and row["both"] < row["plain"]
