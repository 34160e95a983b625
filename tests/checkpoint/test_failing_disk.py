"""A run whose disk is full, read-only or damaged: the last good checkpoint stands, and training goes on."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

import robustcompress as rc
from robustcompress.checkpoint import Journal, files, read
from robustcompress.errors import DiskError
from tests.strategies.nets import QUICK_RECIPE, build, same, small_data, state


def compress(**settings: Any) -> rc.CompressResult:
    given: dict[str, Any] = {"data": small_data(), "epochs": 2.0, "recipe": QUICK_RECIPE, "attacks": ()}
    return rc.compress(build("chain"), "magnitude", **(given | {"progress": False, "checkpoint_every_s": 0} | settings))


class Killed(BaseException):
    """What no one catches."""


def refuse(*_: Any, **__: Any) -> str:
    raise OSError(errno.ENOSPC, "No space left on device")


EXPECTED = [("pretrain", 1), ("pretrain", 1), ("pretrain", 1), ("finetune", 2)]
"""What stands after each step that ends no epoch."""


def test_a_full_disk_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = compress()
    step_done, save, steps = Journal.step_done, files.save_tensors, [0]

    def count(self: Journal, *rest: Any) -> None:
        steps[0] += 1
        monkeypatch.setattr(files, "save_tensors", refuse if steps[0] in (2, 3) else save)
        step_done(self, *rest)
        found = read(tmp_path / "c")
        assert found is not None and not found.note
        assert (found.record["phase"]["name"], found.record["phase"]["done"]) == EXPECTED[steps[0] - 1]

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step_done", count)
        result = compress(checkpoint=tmp_path / "c", progress=True)
    assert same(state(result.model), state(whole.model)) and not (tmp_path / "c").exists()
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("No space left on device") == 1 and said.count("training goes on") == 1
    assert "the last one, of phase 'pretrain' after 1 steps, stands" in said
    assert said.count("checkpoints are written to") == 1


def test_a_run_that_cannot_be_saved_keeps_its_checkpoint_and_ends_when_it_is_called_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr("robustcompress.result.save_tensors", refuse)
        with pytest.raises(rc.InputError, match=r"No space left on device.*the checkpoint in .* is kept"):
            compress(**kept)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    with monkeypatch.context() as patch:
        patch.setattr("robustcompress.train.loop._note", None)  # training again would fail
        compress(**kept)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_save_that_was_killed_leaves_nothing_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(self: rc.CompressResult, directory: Path) -> None:
        (directory / "half").write_text("")
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
        raise Killed

    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "out": tmp_path / "out"}
    with monkeypatch.context(), pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rc.CompressResult, "_write", dying)
        compress(**kept)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".out-notes").mkdir()  # not of that form
    compress(**kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-notes", "out"]


@pytest.mark.slow
def test_a_front_does_not_hold_a_full_disk_against_its_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"data": small_data(), "recipe": QUICK_RECIPE, "progress": False, "picture": ""}
    settings |= {"pretrained": True, "budgets": 0.5, "epochs": 1.0, "attacks": ("clean", "pgd-2")}
    with monkeypatch.context() as patch:
        patch.setattr("robustcompress.result.save_tensors", refuse)
        with pytest.raises(DiskError, match="No space left"):
            rc.pareto(build("chain"), "magnitude", out=tmp_path / "f", **settings)
    front = rc.pareto(build("chain"), "magnitude", out=tmp_path / "f", **settings)
    assert len(front.made) == 2 and not any(point.failed for point in front.points)


def test_a_run_goes_on_from_the_one_before_where_the_newest_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = compress()
    step_done = Journal.step_done

    def dying(self: Journal, done: int, *rest: Any) -> None:
        step_done(self, done, *rest)
        if done == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "step_done", dying)
        compress(checkpoint=tmp_path / "c")
    (tmp_path / "c" / "state-2-0.safetensors").write_bytes(b"")
    resumed = compress(checkpoint=tmp_path / "c", progress=True)
    said = " ".join(capfd.readouterr().err.split())
    assert "warning: the newest checkpoint cannot be used" in said and "1 of 3 steps done" in said
    assert same(state(resumed.model), state(whole.model))
