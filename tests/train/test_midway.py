"""A run left within an epoch goes on with the same bits and the same history, whatever it trains with."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import robustcompress as rc
from robustcompress import Recipe
from robustcompress.checkpoint import Journal, read
from robustcompress.robust.objectives import FGSMRS, OBJECTIVES, PGDAT, FreeAT, Objective
from robustcompress.train import Guard, Midway
from tests.strategies.nets import QUICK_RECIPE, build, same, small_data, state

TIMES = {"images_per_s"}


class Killed(BaseException):
    """What no one catches."""


def compress(net: str, **settings: Any) -> rc.CompressResult:
    given: dict[str, Any] = {"data": small_data(), "epochs": 2.0, "recipe": QUICK_RECIPE, "attacks": ()} | settings
    return rc.compress(build(net), given.pop("strategy", "none"), progress=False, **given)


def history(result: rc.CompressResult) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in result.history]


def killed_at(steps: set[int], directory: Path, patch: pytest.MonkeyPatch, **settings: Any) -> rc.CompressResult:
    """The result of a run that was killed after these steps, of all its processes together, and began again."""
    step_done, seen = Journal.step_done, [0]

    def dying(self: Journal, *args: Any) -> None:
        step_done(self, *args)
        seen[0] += 1
        if seen[0] in steps:
            raise Killed

    with patch.context() as inner:
        inner.setattr(Journal, "step_done", dying)
        for _ in steps:
            with pytest.raises(Killed):
                compress(checkpoint=directory, checkpoint_every_s=0, **settings)
            found = read(directory)
            assert found is not None and "midway" in found.record["state"]
    return compress(checkpoint=directory, checkpoint_every_s=0, **settings)


def assert_equal(resumed: rc.CompressResult, whole: rc.CompressResult) -> None:
    assert same(state(resumed.model), state(whole.model))
    assert history(resumed) == history(whole)


def quick(kind: type[Objective]) -> Objective | None:
    """An objective with a cheap attack; None for one that cannot be had without more."""
    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    with contextlib.suppress(TypeError, rc.InputError):
        made = kind(**{"steps": 1} if "steps" in names else {})
        return None if made.needs_teacher else made
    return None


QUICK = {name: made for name, kind in OBJECTIVES.items() if (made := quick(kind)) is not None}


def test_nearly_all_objectives_are_tried() -> None:
    assert len(QUICK) >= 8 and {"free-at", "fgsm-rs", "trades"} <= QUICK.keys()


IN_CI = ("free-at", "fgsm-rs", "s2ap", "awt", "sam-swa", "auxiliary-free")


def some_in_ci(names: Iterable[str]) -> list[Any]:
    """Those that take a path of their own; the others are tried by hand."""
    return [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


@pytest.mark.parametrize("name", some_in_ci(QUICK))
def test_every_objective_goes_on_within_an_epoch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"net": "residual", "objective": QUICK[name], "recipe": Recipe(batch_size=24, guard=16)}
    assert_equal(killed_at({1, 4}, tmp_path / "c", monkeypatch, **settings), compress(**settings))


CASES: dict[str, dict[str, Any]] = {
    "awp": {"recipe": Recipe(batch_size=24, awp=0.01, val_images=20)},
    "sam-swa": {"recipe": Recipe(batch_size=24, sam=0.1, averaging="swa", swa_start=0.4, val_images=20)},
    "accumulate-adamw": {"recipe": Recipe(batch_size=24, accumulate=3, optimizer="adamw", lr=0.01, clip_norm=1.0)},
    "auxiliary-free": {"net": "auxiliary", "objective": FreeAT(replays=2)},
    "dropout": {"net": "imported"},
    "a-share-of-an-epoch": {"epochs": 1.7},
    "s2ap": {"strategy": rc.S2AP(host=rc.Hydra(pretrain=0.3, search=0.4)), "epochs": 4.0},
    "awt": {"strategy": rc.AWT(search=0.5), "epochs": 4.0},
}


@pytest.mark.parametrize("case", some_in_ci(CASES))
def test_what_else_remembers_within_an_epoch_comes_back(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"net": "residual", "objective": PGDAT(steps=1)} | CASES[case]
    assert_equal(killed_at({1, 2, 3}, tmp_path / "c", monkeypatch, **settings), compress(**settings))


@pytest.mark.parametrize("objective", [FGSMRS(), FreeAT(replays=2)], ids=lambda o: o.name)
def test_a_guard_goes_back_to_the_epoch_before_and_not_to_where_the_run_was_killed(
    objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(self: Guard) -> tuple[float, float]:
        # Of the weights alone, and a collapse at the end of the second epoch.
        assert self._model is not None
        return (0.9, 0.0) if self._level == 0 and self._best == 0.4 else (0.5, 0.4)

    monkeypatch.setattr(Guard, "_measure", measured)
    settings: dict[str, Any] = {"net": "residual", "objective": objective, "epochs": 3.0}
    settings["recipe"] = Recipe(batch_size=24, guard=16, val_images=20)
    whole = compress(**settings)
    assert any(record.get("collapsed") for record in whole.history)
    assert_equal(killed_at({1, 2, 4, 6}, tmp_path / "c", monkeypatch, **settings), whole)


class Secretive(FreeAT):
    """Remembers within an epoch, and tells nobody."""

    name: ClassVar[str] = "free-at"

    def begin(self) -> Objective:
        made = super().begin()
        made.memory = lambda: None  # type: ignore[method-assign]
        return made


def test_an_objective_that_does_not_tell_what_it_remembers_is_kept_at_the_ends_of_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "net": "residual",
        "objective": Secretive(replays=2),
    }
    settings["recipe"] = Recipe(batch_size=24, guard=0, val_images=0)
    step_done = Journal.step_done

    def dying(self: Journal, done: int, *args: Any) -> None:
        step_done(self, done, *args)
        if done == 6:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "step_done", dying)
        compress(checkpoint=tmp_path / "c", checkpoint_every_s=0, **settings)
    found = read(tmp_path / "c")
    assert found is not None and found.record["phase"]["done"] == 4 and "midway" not in found.record["state"]
    assert_equal(compress(checkpoint=tmp_path / "c", **settings), compress(**settings))


def test_parts_get_back_what_was_told_of_them_when_they_are_held() -> None:
    class Part:
        def __init__(self, **values: Any) -> None:
            self.values = values

        def state_dict(self) -> dict[str, Any]:
            return self.values

        def load_state_dict(self, values: Any) -> None:
            self.values = dict(values)

    first = Midway()
    first.hold("a", Part(x=1, y=torch.ones(2)))
    first.hold("ab", Part(x=2))
    first.hold("gone", Part(x=3))
    first.drop("gone")
    told = first.state_dict()
    assert told.keys() == {"a/x", "a/y", "ab/x"}
    second, part, late = Midway(), Part(), Part()
    second.load_state_dict(told)
    second.hold("a", part)
    assert part.values.keys() == {"x", "y"} and part.values["x"] == 1
    second.hold("ab", late)
    assert late.values == {"x": 2}
    again = Part(x=9)
    second.hold("a", again)
    assert again.values == {"x": 9}, "what was found is given once"
