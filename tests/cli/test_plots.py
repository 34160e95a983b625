"""The picture is drawn from any results, and refuses what it cannot draw before it begins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import robustcompress as rc
from robustcompress.plots import _course, _reference_widths, plot_results


def test_draws_results_of_every_kind(saved: Path, tmp_path: Path) -> None:
    results = {name: rc.load(saved / name) for name in ("grape", "none")}
    results["nameless"] = replace(results["grape"], spec=None, report=None, history=())
    plot_results(results, tmp_path / "all.png")
    plot_results({"none": results["none"]}, tmp_path / "one.svg")
    assert (tmp_path / "all.png").stat().st_size > 20_000 and (tmp_path / "one.svg").stat().st_size > 5_000


def test_the_outline_is_the_reference(saved: Path) -> None:
    results = {name: rc.load(saved / name) for name in ("grape", "none")}
    widths = _reference_widths(results)
    assert widths["conv1"] == 16 and widths["layers.2.0.conv2"] == 64
    assert _reference_widths({"a": replace(results["grape"], spec=None)}) == {}


def test_phases_follow_each_other(saved: Path) -> None:
    training, _, events = _course(rc.load(saved / "grape"))
    epochs = [epoch for epoch, _ in training]
    assert epochs == sorted(epochs) and len(epochs) == 5 and len(events) == 5
    assert events[0] == 0 and events[-1] < epochs[-1]


def test_refuses_before_drawing(saved: Path, tmp_path: Path) -> None:
    results = {"grape": rc.load(saved / "grape")}
    for chosen, path, said in (
        ({}, tmp_path / "x.png", "at least one"),
        (results, tmp_path / "no" / "x.png", "create it first"),
        (results, tmp_path / "x.doc", ".png"),
    ):
        with pytest.raises(rc.InputError, match=said):
            plot_results(chosen, path)
