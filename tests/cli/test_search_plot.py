"""The picture of searches, and `inspect` on several results: what is drawn is what was recorded."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import robustcompress as rc
from robustcompress.search_plot import plot_search, search_records
from tests.cli.conftest import SMALL, Run

EPOCH = {"phase": "search", "hamming": 0.1}
MASK = {"phase": "prune", "event": "mask", "val_clean": 0.5, "val_robust": 0.25, "macs": 1}


@pytest.fixture(scope="module")
def plain(saved: Path) -> rc.CompressResult:
    return rc.load(saved / "none")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the results `hydra`, which looked at itself, and `s2ap`, which did not."""
    from robustcompress.cli import main

    directory = tmp_path_factory.mktemp("searched")
    options = {"hydra": ["diagnose=True"], "s2ap": ["host={'name': 'hydra', 'search': 0.4, 'pretrain': 0.3}"]}
    for name, chosen in options.items():
        words = [word for option in [*chosen] for word in ("--option", option)]
        words += ["--option", "search=0.4", "--option", "pretrain=0.3"] if name == "hydra" else []
        command = ["compress", "resnet8", "--strategy", name, *SMALL, *words, "--epochs", "4", "--batch-size", "128"]
        assert main([*command, "--out", str(directory / name), "--quiet"]) == 0
    return directory


def with_history(result: rc.CompressResult, *records: dict[str, Any]) -> rc.CompressResult:
    return replace(result, history=tuple(records))


def epochs(**values: list[float]) -> list[dict[str, Any]]:
    rows = zip(*values.values(), strict=True)
    return [{**EPOCH, "epoch": i + 1, **dict(zip(values, row, strict=True))} for i, row in enumerate(rows)]


def drawn(figures: list[Any], results: dict[str, rc.CompressResult], path: Path) -> list[Any]:
    """The panels of the picture, as matplotlib's own objects."""
    assert plot_search(results, path) == path and path.is_file()
    return list(figures[-1].axes)


def test_panels_without_data_are_left_out(plain: rc.CompressResult, tmp_path: Path, figures: list[Any]) -> None:
    losses = {"loss_before": [1.0, 0.9], "loss_after": [1.2, 1.1]}
    cases = [
        ([*epochs(hamming=[0.3, 0.1])], 1),
        ([*epochs(hamming=[0.3, 0.1]), MASK], 2),
        ([MASK], 1),
        ([*epochs(**losses), MASK], 3),
        ([*epochs(top_eigenvalue=[5.0, 4.0], sharpness=[0.1, -0.1]), MASK], 4),
        ([*epochs(top_eigenvalue=[5.0, 4.0], sharpness=[0.1, 0.2], mask_clean=[0.5, 0.6], mask_robust=[0.3, 0.4]),
          MASK], 5),
        ([*epochs(top_eigenvalue=[5.0, 4.0], sharpness=[0.1, 0.2], mask_clean=[0.5, 0.6], mask_robust=[0.3, 0.4],
                  **losses), MASK], 6),
    ]  # fmt: skip
    for records, count in cases:
        assert len(drawn(figures, {"a": with_history(plain, *records), "b": plain}, tmp_path / "x.svg")) == count


def test_lines_and_bars_hold_what_was_recorded(plain: rc.CompressResult, tmp_path: Path, figures: list[Any]) -> None:
    results = {
        "a": with_history(plain, *epochs(hamming=[0.3, 0.1, 0.05], top_eigenvalue=[5.0, 40.0, 4.0]), MASK),
        "b": with_history(plain, *epochs(hamming=[0.2, 0.2], top_eigenvalue=[7.0, 3.0]), {**MASK, "val_robust": 0.3}),
    }
    distance, curvature, bars = drawn(figures, results, tmp_path / "x.png")
    assert [list(line.get_xdata()) for line in distance.lines] == [[1, 2, 3], [1, 2]]
    assert [list(line.get_ydata()) for line in distance.lines] == [[30, 10, 5], [20, 20]]
    assert [list(line.get_ydata()) for line in curvature.lines] == [[5, 40, 4], [7, 3]]
    assert curvature.get_yscale() == "log"
    assert [bar.get_height() for bar in bars.patches] == [50, 25, 50, 30]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["a", "b"]
    width, height = struct.unpack(">II", (tmp_path / "x.png").read_bytes()[16:24])
    assert width > height > 300


@pytest.mark.parametrize("values", [[-1.0, 5.0], [-1.0, -2.0], [0.0, 0.0]])
def test_curvature_that_no_logarithm_can_show_is_shown(
    plain: rc.CompressResult, values: list[float], tmp_path: Path, figures: list[Any]
) -> None:
    results = {"a": with_history(plain, *epochs(top_eigenvalue=values))}
    _, curvature = drawn(figures, results, tmp_path / "x.png")
    assert curvature.get_yscale() == "symlog" and list(curvature.lines[0].get_ydata()) == values


def test_refuses_before_drawing(plain: rc.CompressResult, tmp_path: Path) -> None:
    some = {"a": with_history(plain, *epochs(hamming=[0.1]))}
    for results, path, said in (
        ({}, tmp_path / "x.png", "no search to draw in no results"),
        ({"none": plain}, tmp_path / "x.png", "no search to draw in none"),
        (some, tmp_path / "no" / "x.png", "create it first"),
        (some, tmp_path / "x.doc", ".png"),
    ):
        with pytest.raises(rc.InputError, match=said):
            plot_search(results, path)
        assert not path.exists()


def test_inspect_compares_and_draws_searches(run: Run, searched: Path, tmp_path: Path) -> None:
    command = ["inspect", searched / "hydra", searched / "s2ap", "--plot", tmp_path / "search.png"]
    ran = run(*command, "--json")
    assert ran.code == 0, ran.err
    results = {name: rc.load(searched / name) for name in ("hydra", "s2ap")}
    assert ran.document["hamming"]["mean"] == rc.hamming(*results.values()) <= 1
    assert ran.document["hamming"]["names"] == [str(searched / name) for name in results]
    assert ran.document["searches"][str(searched / "hydra")] == search_records(results["hydra"])
    assert ran.document["plot"] == str(tmp_path / "search.png") and (tmp_path / "search.png").stat().st_size > 20_000
    words = run(*command).out
    assert f"{ran.document['hamming']['mean']:.4f}" in words and "drawn at random" in words and "mask PGD-10" in words


def test_inspect_shows_the_search_of_one_result(run: Run, searched: Path) -> None:
    ran = run("inspect", searched / "hydra", "--json")
    assert ran.code == 0 and len(ran.document["search"]) == len(search_records(rc.load(searched / "hydra"))) > 1
    assert "top eigenvalue" in run("inspect", searched / "hydra").out
    assert "search" not in run("inspect", "resnet8", "--json").document


def test_inspect_names_all_that_it_cannot_do(run: Run, searched: Path, saved: Path, tmp_path: Path) -> None:
    ran = run("inspect", "resnet8", searched / "s2ap", searched / "s2ap", "--image-size", "0", "--plot", "x.png")
    assert ran.code == 2
    for said in ("resnet8 holds no result.json", "is named twice", "--image-size 0", "leave them out"):
        assert said in ran.err
    drawn = run("inspect", saved / "none", saved / "grape", "--plot", tmp_path / "x.png")
    assert drawn.code == 2 and "no search to draw in none" in drawn.err
    assert run("inspect", saved / "none", searched / "s2ap").code == 0, "the reference keeps everything"
