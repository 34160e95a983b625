"""The controls: what each holds equal, so that a gain over it means what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.session import Session
from robustcompress.strategies.base import uniform_widths
from tests.strategies.nets import build, make_session, state


def test_random_differs_from_magnitude_in_the_channels_alone() -> None:
    ran: dict[str, Session] = {}
    for strategy in (rc.Magnitude(pretrain=0.25), rc.RandomChannels(pretrain=0.25)):
        ran[strategy.name] = make_session(build("residual"), epochs=4.0)
        strategy.run(ran[strategy.name])
    magnitude, random = ran["magnitude"], ran["random"]
    assert random.editor.widths == magnitude.editor.widths
    assert [e.sources for e in random.editor.edits] != [e.sources for e in magnitude.editor.edits]
    for key in ("phase", "steps", "lr"):
        assert [r.get(key) for r in random.history] == [r.get(key) for r in magnitude.history]
    before = [[r["loss"] for r in s.history if r["phase"] == "pretrain"] for s in (random, magnitude)]
    assert before[0] == before[1]


def test_random_channels_come_from_the_seed() -> None:
    def drawn(seed: int) -> list[tuple[int, ...]]:
        torch.manual_seed(17 + seed)
        session = make_session(build("residual"), epochs=0.1, seed=seed, pretrained=True)
        rc.RandomChannels().run(session)
        return [edit.sources for edit in session.editor.edits]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


@pytest.mark.parametrize("wrong", [{"pretrain": 1.0}, {"finetune_lr": 0.0}, {"pretrain": "half"}], ids=str)
def test_bad_options_of_random_are_named(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(rc.InputError, match=f"random cannot run: {name}={value!r}"):
        rc.RandomChannels(**wrong)


@pytest.mark.parametrize("pretrained", [False, True])
def test_uniform_is_narrow_before_it_trains_and_trains_all_epochs(pretrained: bool) -> None:
    session = make_session(build("residual"), epochs=3.0, pretrained=pretrained)
    target = uniform_widths(session)
    rc.Uniform().run(session)
    assert {g.name: g.width for g in session.editor.editable} == target
    assert [r["phase"] for r in session.history] == ["plant", "train", "train", "train"]
    assert session.history[-1]["steps"] == 9
    assert all(r["macs"] <= session.limits[0] for r in session.history)


def test_from_scratch_nothing_of_a_pretrained_reference_is_left() -> None:
    ends = []
    for gain in (1.0, 5.0):
        model = build("residual")
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(gain)
        session = make_session(model, epochs=0.3, pretrained=True)
        rc.Uniform().run(session)
        ends.append(state(session.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
