"""Commands that are stopped or killed: what they exit with, what they say, and that the same command goes on."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import robustcompress as rc
from robustcompress.certify.smoothing import Smoothed
from robustcompress.checkpoint import Journal
from robustcompress.robust import chunks
from tests.cli.conftest import SMALL, Run

COMMAND = ["compress", "resnet8", *SMALL, "--epochs", "2", "--strategy", "magnitude", "--json", "--quiet"]


def stop_at(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Signal this process at a step of training."""
    step_done = Journal.step_done

    def signalled(self: Journal, done: int, *rest: Any) -> None:
        if done == step:
            signal.raise_signal(number)
        step_done(self, done, *rest)

    patch.setattr(Journal, "step_done", signalled)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_compress_stops_keeps_a_checkpoint_beside_out_and_goes_on(
    number: signal.Signals, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my out"
    with monkeypatch.context() as patch:
        stop_at(patch, 1, number)
        stopped = run(*COMMAND, "--out", out)
    assert stopped.code == 128 + number == stopped.document["exit_code"]
    assert stopped.document["resume"] in stopped.err and "stopped in phase" in stopped.err
    assert shlex.split(stopped.document["resume"])[1:] == [*map(str, COMMAND), "--out", str(out)]
    assert (tmp_path / "my out.checkpoint").is_dir() and not out.exists()
    done = run(*COMMAND, "--out", out)
    assert done.code == 0 and [path.name for path in tmp_path.iterdir()] == ["my out"]
    again = run(*COMMAND, "--out", out)
    assert again.code == 0 and "holds the finished result of this very command" in again.err
    assert again.document["report"] == done.document["report"]
    other = run(*COMMAND, "--out", out, "--seed", "7")
    assert other.code == 2 and "exists; choose another directory" in other.err


def test_without_a_checkpoint_it_says_that_nothing_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustcompress.session import Session

    judge = Session._stop_if_asked

    def signalled(self: Session, phase: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        judge(self, phase)

    monkeypatch.setattr(Session, "_stop_if_asked", signalled)
    for words in ([], ["--out", tmp_path / "out", "--checkpoint", "none"]):
        stopped = run(*COMMAND, *words)
        assert stopped.code == 143 and stopped.document["resume"] is None
        assert "with --checkpoint DIR, or --out DIR, the same command would go on" in stopped.err
    assert not list(tmp_path.iterdir())


def recipe(tmp_path: Path, **evaluate: Any) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name": "resnet8", "stem_stride": 4, "width": 0.5},
                "strategy": "magnitude",
                "data": {"source": "digits", "train_limit": 200, "test_limit": 20},
                "epochs": 0.5,
                "objective": {"name": "pgd-at", "steps": 1},
                "training": {"batch_size": 64},
                "evaluate": evaluate or {"attacks": ["clean", "autoattack"], "autoattack_images": 20},
            }
        )
    )
    return path


def test_run_is_stopped_in_autoattack_and_repeats_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[tuple[str, list[int]]] = []

    def quick(judge: Any, which: torch.Tensor, name: str, *rest: Any) -> rc.robust.AttackResult:
        attacked.append((name, which.tolist()))
        if len(attacked) == 1:
            signal.raise_signal(signal.SIGINT)
        return rc.robust.AttackResult(name=name, correct=torch.ones(len(which), dtype=torch.bool), seconds=1.0)

    monkeypatch.setattr(chunks, "_attack_chunk", quick)
    monkeypatch.setattr(chunks, "CHUNK", 1)
    trained: list[str] = []
    enter = Journal.enter
    monkeypatch.setattr(Journal, "enter", lambda self, *rest: (trained.append(rest[0]), enter(self, *rest))[1])
    command, out = (
        ["run", recipe(tmp_path), "--device", "cpu", "--out", tmp_path / "out", "--quiet", "--json"],
        tmp_path / "out",
    )
    stopped = run(*command)
    assert stopped.code == 130 and "stopped in AutoAttack's apgd-ce after 1 of" in stopped.err
    assert not out.exists() and len(attacked) == 1
    monkeypatch.setattr("robustcompress.train.loop._note", None)  # training again would fail
    resumed = run(*command)
    assert resumed.code == 0, resumed.err
    assert 4 < len(attacked) == len({(name, *which) for name, which in attacked}), "the first chunk was kept"
    everything = list(attacked)
    assert rc.load(out).report is not None and not (tmp_path / "out.checkpoint").exists()
    again = run(*command)
    assert again.code == 0 and again.document["report"] == resumed.document["report"] and attacked == everything


@pytest.fixture
def certified(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the images whose votes are counted; a signal comes with the second."""
    numbers: list[int] = []
    certify = Smoothed.certify

    def signalled(self: Smoothed, image: torch.Tensor, number: int) -> Any:
        numbers.append(number)
        if len(numbers) == 2:
            signal.raise_signal(signal.SIGTERM)
        return certify(self, image, number)

    monkeypatch.setattr(Smoothed, "certify", signalled)
    return numbers


def test_certify_is_stopped_and_goes_on_with_the_next_image(run: Run, grape: Path, certified: list[int]) -> None:
    command = ["certify", grape, "--data", "digits", "--n", "100", "--images", "4", "--json"]
    stopped = run(*command)
    assert stopped.code == 143 and "stopped after 2 of 4 images; what it has found so far is kept" in stopped.err
    assert shlex.split(stopped.document["resume"])[1:] == [*map(str, command)]
    done = run(*command)
    assert done.code == 0 and done.document["certificate"]["n"] == 4
    assert len(certified) == 4 == len(set(certified))


@pytest.mark.parametrize("place", ["--out", "--checkpoint"])
def test_run_is_stopped_in_its_certificate_and_goes_on_with_the_next_image(
    place: str, run: Run, tmp_path: Path, certified: list[int]
) -> None:
    wanted = {"attacks": ["clean"], "certify": {"method": "smoothing", "n": 50, "images": 4}}
    command = ["run", recipe(tmp_path, **wanted), place, tmp_path / "place", "--quiet", "--json"]
    stopped = run(*command)
    assert stopped.code == 143 and "stopped after 2 of 4 images; what it has found so far is kept" in stopped.err
    assert stopped.document["resume"] is not None
    done = run(*command)
    assert done.code == 0, done.err
    assert done.document["certificate"]["n"] == 4 and len(certified) == 4 == len(set(certified))
