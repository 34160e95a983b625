"""Each kind of failure has its own exit code, one message, and no traceback; bugs keep theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robustcompress.errors import ParityError, RobustCompressError
from tests.cli.conftest import SMALL, Run


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    import robustcompress.session

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(robustcompress.session, "train", refuse)


BAD_COMPRESS = {
    "strategy": (["--strategy", "grap"], "grape"),
    "option": (["--option", "ordr=random"], "order"),
    "option value": (["--option", "order=rndom"], "random"),
    "model argument": (["--model-arg", "widht=2"], "width"),
    "data": (["--data", "cifar11"], "cifar10"),
    "data not there": (["--data", "cifar10", "--root", "nowhere"], "--download"),
    "eps": (["--eps", "8"], "8/255"),
    "negative eps": (["--eps", "-0.1"], "positive"),
    "norm": (["--norm", "l1"], "l2"),
    "objective": (["--objective", "trade"], "trades"),
    "objective without steps": (["--objective", "natural"], "steps"),
    "objective option": (["--objective", "trades", "--objective-option", "betta=1"], "beta"),
    "objective option's value": (["--objective", "trades", "--objective-option", "beta=-1"], "beta=-1"),
    "training option": (["--training-option", "weight_decai=1"], "weight_decay"),
    "training option's value": (["--training-option", "optimizer=sgdd"], "sgd"),
    "epochs": (["--epochs", "0"], "epochs"),
    "learning rate": (["--lr", "-1"], "lr"),
    "batch size": (["--batch-size", "0"], "batch_size"),
    "perturbation": (["--awp", "2"], "awp=2.0"),
    "perturbation's start": (["--awp-warmup", "-1"], "awp_warmup=-1.0"),
    "attack": (["--attacks", "clean,pdg-20"], "pgd-20"),
    "device": (["--device", "quantum"], "auto"),
    "fraction": (["--macs", "50"], "0.5"),
    "parent of out": (["--out", "/dev/null/out"], "/dev/null is no directory"),
    "weights": (["--pretrained-weights", "none.safetensors"], "none.safetensors"),
    "limit": (["--train-limit", "3"], "at least 20"),
}


@pytest.mark.parametrize(("words", "said"), BAD_COMPRESS.values(), ids=BAD_COMPRESS.keys())
def test_bad_input_is_2(
    run: Run, words: list[str], said: str, no_training: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("compress", "resnet8", *SMALL, *words)
    assert ran.code == 2
    assert "error: " in ran.err and said in ran.err and "Traceback" not in ran.err
    assert ran.out == "" and not list(tmp_path.iterdir())


def test_all_problems_are_said_at_once(run: Run, no_training: None) -> None:
    ran = run("compress", "resnet9", *SMALL, "--strategy", "hydr", "--eps", "8", "--data", "cifar11", "--json")
    assert ran.code == 2
    for said in ("hydra", "8/255", "cifar10", "resnet8"):
        assert said in ran.err
    document = ran.document
    assert document["exit_code"] == 2 and document["error"]["kind"] == "InputError"
    assert document["error"]["message"] in ran.err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["compres"],
        ["compress"],
        ["compress", "resnet8", "--epochs", "many"],
        ["compress", "resnet8", "--option", "x"],
    ],
    ids=["nothing", "command", "no model", "type", "assignment"],
)
def test_wrong_usage_is_2(run: Run, words: list[str]) -> None:
    ran = run(*words)
    assert ran.code == 2 and "usage:" in ran.err


@pytest.mark.parametrize("words", [["--macs", "1e-6"], ["--max-params", "10"]])
def test_a_budget_out_of_reach_is_3(run: Run, words: list[str], no_training: None) -> None:
    ran = run("compress", "resnet8", *SMALL, *words)
    assert ran.code == 3 and "cannot be reached" in ran.err


def test_a_budget_already_met_is_3(run: Run, no_training: None) -> None:
    ran = run("compress", "resnet8", *SMALL, "--strategy", "hydra", "--macs", "1.5")
    assert ran.code == 3 and "already meets" in ran.err


def test_failed_parity_is_4(run: Run, grape: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import robustcompress.export.write as write

    def differ(*_: object, **__: object) -> None:
        raise ParityError("the file does not compute what the model computes: made up")

    monkeypatch.setattr(write, "verify_onnx", differ)
    ran = run("export", "--onnx", grape, "--json")
    assert ran.code == 4 and ran.document["error"]["kind"] == "ParityError"
    assert not (grape / "model.onnx").exists()


@pytest.mark.parametrize("command", [["evaluate"], ["export", "--onnx"]])
def test_no_or_damaged_results_are_2(run: Run, command: list[str], grape: Path, tmp_path: Path) -> None:
    assert run(*command, tmp_path / "absent").code == 2
    weights = grape / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    ran = run(*command, grape)
    assert ran.code == 2 and "model.safetensors" in ran.err


def test_evaluate_refuses_what_does_not_fit(run: Run, grape: Path) -> None:
    for words, said in (
        (["--data", "digits", "--image-size", "16"], "--image-size 32"),
        (["--eps", "0.2", "--save"], "--save"),
        (["--norm", "l2"], "--eps"),
        (["--attacks", "pgd"], "pgd-20"),
        (["--time-limit", "-1"], "time_limit"),
    ):
        ran = run("evaluate", grape, *words)
        assert ran.code == 2 and said in ran.err, (words, ran.err)


def test_files_of_the_user_are_errors_and_bugs_keep_their_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustcompress.commands import catalogue

    def fail(error: BaseException) -> None:
        def raise_it(_: object) -> None:
            raise error

        monkeypatch.setattr(catalogue, "run", raise_it)

    fail(PermissionError(13, "Permission denied", "photos/cat.jpg"))
    ran = run("list")
    assert ran.code == 2 and ran.err == "error: photos/cat.jpg: Permission denied\n"
    fail(RobustCompressError("the loss is nan"))
    assert run("list").code == 1
    fail(KeyboardInterrupt())
    assert run("list").code == 130
    for bug in (OSError("no file named"), KeyError("a"), ValueError("b")):
        fail(bug)
        with pytest.raises(type(bug)):
            run("list")


def test_what_libraries_print_does_not_spoil_the_document(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustcompress.commands import catalogue

    honest = catalogue.run

    def chatty(arguments):  # type: ignore[no-untyped-def]
        print("downloading 100 %")
        return honest(arguments)

    monkeypatch.setattr(catalogue, "run", chatty)
    ran = run("list", "data", "--json")
    assert "digits" in json.dumps(ran.document) and "downloading" in ran.err
