"""Grids of runs: declared, run, resumed, failed, and turned into tables and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import compare, compare_plots, compare_report, report
from benchmarks.cells import read_cells, read_failures
from benchmarks.common import ROOT
from benchmarks.grid import EPOCHS, MACS, Grid, read_grid, select
from benchmarks.intervals import estimate
from benchmarks.training_cost import passes, training_cost
from robustcompress.errors import InputError
from robustcompress.recipe import RunRecipe

GRIDS = sorted((ROOT / "benchmarks" / "grids").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "recipe": "recipes/digits.yaml",
    "axes": {"budget": [0.5], "seed": [3, 4]},
    "arms": {
        "none": {"strategy": "none"},
        "grape": {"strategy": "grape"},
        "grape-retrained": {"retrain": "grape"},
        "uniform": {"strategy": "uniform"},
    },
    "baselines": ["none", "uniform"],
    "matched": {"to": "none", "arms": ["uniform"]},
}


def write(directory: Path, value: object, name: str = "small.yaml") -> Path:
    path = directory / name
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def few(place: Path) -> dict[str, Any]:
    """`SMALL` on fewer images."""
    recipe = yaml.safe_load((ROOT / SMALL["recipe"]).read_text())
    data = {"source": recipe["data"], "train_limit": 200, "test_limit": 60}
    return SMALL | {"recipe": str(write(place, recipe | {"data": data}, "few.yaml"))}


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A grid that has run, smoke-sized: its file and its cells."""
    place = tmp_path_factory.mktemp("grid")
    path, out = write(place, few(place)), place / "private" / "cells"
    only = ["--only", "*_s3", "--workers", "1"]
    assert compare.main([str(path), "--quick", "--out", str(out), *only]) == 0
    return path, out


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_committed_grids_can_be_used(path: Path) -> None:
    grid = read_grid(path)
    names = [cell.name for cell in grid.cells]
    assert len(names) == len(set(names))
    for number, cell in enumerate(grid.cells):
        assert set(cell.parents) <= set(names[:number]), f"{cell.name} comes before its parents"
    assert set(grid.baselines) <= set(grid.arms)


