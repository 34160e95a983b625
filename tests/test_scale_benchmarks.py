"""The benchmarks of training at scale run, and their arithmetic is what they say it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import distributed_step, streaming
from benchmarks.distributed_step import communication, exchanged, fit, memory, modelled, on_paper

SCRIPTS = (streaming, distributed_step)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.MODULE)
def test_help_and_quick_runs_are_as_for_all_benchmarks(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0 and "example: python -m benchmarks." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--out"):
        script.main(["--quick"])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.MODULE)
def test_quick_runs(script: Any, tmp_path: Path) -> None:
    out = tmp_path / f"{script.MODULE}.json"
    assert script.main(["--quick", "--out", str(out)]) == 0
    value: dict[str, Any] = json.loads(out.read_text())
    assert value["benchmark"] == script.MODULE and value["quick"] is True and str(tmp_path) not in out.read_text()
    assert script.plot(value, tmp_path / "p.png").stat().st_size > 10_000
    if script is distributed_step:
        for row in value["results"]["cells"]:
            assert row["predicted_s"] == pytest.approx(row["side_by_side_s"] + row["communication_s"])
    else:
        assert {row["way"] for row in value["results"]["speed"]} >= {"threads, files, 2", "processes, files, 2"}
        assert all(row["images_per_s"] > 0 for row in value["results"]["speed"])


def ring(world: int, sizes: list[int], *, turn: float, rate: float) -> float:
    """A ring all-reduce played out: every turn each process sends one part of the tensor to the next one."""
    seconds = 0.0
    for size in sizes:
        seconds += turn  # as the model has it: once a tensor
        held = [[{rank} for _ in range(world)] for rank in range(world)]  # whose summands each has of each part
        for step in range(2 * (world - 1)):
            sent = [(rank, (rank - step) % world) for rank in range(world)]
            moved = [(rank, part, set(held[rank][part])) for rank, part in sent]
            for rank, part, whose in moved:
                held[(rank + 1) % world][part] |= whose
            seconds += size / world / rate
        assert all(whose == set(range(world)) for parts in held for whose in parts), "everyone has the whole sum"
    return seconds


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_exchange_is_that_of_a_ring(world: int) -> None:
    sizes = [1 << 20, 12]
    expected = ring(world, sizes, turn=1e-3, rate=1e9)
    assert communication(sizes, world, latency=1e-3, rate=1e9) == pytest.approx(expected)


def test_what_is_sent_and_stored_is_counted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 700, 3), nn.BatchNorm2d(700), nn.Flatten(), nn.Linear(700 * 4, 3000))
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    sent = exchanged(parameters, buffers)
    assert sum(sent) == 4 * (parameters + buffers) + 12 and sent[0] == 1 << 20 and max(sent) <= 25 << 20
    found = memory(parameters, buffers, 10, pixels=16)
    assert found["gradients"] == sum(p.element_size() * p.numel() for p in model.parameters())
    assert found["images"] == 2 * torch.zeros(10, 3, 4, 4).numel() * 4
    assert found["together"] == sum(size for name, size in found.items() if name != "together")
    assert exchanged(5, 0) == [20, 12]


def test_the_line_is_found_again() -> None:
    points = [(size, 2e-3 + size / 5e8) for size in (1 << 24, 1 << 16, 1 << 22)] + [(4, 2e-3)]
    line = fit(points)
    assert line["latency_s"] == pytest.approx(2e-3) and line["bytes_per_s"] == pytest.approx(5e8)
    row = {"parameters": 10**6, "buffers": 0, "side_by_side_s": 1.0, "together_s": 1.05, "alone_s": 1.8}
    found = modelled(row | {"batch_size": 8}, line)
    assert found["communication_s"] == pytest.approx(3 * 2e-3 + (4e6 + 12) / 5e8)
    assert found["error"] == pytest.approx((1 + found["communication_s"]) / 1.05 - 1)


def test_what_is_on_paper_follows_from_what_is_assumed() -> None:
    rows = on_paper(distributed_step.PAPER)
    assert [row["gpus"] for row in rows] == [1, 8, 64]
    assert rows[0]["efficiency"] == 1.0 and rows[0]["step_s"] == pytest.approx(256 * 5 / 2500)
    assert 1 > rows[1]["efficiency"] > rows[2]["efficiency"] > 0.5
    slow = on_paper(distributed_step.PAPER | {"network_bytes_per_s": 1.25e9})
    assert slow[2]["step_s"] > rows[2]["step_s"] and slow[1]["step_s"] == rows[1]["step_s"]
