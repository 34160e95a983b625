"""The benchmarks run, write what they promise, and the committed tables are those of the committed figures."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import (
    any_model,
    certified,
    certified_deep,
    common,
    deployment,
    factorised,
    kept_memory,
    latency,
    latency_budget,
    onnx_files,
    overfitting,
    regularisers,
    report,
    search_meta,
    search_policies,
    search_step,
    search_surrogate,
    search_tasks,
    search_tuning,
    structure,
    trace_memory,
    training_step,
)
from robustcompress import StructuralEditor, build_model, calibration, measure
from tests.latency.fake import Clockwork

ROOT = Path(__file__).parents[1]
SCRIPTS = (
    *(structure, trace_memory, training_step, search_step, search_surrogate, search_tuning),
    *(search_tasks, search_meta, certified, certified_deep, regularisers, factorised, kept_memory),
    *(latency, latency_budget, deployment, any_model, onnx_files, overfitting),
)


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def check_record(value: dict[str, Any], module: str) -> None:
    assert value["benchmark"] == module and value["quick"] is True
    assert value["command"].startswith(f"python -m benchmarks.{module} --quick")
    assert value["hardware"]["cpu"] and value["hardware"]["cores"] >= 1 and value["hardware"]["threads"] == 1
    assert torch.__version__.startswith(value["versions"]["torch"])
    assert set(value["code"]) == {"commit", "modified"}


def check_anonymous(path: Path, *private: str) -> None:
    text = path.read_text()
    for secret in (str(Path.home()) + "/", str(ROOT), *private):
        assert secret not in text, f"{path.name} tells {secret!r}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.MODULE)
def test_help_says_what_is_measured(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert str(script.__doc__).splitlines()[0] in said and "example: python -m benchmarks." in said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.MODULE)
def test_quick_runs_never_touch_committed_results(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--out"):
        script.main(["--quick"])


def test_structure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "structure.json"
    assert structure.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "structure")
    check_anonymous(out, str(tmp_path))
    (row,) = value["results"]
    assert row["editable"] == row["groups"] - 1 and row["prune"]["n"] == row["grow"]["n"] == row["editable"]
    assert row["trace"]["median"] > row["graph"]["median"] > 0 and row["forward"]["median"] > 0
    assert structure.markdown(value) in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_trace_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "trace_memory.json"
    assert trace_memory.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "trace_memory")
    check_anonymous(out, str(tmp_path))
    (row,) = value["results"]
    assert row["params"] * 4 < row["bytes"] < row["trace"] < 200 * row["bytes"] and row["forward"] >= 0
    assert trace_memory.markdown(value) in capsys.readouterr().out


def test_overfitting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overfitting.json"
    assert overfitting.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "overfitting")
    check_anonymous(out, str(tmp_path))
    assert [(row["setting"], row["arm"]) for row in value["results"]] == [
        (setting, arm) for setting in ("provoked", "mild") for arm in ("off", "on", "pgd-2")
    ]
    off, on = value["results"][3:5]
    assert off["pgd"] == on["pgd"] and off["clean"] == on["clean"], "where nothing collapses the guard changes nothing"
    assert [len(row["history"]) for row in value["results"]] == [0, 1, 0] * 2
    assert overfitting.markdown(value) in capsys.readouterr().out


@pytest.mark.slow
def test_onnx_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "onnx_files.json"
    assert onnx_files.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "onnx_files")
    check_anonymous(out, str(tmp_path))
    (counted,) = value["results"]["nodes"]
    assert counted["translated"] > counted["exported"] >= counted["onnxruntime"] > 10
    assert all(row["torch"]["largest"] <= 1 and row["pillow"]["largest"] <= 1 for row in value["results"]["resize"])
    assert len(value["results"]["quantized"]) == 7
    said = capsys.readouterr().out
    assert all(onnx_files.markdown(value, section) in said for section in value["results"])


@pytest.mark.slow
def test_certified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kept = tmp_path / "certified.json", tmp_path / "kept"
    assert certified.main(["--quick", "--keep", str(kept), "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "certified")
    check_anonymous(out, str(tmp_path))
    cells = value["results"]["cells"]
    assert [(cell["objective"], cell["strategy"]) for cell in cells] == [
        (objective, strategy)
        for objective in ("smoothing", "ibp", "crown-ibp", "natural")
        for strategy in ("none", "hydra")
    ]
    assert all(cell["ibp"] <= cell["crown-ibp"] <= cell["pgd-20"] <= cell["clean"] for cell in cells[2:])
    assert cells[1]["macs"] <= cells[0]["macs"] / 2
    assert certified.markdown(value) in capsys.readouterr().out
    first = next(iter(kept.iterdir()))
    changed = read(first)
    changed["cell"]["seed"] = 77
    first.write_text(json.dumps(changed))
    assert certified.main(["--quick", "--keep", str(kept), "--out", str(out)]) == 0
    assert 77 in [cell["seed"] for cell in read(out)["results"]["cells"]]  # a kept cell is not made again


@pytest.mark.slow
def test_certified_deep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kept = tmp_path / "certified_deep.json", tmp_path / "kept"
    assert certified_deep.main(["--quick", "--keep", str(kept), "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "certified_deep")
    check_anonymous(out, str(tmp_path))
    cells = value["results"]["cells"]
    assert [cell["arm"] for cell in cells] == list(certified_deep.ARMS)
    assert all(cell["ibp"] <= cell["crown-ibp"] <= cell["pgd-20"] <= cell["clean"] for cell in cells)
    assert certified_deep.markdown(value) in capsys.readouterr().out
    assert len(list(kept.iterdir())) == len(cells)


def test_the_page_on_onnx_files_holds_the_committed_figures() -> None:
    value = read(ROOT / "benchmarks" / "results" / "onnx_files.json")
    page = (ROOT / "docs" / "onnx.md").read_text()
    for section in value["results"]:
        shown = page.split(f"<!-- {section} -->")[1].split(f"<!-- /{section} -->")[0]
        assert shown.strip() == onnx_files.markdown(value, section).strip()


@pytest.mark.slow
def test_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "any_model.json"
    assert any_model.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "any_model")
    check_anonymous(out, str(tmp_path))
    rows = {row["model"]: row for row in value["results"]}
    assert rows.keys() == set(any_model.QUICK)
    for row in rows.values():
        assert row["failures"] == [] and row["half"] and row["peak_mb"] > 50 and "step" not in row
    said = capsys.readouterr().out
    assert any_model.markdown(value) in said and said.startswith("2 networks run, 0 not; 2 traced, 0 refused; 2 cut")
    text = report.pages(tmp_path)[report.MODELS]
    assert any_model.markdown(value) in text


def test_any_model_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def run(name: str, limit: float, seed: int, num_threads: int) -> dict[str, Any]:
        asked.append(name)
        return {"failures": ["export: ended with code -9"] if name.endswith("m1") else []}

    monkeypatch.setattr(any_model, "run", run)
    monkeypatch.setattr(any_model, "parameters_of", lambda name: int(name[-1]) * 10**6)
    argv = ["--out", str(tmp_path / "rows.json"), "--models"]
    assert any_model.main([*argv, "timm:m3", "timm:m2"]) == 0 and asked == ["timm:m2", "timm:m3"]
    assert any_model.main([*argv, "timm:m2", "timm:m1", "timm:m9", "--largest", "8"]) == 1 and asked[2:] == ["timm:m1"]
    rows = {row["model"]: row for row in read(tmp_path / "rows.json")["results"]}
    assert list(rows) == ["timm:m2", "timm:m3", "timm:m1", "timm:m9"]
    assert rows["timm:m9"]["not_run"] == "over 8 M parameters"

    def interrupted(*args: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(any_model, "run", lambda name, *rest: interrupted() if name == "timm:m5" else run(name, *rest))
        any_model.main(["--out", str(tmp_path / "stopped.json"), "--models", "timm:m5", "timm:m4", "timm:m6"])
    stopped = read(tmp_path / "stopped.json")["results"]
    assert [(row["model"], row.get("not_run")) for row in stopped] == [
        ("timm:m4", None),
        *((name, "its turn has not come") for name in ("timm:m5", "timm:m6")),
    ]
    asked.pop()
    assert any_model.main([*argv, "timm:m1"]) == 1 and len(asked) == 3, "a failure stays one until it is run again"
    assert any_model.main([*argv, "timm:m9"]) == 0 and asked[3:] == ["timm:m9"]
    assert any_model.main([*argv, "timm:m2", "--again"]) == 0 and asked[4:] == ["timm:m2"]
    assert len(read(tmp_path / "rows.json")["results"]) == 4


def test_any_model_outlives_a_network_that_does_not_end() -> None:
    row = any_model.run("robustcompress:resnet8", 0.2, 0, 1)
    assert row["failures"] == ["start: not done within 0.2 s"]
    row = any_model.run("benchmarks.conformance:no_such", 60, 0, 1)
    assert row["failures"][0].startswith("build: InputError") and len(row["failures"]) == 1


def test_the_words_of_the_model_table() -> None:
    row = {
        "model": "timm:x",
        "failures": ["law 1: a | b\nc"],
        "half": False,
        "reasons": {"holds the model's output": 1, "nothing reads it": 2, "something | new": 1},
        "no_gradient": ["a", "b"],
    }
    assert list(any_model.words_of(row)) == [
        *("**failed** law 1: a / b c", "half out of reach", "2 read by no layer", "1 something / new"),
        "2 parameters without a gradient",
    ]
    assert common.table(("a", "b", "c"), [("x", "1", "word")], words=1).splitlines()[1:] == [
        "| --- | --: | --- |",
        "| x   |   1 | word |",
    ]


def test_regularisers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regularisers, "OBJECTIVES", {"pgd-at": {}, "pgd-at+boundary": {}})
    out = tmp_path / "regularisers.json"
    assert regularisers.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "regularisers")
    cells = value["results"]["cells"]
    assert [cell["objective"] for cell in cells] == ["pgd-at", "pgd-at+boundary"]
    assert cells[1]["options"]["boundary_weight"] > 0 and cells[0]["report"]["hierarchy"]["name"] == "digits"
    text = regularisers.markdown(value)
    assert "8 test images, 1 seeds (no AutoAttack)" in text and text.count("| pgd-at+boundary") == 2


def test_regularisers_on_photos(tmp_path: Path) -> None:
    classes = json.loads((resources.files("robustcompress.robust") / "hierarchies" / "cifar10.json").read_text())
    for part, each in (("train", 4), ("test", 2)):
        for label, name in enumerate(classes["classes"]):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(each):
                colour = (20 * label, 255 - 20 * label, 60 * number)
                Image.new("RGB", (32, 32), colour).save(folder / f"{number}.png")
    out = tmp_path / "out.json"
    assert regularisers.main(["--quick", "--root", str(tmp_path / "photos"), "--out", str(out)]) == 0
    value = read(out)
    assert (
        value["benchmark"] == regularisers.PHOTOS
        and "benchmarks.regularisers --quick" in value["command"]
        and value["data"]["name"] == "cifar10"
    )
    cells = {cell["objective"]: cell for cell in value["results"]["cells"]}
    assert list(cells) == list(regularisers.ON_PHOTOS)
    assert [cells[name]["options"].get("share") for name in cells] == [None, 1.0, 0.5]
    assert all(cell["options"]["steps"] == 2 for cell in cells.values())
    assert {cell["report"]["hierarchy"]["name"] for cell in cells.values()} == {"cifar10"}
    assert "2 attack steps in training" in regularisers.markdown(value)


@pytest.mark.slow
def test_factorised(tmp_path: Path) -> None:
    out = tmp_path / "factorised.json"
    assert factorised.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "factorised")
    cells = {cell["arm"]: cell for cell in value["results"]["cells"]}
    assert set(cells) == set(factorised.ARMS)
    assert cells["tucker"]["ranks"] == cells["tucker-scratch"]["ranks"] != {}
    assert all(
        0.45 * cells["none"]["macs"] <= cells[arm]["macs"] <= 0.5 * cells["none"]["macs"] for arm in ("tucker", "cp")
    )
    assert [row["variant"] for row in value["results"]["times"]] == ["narrow", "tucker"]


def test_latency_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beside other tests a real stopwatch never comes to rest, and its own tests are elsewhere.
    for place in ("robustcompress.api", "robustcompress.reach", "benchmarks.latency_budget"):
        monkeypatch.setattr(f"{place}.Stopwatch", Clockwork)
    monkeypatch.setattr(calibration, "_known", {})
    out = tmp_path / "latency_budget.json"
    assert latency_budget.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "latency_budget")
    (row,) = value["results"]
    assert row["asked"] == 0.7 and 0 < row["end"] < 1 and 0 < row["again"] < 1 and 0 < row["macs"] < 1
    assert "of the limit" in latency_budget.markdown(value)


def test_search_step(tmp_path: Path) -> None:
    out = tmp_path / "search_step.json"
    assert search_step.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "search_step")
    assert {row["granularity"] for row in value["results"]} == {"channel", "weight"}
    for row in value["results"]:
        times = {kind: row["times"][kind]["median"] for kind in ("train", "hydra", "s2ap", "harp")}
        assert row["s2ap_over_hydra"] == pytest.approx(times["s2ap"] / times["hydra"], rel=1e-2)
        assert all(value > 0 for value in times.values())
    assert "s2ap / hydra" in search_step.markdown(value)


@pytest.mark.slow
def test_search_surrogate(tmp_path: Path) -> None:
    out = tmp_path / "search_surrogate.json"
    assert search_surrogate.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "search_surrogate")
    results = value["results"]
    assert set(results["searchers"]) == {"held-out", "published"} and set(results["stalls"]) == {
        "mutate",
        "restart",
        "none",
    }
    for family in results["searchers"].values():
        for row in family.values():
            assert min(cell["mean"] for cell in row["below"].values()) >= 0
    assert results["dual"]["arms"]["fresh"]["over_fresh"]["mean"] == 0
    assert "Dual level" in search_surrogate.markdown(value)
    assert search_surrogate.plot(value, tmp_path / "p.png").stat().st_size > 10_000


def test_search_tasks_and_what_is_searched_in_them(tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    assert search_tasks.main(["--quick", "--out", str(tables)]) == 0
    (path,) = tables.glob("*.json")
    value = read(path)
    check_record(value, "search_tasks")
    check_anonymous(path, str(tmp_path))
    rows = value["results"]
    looked = [found for found in rows["looks"][0] if found is not None]
    assert len(looked) == 3 and all(0 <= accuracy <= 1 for found in looked for accuracy in found)
    assert sorted(set(rows["configs"])) == list(range(len(rows["networks"])))
    assert search_tasks.main(["--quick", "--out", str(tables)]) == 0
    assert sum(found is not None for found in read(path)["results"]["looks"][0]) == 6, "it goes on"
    with pytest.raises(SystemExit, match="no table that is whole"):
        search_meta.main(["--quick", "--tables", str(tables), "--out", str(tmp_path / "meta.json")])


@pytest.mark.slow
def test_search_meta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_policies, "STEPS", 5)
    monkeypatch.setattr(search_meta, "CURVE", 21)
    out = tmp_path / "search_meta.json"
    assert search_meta.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "search_meta")
    results = value["results"]
    assert set(results["arms"]) == {
        *(f"{axis}/{arm}" for axis in ("network", "all") for arm in (*search_meta.TRAINED, "known")),
        *search_meta.UNTRAINED,
        "network/pretrained",
    }
    for row in results["arms"].values():
        assert len(row["mean"]) == search_meta.CURVE and row["below"]["n"] <= results["teachers"]
    meta, fresh = (results["arms"][arm]["below"]["mean"] for arm in ("all/meta", "fresh"))
    assert results["arms"]["all/meta"]["over"]["fresh"]["mean"] == pytest.approx(fresh - meta, abs=2e-4)
    assert "By what is held out" in search_meta.markdown(value)
    assert search_meta.plot(value, tmp_path / "p.png").stat().st_size > 10_000


def test_search_tuning(tmp_path: Path) -> None:
    out = tmp_path / "search_tuning.json"
    assert search_tuning.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "search_tuning")
    assert len(value["results"]) == 2 * len(search_tuning.GRIDS)
    assert "above the default" in search_tuning.markdown(value)


def test_training_step(tmp_path: Path) -> None:
    out = tmp_path / "training_step.json"
    assert training_step.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "training_step")
    assert len(value["data"]["sha256"]) == 64
    assert [(row["batch_size"], row["attack_steps"]) for row in value["results"]] == [(4, 1), (8, 2)]
    for row in value["results"]:
        assert row["efficiency"] == pytest.approx(row["bare_s"] / row["ours_s"], rel=1e-3)
        times = row["times"]
        assert times["bare"]["n"] == times["public"]["n"] == times["ours"]["n"] + times["ours_looking"]["n"] == 3


def test_training_step_keeps_the_rows_of_other_cells(tmp_path: Path) -> None:
    out = tmp_path / "training_step.json"
    first = ["--batch-size", "2", "--attack-steps", "1", "--steps", "2", "--out", str(out)]
    assert training_step.main(["--models", "resnet8@0.25:2:1", "resnet8@0.25:2:2", *first]) == 0
    old = {row["attack_steps"]: row for row in read(out)["results"]}
    assert training_step.main(["--models", "resnet8@0.25:2:1", "--keep", *first[:-3], "3", "--out", str(out)]) == 0
    again, kept = read(out)["results"]
    assert kept == old[2] and again["times"]["bare"]["n"] == 3 != old[1]["times"]["bare"]["n"]
    text = training_step.markdown(read(out))
    assert text.count("rows kept from") == 1 and f"`{kept['command']}`" in text


def test_kept_memory(tmp_path: Path) -> None:
    out = tmp_path / "kept_memory.json"
    assert kept_memory.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "kept_memory")
    assert [row["what"] for row in value["results"]] == ["train", "evaluate"]
    for row in value["results"]:
        assert row["speed_up"] == pytest.approx(row["given back"]["seconds"] / row["kept"]["seconds"], rel=1e-3)
        assert all(row[way]["peak"] > 50e6 and 0 <= row[way]["system"] < 1 for way in kept_memory.WAYS)
    assert kept_memory.markdown(value).count("resnet8@0.25") == 2


def test_training_step_reads_which_cells_are_wanted() -> None:
    found = training_step.cells(["resnet8", "resnet18@0.25:64", "resnet18:512:1"], 128, 10)
    assert found == [("resnet8", 128, 10), ("resnet18@0.25", 64, 10), ("resnet18", 512, 1)]
    for wrong in ("resnet18:0", "resnet18:a", "resnet18:1:2:3", "resnet18:"):
        with pytest.raises(SystemExit, match=wrong):
            training_step.cells([wrong], 128, 10)


def test_the_bare_step_makes_the_passes_of_ours_and_no_others() -> None:
    counts = {"forward": 0, "to_weights": 0}
    model, _ = build_model("resnet8")
    model.register_forward_hook(lambda *_: counts.update(forward=counts["forward"] + 1))
    weight = next(p for p in model.parameters() if p.dim() == 4)
    weight.register_hook(lambda _: counts.update(to_weights=counts["to_weights"] + 1))
    training_step.BareStep(model, 3, 4, 0)()
    assert counts == {"forward": 4, "to_weights": 1}
    training_step.PublicStep(model, 3, 4, 0)()
    assert counts == {"forward": 8, "to_weights": 1 + 4}


def test_latency(tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    assert latency.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "latency")
    check_anonymous(out, str(tmp_path))
    dense, compact, zeros = value["results"]
    assert dense["macs_ratio"] == 1.0 and compact["macs_ratio"] <= 0.5
    assert compact["params"] < dense["params"] == zeros["params"]
    assert zeros["macs_ratio"] == pytest.approx(0.1, abs=0.01)
    assert set(dense["latency"]) == {"1", "8"}


@pytest.mark.slow
def test_deployment(tmp_path: Path) -> None:
    out = tmp_path / "deployment.json"
    assert deployment.main(["--quick", "--out", str(out)]) == 0
    value = read(out)
    check_record(value, "deployment")
    check_anonymous(out, str(tmp_path))
    (network,) = value["results"]
    rows = {row["variant"]: row for row in network["rows"]}
    assert rows["dense"]["ratio"] == 1.0 and rows["dense"]["macs_ratio"] == 1.0
    assert 1 > rows["0.5 of the MACs"]["macs_ratio"] >= rows["0.25 of the MACs"]["macs_ratio"]  # 16 is wide for it
    assert rows["90 % zeros"]["zeros"] > 0.85 and rows["90 % zeros"]["macs_ratio"] == pytest.approx(0.1)
    assert network["round_to"] in (8, 16) and set(network["gain_kept_by_multiple"]) == {"8", "16"}
    assert "gain kept" in deployment.markdown(value)


def test_compact_variants_keep_their_fraction_and_rounding() -> None:
    model, _ = build_model("resnet8")
    compact = latency.compacted(model, 0.5, 8)
    example = torch.zeros(1, 3, 32, 32)
    assert 0.3 < measure(compact, example).macs / measure(model, example).macs <= 0.5
    convolutions = [m for m in compact.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.out_channels % 8 == 0 for m in convolutions)
    assert StructuralEditor(compact, torch.zeros(2, 3, 32, 32)).widths.keys()


def test_a_killed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results" / "value.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write_json(path, {"ratio": float("nan")})
    assert not path.exists()
    common.write_json(path, {"ratio": 1.0})
    assert [entry.name for entry in path.parent.iterdir()] == ["value.json"] and read(path) == {"ratio": 1.0}


def test_command_lines_tell_no_place() -> None:
    words = ["--data", "/home/someone/cifar10", "--out=~/x/y", "--models", "torchvision:resnet18", "data/cifar10"]
    assert common.command("structure", words) == (
        "python -m benchmarks.structure --data cifar10 --out=y --models torchvision:resnet18 data/cifar10"
    )


def test_interleaving_gives_every_function_every_place() -> None:
    order: list[str] = []
    seconds = common.interleaved({k: lambda k=k: order.append(k) for k in "abc"}, 3)
    assert {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert sorted("".join(order[3:][i::3]) for i in range(3)) == ["abc", "bca", "cab"]


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with common.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_runs_as_a_command(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    command = [sys.executable, "-m", "benchmarks.structure", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert read(out)["benchmark"] == "structure" and "| resnet8" in done.stdout


def test_tables_are_filled_between_markers() -> None:
    text = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n"
    assert report.fill(text, "x", r"new \1") == "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match="0 pairs"):
        report.fill(text, "y", "new")


def test_the_report_reads_what_the_scripts_write(tmp_path: Path) -> None:
    structure.main(["--quick", "--out", str(tmp_path / "structure.json")])
    text = report.pages(tmp_path)[report.README]
    assert structure.markdown(read(tmp_path / "structure.json")) in text


def test_committed_tables_are_those_of_the_committed_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, f"{capsys.readouterr().out}run `python -m benchmarks.report`"


@pytest.mark.parametrize("path", sorted(common.RESULTS.rglob("*.json")), ids=lambda p: p.name)
def test_committed_results_tell_no_place(path: Path) -> None:
    value = read(path)
    assert not value.get("quick")
    check_anonymous(path, socket.gethostname() + "/", "/tmp/", "/home/", "/root/")


def test_positive_is_positive() -> None:
    assert common.positive("3") == 3
    with pytest.raises(argparse.ArgumentTypeError):
        common.positive("0")