@pytest.mark.parametrize("path", [path for path in GRIDS if path.stem.startswith("digits")], ids=lambda path: path.stem)
def test_committed_cells_are_those_that_their_grid_would_run_today(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option that is new anywhere must leave runs from before as they were, and the grid must see that."""
    assert compare.main([str(path), "--minutes", "0"]) == 0
    said = capsys.readouterr().err
    assert "other settings" not in said and not said.startswith("0 of")


def test_the_cells_of_a_grid(tmp_path: Path) -> None:
    grid = read_grid(write(tmp_path, SMALL | {"axes": {"budget": [0.5, 0.25], "seed": [3, 4]}}))
    names = [cell.name for cell in grid.cells]
    assert names[:9] == [
        "none_s3",
        "grape_0.5_s3",
        "grape-retrained_0.5_s3",
        "uniform_0.5_s3",
        "uniform_0.5_matched_s3",
        "grape_0.25_s3",
        "grape-retrained_0.25_s3",
        "uniform_0.25_s3",
        "uniform_0.25_matched_s3",
    ]
    assert len(names) == 18
    by_name = {cell.name: cell for cell in grid.cells}
    assert by_name["grape-retrained_0.25_s4"].parents == ("grape_0.25_s4",)
    assert by_name["uniform_0.5_matched_s3"].parents == ("uniform_0.5_s3", "none_s3")
    assert by_name["uniform_0.5_matched_s3"].account == MACS and by_name["none_s3"].account == EPOCHS
    assert [c.name for c in select(grid.cells, ["grape-retrained_0.5_s4"])] == [
        "grape_0.5_s4",
        "grape-retrained_0.5_s4",
    ]
    with pytest.raises(InputError, match="no cell is called"):
        select(grid.cells, ["grap_0.5_s3"])


def test_every_axis_reaches_the_recipe(tmp_path: Path) -> None:
    models = {"narrow": {"name": "resnet8", "width": 0.5}, "wide": {"name": "resnet8", "width": 2.0}}
    data = {"few": {"source": "digits", "train_limit": 100}, "all": {"source": "digits"}}
    axes = {"model": models, "data": data, "epochs": [1, 3], "budget": [0.5], "seed": [0]}
    grid = read_grid(write(tmp_path, SMALL | {"axes": axes}))
    cells = {cell.name: cell for cell in grid.cells}
    assert len(cells) == 8 * 5
    recipe = grid.recipe(cells["uniform_narrow_few_3_0.5_s0"], {})
    assert recipe.model.kwargs == {"stem_stride": 4, "width": 0.5} and recipe.data == data["few"] and recipe.epochs == 3
    assert cells["none_wide_all_1_s0"].labels == {"model": "wide", "data": "all", "epochs": "1"}
    assert cells["uniform_wide_all_1_0.5_matched_s0"].parents == ("uniform_wide_all_1_0.5_s0", "none_wide_all_1_s0")


def test_recipes_of_dependent_cells(tmp_path: Path) -> None:
    grid = read_grid(write(tmp_path, SMALL))
    cells = {cell.name: cell for cell in grid.cells}
    # Two looks at 5 validation images by PGD-10 do not grow with the epochs: 22 passes of 1 multiply-add each.
    history = [
        {"macs": 1, "steps": 3, "val_robust": 0.5},
        {"macs": 1, "steps": 6},
        {"macs": 1, "steps": 9, "val_robust": 0},
    ]
    finished = {
        "grape_0.5_s3": {"results": {"widths": {"conv1": 8, "layers.0.0.conv1": 20}}},
        "uniform_0.5_s3": {
            "results": {"training": {"macs": 10_000 + 2 * 5 * 22}, "history": history},
            "settings": {
                "training": {"val_images": 500, "batch_size": 64},
                "data": {"val": 5},
                "strategy": {"name": "uniform"},
                "epochs": 20,
            },
        },
        "none_s3": {"results": {"training": {"macs": 24_000 + 2 * 5 * 22}}},
    }
    retrained = grid.recipe(cells["grape-retrained_0.5_s3"], finished)
    assert retrained.strategy.to_json() == {
        "name": "fixed",
        "widths": {"conv1": 8, "layers.0.0.conv1": 20},
        "bypassed": (),
        "inserted": (),
    }
    assert retrained.seed == 3 and retrained.budget.macs == 0.5
    assert grid.recipe(cells["uniform_0.5_matched_s3"], finished).epochs == 48.0


def test_what_is_wrong_with_a_grid_is_said_at_once(tmp_path: Path) -> None:
    wrong = {
        "recipe": "recipes/digits.yaml",
        "axis": {"seed": [0]},
        "axes": {"budgets": [0.5]},
        "arms": {"a": {"strategy": "grape"}, "b": {"retrain": "c"}},
        "baselines": ["nothing"],
    }
    with pytest.raises(InputError) as error:
        read_grid(write(tmp_path, wrong))
    for said in ("'axis'", "'budgets'", "no arm 'c'", "no arm 'nothing'"):
        assert said in str(error.value)
    shapes = {"arms": [1], "axes": {"seed": 3}, "matched": {"arms": ["none"]}}
    for key, said in (("arms", r"arms=\[1\]"), ("axes", "axis 'seed'"), ("matched", "needs 'arms' and 'to'")):
        with pytest.raises(InputError, match=said):
            read_grid(write(tmp_path, SMALL | {key: shapes[key]}))
    for arms in ({"a": {"retrain": "b"}, "b": {"retrain": "a"}}, {"b": {"retrain": "a"}, "a": {"strategy": "grape"}}):
        with pytest.raises(InputError, match="must come before it"):
            read_grid(write(tmp_path, SMALL | {"arms": arms, "baselines": [], "matched": {}}))
    with pytest.raises(InputError, match="did you mean 'grape'"):
        read_grid(
            write(
                tmp_path,
                SMALL
                | {"arms": {"none": {"strategy": "none"}, "a": {"strategy": "graep"}}, "matched": {}, "baselines": []},
            )
        )
    assert compare.main([str(tmp_path / "absent.yaml")]) == 2


def test_a_cell_says_all(small: tuple[Path, Path]) -> None:
    _, out = small
    cells = read_cells(out, [path.stem for path in out.glob("*.json")])
    assert set(cells) == {
        "none_s3",
        "grape_0.5_s3",
        "grape-retrained_0.5_s3",
        "uniform_0.5_s3",
        "uniform_0.5_matched_s3",
    }
    for name, cell in cells.items():
        text = (out / f"{name}.json").read_text()
        assert "private" not in text and str(ROOT) not in text and str(Path.home()) + "/" not in text
        results = cell["results"]
        assert [a["name"] for a in results["report"]["attacks"]] == ["clean", "pgd-20", "autoattack"]
        assert results["meets_budget"] and results["training"]["macs"] > 0 and results["curve"]
        assert cell["seed"] == cell["settings"]["seed"] == 3
        assert len(cell["settings"]["data"]["sha256"]) == 64 and cell["versions"]["torch"]
    grown, again = cells["grape_0.5_s3"]["results"], cells["grape-retrained_0.5_s3"]["results"]
    assert again["widths"] == grown["widths"] and again["after"]["macs"] == grown["after"]["macs"]
    assert not list(out.glob(".state/*")), "nothing is left of a finished run"


def test_finished_cells_are_skipped_and_others_refused(
    small: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, out = small
    before = {p.name: p.read_bytes() for p in out.glob("*.json")}
    again = ["--quick", "--out", str(out), "--only", "*_s3"]
    assert compare.main([str(path), *again]) == 0
    assert "5 of 5 cells are finished, 0 of them ran now" in capsys.readouterr().err
    other = write(tmp_path, SMALL | {"arms": SMALL["arms"] | {"none": {"strategy": "none", "training": {"lr": 0.2}}}})
    assert compare.main([str(other), "--quick", "--out", str(out), "--only", "none_s3"]) == 1
    assert "results with other settings are there: none_s3" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.glob("*.json")} == before


def test_a_failed_cell_is_listed_and_its_children_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"grape": {"strategy": "grape"}, "again": {"retrain": "grape"}}
    value = SMALL | {
        "axes": {"budget": [0.001], "seed": [0]},
        "arms": arms,
        "baselines": [],
        "matched": {},
    }
    path, out = write(tmp_path, value), tmp_path / "cells"
    assert compare.main([str(path), "--quick", "--out", str(out), "--only", "again*"]) == 1
    said = capsys.readouterr().err
    assert "grape_0.001_s0: FAILED: BudgetError" in said and "0 of 2 cells are finished" in said and "1 wait" in said
    assert "cannot be reached" in read_failures(out, ["grape_0.001_s0"])["grape_0.001_s0"]
    assert compare.main([str(path), "--list", "--out", str(out)]) == 0
    assert "grape_0.001_s0: failed: BudgetError" in capsys.readouterr().out


def test_time_limit_begins_no_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, SMALL)
    assert compare.main([str(path), "--quick", "--out", str(tmp_path / "c"), "--minutes", "0"]) == 0
    assert "0 of 10 cells are finished, 0 of them ran now; 10 wait" in capsys.readouterr().err


def test_a_cell_stopped_in_time_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare._Scheduler, "_time_left", lambda self: self.stopped == 0)  # begun, though too late
    path, out = write(tmp_path, SMALL), tmp_path / "cells"
    again = [str(path), "--quick", "--out", str(out), "--only", "uniform_0.5_s3"]
    for _ in range(10):
        assert compare.main([*again, "--minutes", "0.0001"]) == 0
        if "1 of 1 cells are finished" in capsys.readouterr().err:
            break
        assert (out / ".state" / "uniform_0.5_s3").is_dir(), "what was done is kept"
    else:
        raise AssertionError("the cell gets nowhere")
    once = tmp_path / "once"
    assert compare.main([str(path), "--quick", "--out", str(once), "--only", "uniform_0.5_s3"]) == 0
    stopped, whole = (read(place / "uniform_0.5_s3.json")["results"] for place in (out, once))
    assert [a["correct"] for a in stopped["report"]["attacks"]] == [a["correct"] for a in whole["report"]["attacks"]]
    assert stopped["training"]["macs"] == whole["training"]["macs"] and not (out / ".state" / "uniform_0.5_s3").exists()


def test_tables_and_plot(small: tuple[Path, Path], tmp_path: Path) -> None:
    path, out = small
    grid = read_grid(path)
    text = compare_report.summarise(grid, out)
    assert "5 of 10 cells are finished." in text and "Not run: none_s4, grape_0.5_s4" in text
    assert text.count("### At most 0.5 of the reference's MACs") == 2
    assert "| grape-retrained" in text and "autoattack - uniform" in text
    headline = compare_report.headline(grid, out)
    assert "| uniform (matched)" in headline and "5 of 10 cells" in headline
    assert "none_s3" in compare_report.cell_table(grid, out)
    picture = compare_plots.plot_grid(grid, out, tmp_path / "plot.png")
    assert picture is not None and picture.stat().st_size > 20_000
    assert compare_plots.plot_grid(grid, tmp_path, tmp_path / "none.png") is None
    assert "Wilson" in report.grid_page(grid, out)


def test_differences_are_paired_by_seed_and_image(small: tuple[Path, Path]) -> None:
    path, out = small
    grid = read_grid(path)
    cells = read_cells(out, [cell.name for cell in grid.cells])
    rows = compare_report.rows_of(grid, cells)
    grape = compare_report.find(grid, rows, "grape", {"budget": "0.5"}, EPOCHS)
    none = compare_report.find(grid, rows, "none", {"budget": "0.5"}, MACS)
    assert grape is not None and none is not None and none.arm == "none"
    found = grape.against(none, "clean")
    report_a, report_b = (compare_report.report_of(cells[name]) for name in ("grape_0.5_s3", "none_s3"))
    assert found is not None
    assert found.mean == pytest.approx(report_a.clean_accuracy - report_b.clean_accuracy)
    assert not found.significant  # one seed says nothing about training


def test_two_grids_in_one_page_keep_their_own_numbers(small: tuple[Path, Path], tmp_path: Path) -> None:
    path, out = small
    wrong = tmp_path / "other"
    wrong.mkdir()
    for cell in out.glob("*.json"):  # the same cells, all images wrong
        value = read(cell)
        for attack in value["results"]["report"]["attacks"]:
            attack |= {"correct": "0" * attack["n"], "accuracy": 0.0, "low": 0.0}
        (wrong / cell.name).write_text(json.dumps(value))
    grid = read_grid(path)
    right, none = compare_report.headline(grid, out), compare_report.headline(grid, wrong)
    assert right != none
    for _ in range(5):
        assert compare_report.headline(grid, wrong) == none and compare_report.headline(grid, out) == right


def test_seeds_judged_on_more_images_are_compared_on_the_common_ones(small: tuple[Path, Path]) -> None:
    grid, out = read_grid(small[0]), small[1]
    cells = read_cells(out, ["none_s3", "grape_0.5_s3"])
    more = {name.replace("s3", "s4"): json.loads(json.dumps(cell)) for name, cell in cells.items()}
    for cell in more.values():
        cell["seed"] = 4
        attack = cell["results"]["report"]["attacks"][-1]
        attack |= {"correct": "1" * 9, "n": 9, "accuracy": 1.0, "low": 0.0, "high": 1.0}
    rows = compare_report.rows_of(grid, cells | more)
    grape, none = (compare_report.find(grid, rows, arm, {"budget": "0.5"}, EPOCHS) for arm in ("grape", "none"))
    assert grape is not None and none is not None
    found = grape.against(none, "autoattack")
    assert found is not None and found.images == 4 and found.seeds == 2
    assert "on the first 4 (some cells: 9)" in compare_report.setting(list((cells | more).values()))


def test_only_what_is_matched_to_stands_under_both_accounts(small: tuple[Path, Path]) -> None:
    grid, out = read_grid(small[0]), small[1]
    rows = compare_report.rows_of(grid, read_cells(out, [cell.name for cell in grid.cells]))
    assert compare_report.find(grid, rows, "grape", {"budget": "0.5"}, MACS) is None
    none = compare_report.find(grid, rows, "none", {"budget": "0.5"}, MACS)
    assert none is not None and none.account == EPOCHS


def test_intervals() -> None:
    torch.manual_seed(0)
    covered = 0
    for _ in range(300):  # three seeds of 200 images: training noise on each seed's rate, and the images' difficulty
        difficulty = torch.rand(200)
        flags = [(torch.rand(200) < (difficulty + 0.05 * torch.randn(())).clamp(0, 1)) for _ in range(3)]
        found = estimate([f.double() for f in flags])
        covered += found.low <= 0.5 <= found.high
    assert covered / 300 > 0.93
    single = estimate([torch.tensor([1.0, 0.0])])
    assert single.mean == 0.5 and not single.significant and single.points(signed=False) == "50.0"
    sure = estimate([torch.ones(64)] * 3)
    assert sure.mean == sure.high == 1.0 and 0.94 < sure.low < 0.97, "64 of 64 are no certainty"
    alike = estimate([torch.zeros(64)] * 3, low=-1.0)
    assert alike.low == -alike.high and 0.03 < alike.high < 0.06


def test_training_macs_by_hand() -> None:
    history = [
        {"phase": "grow 1/1", "epoch": 1, "steps": 5, "macs": 100, "images_per_s": 1.0},
        {"phase": "grow 1/1", "event": "grow", "scores": {"conv": {}}, "macs": 150.0},
        {"phase": "tail", "epoch": 1, "steps": 4, "macs": 150, "images_per_s": 1.0, "val_robust": 0.5},
        {"phase": "tail", "epoch": 2, "steps": 6, "macs": 150, "images_per_s": 1.0, "awp": 0.005},
    ]
    # 4 attack steps: 11 passes a step, and a tenth for the clean look; PGD-10 and one pass more is 22; AWP is 3 more.
    expected = 5 * 8 * 100 * 11.1 + 16 * 100 * 22 + 4 * 8 * 150 * 11.1 + 7 * 150 * 22 + 2 * 8 * 150 * 14.1
    found = training_cost(history, batch=8, objective={"name": "pgd-at", "steps": 4}, probes=7, scored=16)
    assert found == {"images": 88, "images_per_s": 1.0, "macs": round(expected)}
    assert passes({"name": "trades", "steps": 10}) == 27 and passes({"name": "natural"}) == 3


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_committed_recipes_are_read_and_written(path: Path) -> None:
    recipe = RunRecipe.read(path)
    assert RunRecipe.from_mapping(recipe.to_json()) == recipe and recipe.about


def test_grids_know_their_place(small: tuple[Path, Path]) -> None:
    grid: Grid = read_grid(small[0])
    assert grid.name == "small" and grid.arms == tuple(SMALL["arms"])
