"""One command for the suites of kills, damaged files and several processes: what it adds up, and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import endurance

SIGTERM = {"runs": 3, "exit_143": 2, "identical": 3, "done_before": 1}
KILLS = {"kills": 4, "runs": 3, "identical": 3, "by_strategy": {"grape": {}}, "sigterm": SIGTERM}
FUZZ = {"cases": 10, "loaded": 3, "refused": 7, "failed": 0, "slowest_s": 0.25}
PAIR = {"runs": 2, "compared": 1, "equal": 1, "killed": 2, "killed_equal": 2, "largest_difference": 1e-7}


def call(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str, **found: dict[str, Any]) -> int:
    for name, counts in found.items():
        monkeypatch.setitem(endurance.SUITES, name, lambda counts=counts, **options: dict(counts))  # type: ignore[misc]
    return endurance.main([*words, "--out", str(out)])


def test_suites_are_written_one_by_one_and_added_to_what_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "endurance.json"
    assert call(monkeypatch, out, "kills", kills=KILLS) == 0
    assert call(monkeypatch, out, "fuzz", "distributed", fuzz=FUZZ, distributed=PAIR) == 0
    results = json.loads(out.read_text())["results"]
    assert {name: found["runs"] for name, found in results.items() if name != "fuzz"} == {"kills": 3, "distributed": 2}
    said = capsys.readouterr().out
    assert "sigterm: exit 143" in said and "1e-07" in said
    assert said.count("faults |") == 4, "once after the first call, of all three after the second"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("kills", KILLS | {"identical": 2}),
        ("kills", KILLS | {"sigterm": SIGTERM | {"done_before": 0}}),
        ("fuzz", FUZZ | {"failed": 1}),
        ("distributed", PAIR | {"equal": 0}),
        ("distributed", PAIR | {"killed_equal": 1}),
    ],
)
def test_a_fault_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, counts: dict[str, Any]
) -> None:
    assert call(monkeypatch, tmp_path / "endurance.json", name, **{name: counts}) == 1
    assert endurance.faults(name, counts) == 1
