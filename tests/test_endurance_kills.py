"""The kill suite runs, counts what it promises, and finds what is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import endurance_jobs, endurance_kills
from robustcompress import STRATEGIES


@pytest.mark.slow
def test_a_quick_run_kills_and_finds_the_ends_identical() -> None:
    counts = endurance_kills.run(quick=True, seed=0)
    assert counts["kills"] == 2 and counts["runs"] == counts["identical"] >= 1
    assert counts["damaged_newest"] == {"runs": 1, "noticed": 1, "identical": 1}


def test_every_strategy_is_killed_by_being_registered() -> None:
    assert endurance_jobs.strategies() == sorted(STRATEGIES)


def test_the_digest_is_of_weights_and_history_without_times(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"weights")
    (out / "history.jsonl").write_text('{"loss": 1.5, "images_per_s": 7}\n')
    first = endurance_jobs.digest(tmp_path)
    (out / "history.jsonl").write_text('{"loss": 1.5, "images_per_s": 9}\n')
    (out / "result.json").write_text("{}")
    assert endurance_jobs.digest(tmp_path) == first
    (out / "history.jsonl").write_text('{"loss": 1.25, "images_per_s": 7}\n')
    assert endurance_jobs.digest(tmp_path) != first
    (out / "history.jsonl").write_text('{"loss": 1.5, "images_per_s": 9}\n')
    (out / "model.safetensors").write_bytes(b"Weights")
    assert endurance_jobs.digest(tmp_path) != first
