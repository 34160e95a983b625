"""Stochastic weight averaging against the mean of weights that were put aside."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress import Recipe
from robustcompress.robust import FGSMRS, Natural
from robustcompress.session import Session
from robustcompress.train import Guard, equally_averaged
from tests.strategies.nets import build, make_session, same, small_data, state


def swa(start: float = 0.5, **settings: Any) -> Recipe:
    return Recipe(batch_size=32, val_images=20, averaging="swa", swa_start=start, **settings)


def session_of(start: float = 0.5, name: str = "residual", **settings: Any) -> tuple[Session, list[Any]]:
    """A session, and the weights at the end of each of its epochs."""
    session = make_session(build(name), **({"objective": Natural(), "epochs": 4.0, "recipe": swa(start)} | settings))
    ends: list[Any] = []
    record = session.record

    def keep(entry: dict[str, Any]) -> None:
        ends.append({n: p.detach().clone() for n, p in session.model.named_parameters()})
        record(entry)

    session.record = keep  # type: ignore[method-assign]
    return session, ends


def assert_mean(model: nn.Module, states: list[dict[str, torch.Tensor]]) -> None:
    for name, parameter in model.named_parameters():
        expected = torch.stack([s[name].double() for s in states]).mean(0)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("start", "last", "counts"), [(0.5, 2, [0, 0, 1, 2]), (0.0, 4, [1, 2, 3, 4]), (0.8, 1, [0, 0, 0, 1])]
)
def test_it_is_the_mean_of_the_last_epochs_over_all_phases(start: float, last: int, counts: list[int]) -> None:
    session, ends = session_of(start)
    session.train("a", share=0.25)
    assert same(state(session.averaged), state(session.model)) or start == 0.0
    session.train("b", share=0.75)
    assert [record["averaged"] for record in session.history] == counts
    assert_mean(session.averaged, ends[-last:])
    session.settle()
    assert_mean(session.model, ends[-last:])


def test_before_it_begins_the_weights_themselves_are_the_average() -> None:
    session, _ = session_of(0.9)
    session.train("a", share=0.5)
    assert same(state(session.averaged), state(session.model))


def test_its_statistics_are_those_of_its_own_activations() -> None:
    session, _ = session_of(0.0, "chain", recipe=swa(0.0, augment="none"))
    session.train("a", share=1.0)
    net = session.averaged
    batches = list(session._batches.iterate(0))
    activations = [net.conv1(x).detach() for x, _ in batches]
    mean = torch.stack([a.mean((0, 2, 3)) for a in activations]).mean(0)
    var = torch.stack([a.var((0, 2, 3)) for a in activations]).mean(0)
    torch.testing.assert_close(net.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.bn1.running_var, var, rtol=1e-4, atol=1e-5)
    assert not same(state(net), state(session.model))


def test_training_itself_is_bit_for_bit_what_it_is_without() -> None:
    ends = []
    for recipe in (swa(0.25), Recipe(batch_size=32, val_images=20, ema=0.0)):
        session = make_session(build("residual"), objective=FGSMRS(), epochs=4.0, recipe=recipe)
        session.train("a", share=1.0)
        ends.append(state(session.model))
    assert same(*ends)


def test_it_follows_structural_edits() -> None:
    session, ends = session_of(0.0)
    session.train("a", share=0.5)
    keep = [0, 2, 3, 7, 11]
    session.editor.prune("conv1", keep)
    before = [{n: t for n, t in end.items()} for end in ends]
    for end in before:
        end["conv1.weight"], end["conv2.weight"] = end["conv1.weight"][keep], end["conv2.weight"][:, keep]
        end["bn1.weight"], end["bn1.bias"] = end["bn1.weight"][keep], end["bn1.bias"][keep]
    assert_mean(session.averaged, before)
    session.train("b", share=0.5)
    assert_mean(session.averaged, before + ends[2:])


def test_the_epoch_that_is_kept_is_judged_by_its_average(monkeypatch: pytest.MonkeyPatch) -> None:
    session, ends = session_of(0.25)
    scores = iter([(0.5, 0.1), (0.5, 0.2), (0.5, 0.4), (0.5, 0.3)])
    monkeypatch.setattr(Session, "validate", lambda self: next(scores))
    session.train("tail", share=1.0, select=True)
    session.settle()
    assert_mean(session.model, ends[1:3])


def test_an_epoch_that_the_guard_undoes_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([(0.1, 0.1), (0.5, 0.4), (0.9, 0.0), (0.5, 0.4), (0.5, 0.4)])
    monkeypatch.setattr(Guard, "_measure", lambda self: next(values))
    session, ends = session_of(0.0, objective=FGSMRS())
    session.train("a", share=1.0)
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])
    assert_mean(session.averaged, [ends[0], ends[2], ends[3]])


def test_a_mean_is_exact_over_many_updates() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average, seen = equally_averaged(model), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        average.update_parameters(model)
    assert_mean(average.module, seen)


@pytest.mark.parametrize("settings", [{"averaging": "swa", "swa_start": 0.3}, {"sam": 0.05}], ids=["swa", "sam"])
def test_a_run_stopped_after_every_epoch_ends_as_one_that_was_not(settings: dict[str, Any], tmp_path: Path) -> None:
    run: dict[str, Any] = {"data": small_data(), "attacks": (), "progress": False, "objective": FGSMRS()}
    run |= {"epochs": 6.0, "recipe": Recipe(batch_size=32, val_images=20, guard=16, **settings)}
    whole = rc.compress(build("imported"), "magnitude", **run)  # dropout, also where statistics are estimated
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = None, 0
    while resumed is None:
        with contextlib.suppress(rc.OutOfTime):
            resumed = rc.compress(build("imported"), "magnitude", **run, **kept)
        stops += resumed is None
    assert stops >= 4 and same(state(resumed.model), state(whole.model))
    assert [r.get("averaged") for r in resumed.history] == [r.get("averaged") for r in whole.history]
