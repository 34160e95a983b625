"""Every command through `main`, with settings as small as they go."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import robustcompress as rc
from robustcompress.cli import main
from robustcompress.commands import COMMANDS
from tests.cli.conftest import SMALL, Run

ATTACK = ["--data", "digits", "--test-limit", "40", "--attacks", "clean,pgd-2"]


@pytest.mark.parametrize("command", [None, *(command.NAME for command in COMMANDS)])
def test_help_holds_an_example_and_the_exit_codes(run: Run, command: str | None) -> None:
    ran = run(*([command] if command else []), "--help")
    assert ran.code == 0
    assert re.search(rf"examples:\n  robustcompress {command or ''}", ran.out)
    assert "exit codes:" in ran.out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.NAME)
def test_the_examples_of_help_are_accepted(command: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustcompress.cli import build_parser

    lines = [shlex.split(line, comments=True) for line in command.EXAMPLES.splitlines()[1:]]  # type: ignore[attr-defined]
    assert lines
    for line in lines:
        assert line[0] == "robustcompress"
        assert build_parser().parse_args(line[1:]).command is command


def test_compress_saves_what_it_says(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "result"
    options = ["--strategy", "grape", "--option", "order=uniform", "--option", "events=2", "--max-macs", "2e6"]
    ran = run("compress", "resnet8", *SMALL, *options, "--seed", "3", "--out", out, "--json")
    assert ran.code == 0, ran.err
    document, result = ran.document, rc.load(out)
    assert document["meets_budget"] and result.after.macs == document["after"]["macs"] <= 2e6
    assert document["budget"] == {"max_macs": 2e6} and document["out"] == str(out)
    assert result.strategy["order"] == "uniform" and result.strategy["events"] == 2
    assert result.threat == rc.ThreatModel("linf", 0.1) and result.seed == 3
    assert result.settings["epochs"] == 0.4 and result.settings["objective"]["steps"] == 1
    assert [attack["name"] for attack in document["report"]["attacks"]] == ["clean", "pgd-2"]
    assert "grape" in ran.err  # progress goes to standard error


def test_compress_without_out_says_that_nothing_is_saved(run: Run, tmp_path: Path) -> None:
    ran = run("compress", "resnet8", *SMALL, "--strategy", "none", "--quiet")
    assert ran.code == 0 and "nothing was saved" in ran.out and ran.err == ""


def test_weights_are_perturbed_where_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    out, options = tmp_path / "result", ["--strategy", "s2ap", "--option", "host=hydra", "--option", "finetune_awp=0"]
    ran = run("compress", "resnet8", *SMALL, *options, "--awp", "0.01", "--awp-warmup", "0.2", "--out", out, "--quiet")
    assert ran.code == 0, ran.err
    result = rc.load(out)
    assert result.strategy["host"] == rc.Hydra().to_json()
    assert result.settings["recipe"]["awp"] == 0.01 and result.settings["recipe"]["awp_warmup"] == 0.2
    assert [r["awp"] for r in result.history if r["phase"] == "finetune" and "epoch" in r] == [0.01]


def test_the_seed_decides_the_first_weights(run: Run) -> None:
    def losses(seed: int) -> list[str]:
        torch.rand(seed + 1)  # whatever was drawn before must not matter
        ran = run("compress", "resnet8", *SMALL, "--strategy", "none", "--seed", seed)
        return re.findall(r"loss \d+\.\d+", ran.err)

    first = losses(0)
    assert first and losses(0) == first != losses(1)


def test_a_factory_of_ones_own_is_remembered_but_not_imported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_models.py").write_text(
        "import robustcompress.models as m\n"
        "def net(depth=8, width=1.0):\n"
        "    return m.resnet8(num_classes=10, stem_stride=2, width=width)\n"
    )
    monkeypatch.chdir(tmp_path)
    weights = rc.build_model("resnet8", stem_stride=2)[0].state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "w.safetensors")
    small = [*SMALL[2:], "--model-arg", "width=1.0", "--pretrained-weights", "w.safetensors"]
    ran = run("compress", "my_models:net", *small, "--strategy", "magnitude", "--out", "result", "--json", "--quiet")
    assert ran.code == 0, ran.err
    assert ran.document["model"] == {"name": "my_models:net", "kwargs": {"width": 1.0}}
    assert ran.document["settings"]["pretrained"] is True
    sys.modules.pop("my_models", None)
    refused = run("evaluate", "result", *ATTACK)
    assert refused.code == 2 and "--model" in refused.err and "my_models" not in sys.modules
    trusted = run("evaluate", "result", *ATTACK, "--model", "my_models:net", "--json")
    assert trusted.code == 0, trusted.err


def test_evaluate_repeats_and_replaces_the_report(run: Run, grape: Path) -> None:
    before = rc.load(grape)
    ran = run("evaluate", grape, "--attacks", "clean,pgd-3", "--images", "50", "--save", "--json")
    assert ran.code == 0, ran.err
    after = rc.load(grape)
    assert after.report is not None and ran.document["report"] == after.report.to_json() and ran.document["saved"]
    assert [result.name for result in after.report.attacks] == ["clean", "pgd-3"] and after.report.n == 50
    assert after.after == before.after and after.edits == before.edits
    assert {path.name for path in grape.iterdir()} == {
        *("result.json", "model.safetensors", "history.jsonl", "recipe.yaml")
    }


def test_evaluate_compares_on_the_same_images(run: Run, saved: Path) -> None:
    ran = run("evaluate", saved / "grape", "--compare", saved / "none", *ATTACK, "--json")
    assert ran.code == 0, ran.err
    document = ran.document
    a, b = document["report"], document["compared_with"]["report"]
    assert a["images_sha256"] == b["images_sha256"]
    for index, name in enumerate(("clean", "pgd-2")):
        wanted = a["attacks"][index]["accuracy"] - b["attacks"][index]["accuracy"]
        assert document["differences"][name]["difference"] == pytest.approx(wanted)
    words = run("evaluate", saved / "grape", "--compare", saved / "none", *ATTACK)
    assert "difference" in words.out and "minus" in words.out


def test_evaluate_says_how_severe_mistakes_are(run: Run, grape: Path, tmp_path: Path) -> None:
    ran = run("evaluate", grape, *ATTACK, "--hierarchy", "digits", "--save")
    assert ran.code == 0 and "mean distance of mistakes in 'digits' (a class at random: 2.20): clean" in ran.out
    report = rc.load(grape).report
    assert report is not None and report.hierarchy is not None and report.mistakes()
    severity = report.result("pgd-2").severity
    assert severity is not None and severity.errors == int((~report.result("pgd-2").correct).sum())
    page = run("report", grape, "-o", tmp_path / "page.html")
    assert page.code == 0 and "mean distance of mistakes" in (tmp_path / "page.html").read_text()
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps({"classes": ["a", "b"], "tree": {"a": None, "b": None}}))
    refused = run("evaluate", grape, *ATTACK, "--hierarchy", tree)
    assert refused.code == 2 and "does not know '0', '1'" in refused.err
    assert run("evaluate", grape, *ATTACK, "--hierarchy", "digit").code == 2
    file = run("evaluate", tmp_path / "m.onnx", "--hierarchy", "digits")
    assert file.code == 2 and "--hierarchy" in file.err


def test_an_objective_with_penalties_is_trained(run: Run) -> None:
    options = ["--objective", "trades+jacobian+boundary", "--objective-option", "jacobian_weight=0.1"]
    ran = run("compress", "resnet8", *SMALL, "--strategy", "none", *options, "--json", "--quiet")
    assert ran.code == 0, ran.err
    objective = ran.document["settings"]["objective"]
    assert objective["name"] == "trades+jacobian+boundary" and objective["jacobian_weight"] == 0.1
    wrong = run("compress", "resnet8", *SMALL, "--objective", "pgd-at+jacobi")
    assert wrong.code == 2 and "did you mean 'jacobian'" in wrong.err


def test_autoattack_goes_on_from_its_cache(run: Run, grape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import robustcompress.robust.chunks as chunks

    calls: list[tuple[str, int]] = []

    def quick(judge, which, name, num_classes, config):  # type: ignore[no-untyped-def]
        from robustcompress.robust import AttackResult

        calls.append((name, len(which)))
        return AttackResult(name=name, correct=torch.ones(len(which), dtype=torch.bool), seconds=1.0)

    monkeypatch.setattr(chunks, "_attack_chunk", quick)
    command = ["evaluate", grape, "--data", "digits", "--attacks", "clean,autoattack", "--autoattack-images", "all"]
    command += ["--device", "cpu"]
    first = run(*command, "--json")
    assert first.code == 0, first.err
    right = round(first.document["report"]["clean_accuracy"] * first.document["report"]["n"])
    sizes = [64] * (right // 64) + [right % 64] * (right % 64 > 0)
    assert calls == [(name, size) for name in chunks.suite_for(10).attacks for size in sizes]
    assert any((grape / ".autoattack").iterdir())
    assert run(*command, "--json").document["report"]["robust_accuracy"] == first.document["report"]["robust_accuracy"]
    assert len(calls) == 4 * len(sizes)


def test_export_compares_on_test_images(run: Run, grape: Path) -> None:
    ran = run("export", "--onnx", grape, "--json")
    assert ran.code == 0, ran.err
    assert (grape / "model.onnx").stat().st_size == ran.document["bytes"]
    assert {check["name"] for check in ran.document["parity"]} == {"clean", "adversarial"}
    again = run("export", "--onnx", grape)
    assert again.code == 2 and "--overwrite" in again.err


def test_export_says_when_it_compared_on_random_images(run: Run, grape: Path) -> None:
    path = grape / "result.json"
    record = json.loads(path.read_text())
    record["data"]["name"] = "photos"
    path.write_text(json.dumps(record))
    ran = run("export", "--onnx", grape, "-o", grape / "x.onnx")
    assert ran.code == 0 and "random images" in ran.out and "--data photos" in ran.out
    needed = run("evaluate", grape)
    assert needed.code == 2 and "--data photos" in needed.err


def test_inspect_counts_what_a_channel_costs(run: Run) -> None:
    ran = run("inspect", "resnet8", "--model-arg", "stem_stride=2", "--json")
    assert ran.code == 0, ran.err
    groups = {group["name"]: group for group in ran.document["groups"]}
    # One channel of the first block's inner convolution: 16*9 weights in, 16*9 out, and 2 of the batch norm.
    assert groups["layers.0.0.conv1"]["params_per_channel"] == 16 * 9 + 16 * 9 + 2
    assert not groups["fc"]["editable"] and groups["fc"]["reason"]
    assert ran.document["cost"]["params"] == 78042
    words = run("inspect", "resnet8", "--model-arg", "stem_stride=2")
    assert "layers.0.0.conv1" in words.out and "groups can be edited" in words.out


def test_inspect_reads_a_saved_result(run: Run, saved: Path) -> None:
    ran = run("inspect", saved / "grape", "--json")
    assert ran.code == 0, ran.err
    assert ran.document["cost"]["macs"] == rc.load(saved / "grape").after.macs
    assert ran.document["before"] == rc.load(saved / "grape").before.to_json()


def test_inspect_shows_a_result_beside_its_reference(run: Run, saved: Path, tmp_path: Path) -> None:
    picture = tmp_path / "widths.png"
    ran = run("inspect", saved / "grape", "--plot", picture, "--json")
    assert ran.code == 0, ran.err
    assert ran.document["plot"] == str(picture) and picture.stat().st_size > 15_000
    result, found = rc.load(saved / "grape"), {group["name"]: group for group in ran.document["groups"]}
    assert result.spec is not None
    # Read from the layers themselves: a convolution has as many rows as its group has channels.
    reference, compact = result.spec.build(), result.model
    for name, group in found.items():
        assert group["before"] == len(reference.get_parameter(f"{name}.weight"))
        assert group["width"] == len(compact.get_parameter(f"{name}.weight"))
    assert any(group["before"] != group["width"] for group in found.values())
    words = run("inspect", saved / "grape").out
    assert "before" in words and "the reference has" in words
    assert "before" not in run("inspect", "resnet8").out


def test_inspect_draws_a_model_or_says_why_not(run: Run, tmp_path: Path) -> None:
    ran = run("inspect", "resnet8", "--plot", tmp_path / "x.svg")
    assert ran.code == 0 and f"drawn in {tmp_path / 'x.svg'}" in ran.out
    assert "resnet8" in (tmp_path / "x.svg").read_text()
    for path, said in ((tmp_path / "no" / "x.png", "create it first"), (tmp_path / "x.doc", ".png")):
        refused = run("inspect", "resnet8", "--plot", path)
        assert refused.code == 2 and said in refused.err and not path.exists()


def test_inspect_takes_the_size_that_a_network_was_made_for(run: Run) -> None:
    assert run("inspect", "resnet8", "--json").document["image_shape"] == [3, 32, 32]
    given = run("inspect", "torchvision:squeezenet1_1", "--image-size", "64", "--json")
    assert given.document["image_shape"] == [3, 64, 64]
    assert "images 3x224x224" in run("inspect", "torchvision:squeezenet1_1").out
    refused = run("inspect", "torchvision:vit_b_16", "--image-size", "32")
    assert refused.code == 2 and "image_size=32" in refused.err and "224x224" in refused.err


def test_the_networks_of_timm_are_listed_where_asked_for(run: Run) -> None:
    pytest.importorskip("timm")
    entries = run("list", "timm", "--json").document["timm"]
    assert {"timm:resnet26", "timm:vit_tiny_patch16_224"} <= {entry["name"] for entry in entries}
    models = {entry["name"] for entry in run("list", "models", "--json").document["models"]}
    assert "timm:NAME" in models and "timm:resnet26" not in models


@pytest.mark.parametrize("what", [None, "models", "strategies", "data", "attacks", "objectives"])
def test_list_names_what_exists(run: Run, what: str | None) -> None:
    words = [what] if what else []
    document = run("list", *words, "--json").document
    assert list(document) == (words or ["models", "strategies", "data", "attacks", "objectives"])
    text = run("list", *words).out
    for entries in document.values():
        for entry in entries:
            assert entry["name"] in text and entry["summary"]
    if what == "strategies":
        assert {entry["name"] for entry in document[what]} == set(rc.STRATEGIES)
    if what == "models":
        assert set(rc.list_models()) < {entry["name"] for entry in document[what]}
    if what == "attacks":
        from robustcompress.robust import attack_by_name, objective_from_name

        assert [attack_by_name(entry["name"]).name for entry in document[what]] == [e["name"] for e in document[what]]
        objectives = run("list", "objectives", "--json").document["objectives"]
        for entry in objectives:
            given = {name: "digits" for name, value in entry["options"].items() if value == "(needed)"}
            assert objective_from_name(entry["name"], **given).to_json()["name"] == entry["name"]
        assert {"semantic-at", "pgd-at+jacobian"} < {entry["name"] for entry in objectives}


def test_the_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "robustcompress", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip() == f"robustcompress {rc.__version__}"


def test_main_reads_the_process_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["robustcompress", "list", "data", "--json"])
    assert main() == 0
    assert "digits" in capsys.readouterr().out


def test_compress_goes_on_from_its_checkpoint(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustcompress.session import Session

    out, directory = tmp_path / "out", tmp_path / "checkpoint"
    command = ["compress", "resnet8", *SMALL, "--strategy", "magnitude", "--seed", "3", "--json", "--quiet"]
    whole = run(*command)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "recalibrate", interrupted)  # after the cut
        assert run(*command, "--checkpoint", directory, "--out", out).code == 130
    assert directory.is_dir() and not out.exists()
    changed = run(*command, "--checkpoint", directory, "--lr", "0.05")
    assert changed.code == 2 and "recipe: " in changed.err
    resumed = run(*command, "--checkpoint", directory, "--out", out)
    assert resumed.code == 0 and not directory.exists()
    assert resumed.document["edits"] == whole.document["edits"]
    accuracies = [[a["accuracy"] for a in ran.document["report"]["attacks"]] for ran in (whole, resumed)]
    assert accuracies[0] == accuracies[1]
    assert rc.load(out).model is not None
