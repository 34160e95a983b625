"""What a session does around the loop: freezing, averaging, selecting, settling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from robustcompress import Budget, Recipe, StructuralEditor, ThreatModel
from robustcompress.robust.objectives import Natural
from robustcompress.session import Session
from tests.strategies.nets import build, make_session, same, small_data, state

NATURAL = Natural()


def session_of(name: str = "chain", **settings: Any) -> Session:
    return make_session(build(name), **({"objective": NATURAL} | settings))


def test_train_only_moves_what_it_is_given_and_thaws_the_rest() -> None:
    session = session_of()
    model = session.model
    model.conv1.weight.requires_grad_(False)
    before = state(model)
    session.train_only("search", [{"params": [model.conv2.weight]}], share=1.0, lr=0.05)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"conv2.weight"}
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert session.history[-1]["phase"] == "search"


def test_train_only_thaws_also_after_a_failure() -> None:
    class Broken(Natural):
        def loss(self, *_: Any, **__: Any) -> Any:
            raise ZeroDivisionError

    session = session_of(objective=Broken())
    with pytest.raises(ZeroDivisionError):
        session.train_only("search", [{"params": [session.model.conv2.weight]}], share=1.0, lr=0.05)
    assert all(p.requires_grad for p in session.model.parameters())


def test_frozen_parameters_never_move() -> None:
    session = session_of("residual")
    session.model.conv1.weight.requires_grad_(False)
    kept = session.model.conv1.weight.detach().clone()
    session.train("a", share=1.0)
    session.editor.grow("conv3", 2)
    session.train("b", share=1.0)
    session.settle()
    assert torch.equal(session.model.conv1.weight, kept)
    assert not session.model.conv1.weight.requires_grad


def test_optimizer_and_average_go_on_until_settled() -> None:
    session = session_of()
    session.train("a", share=1.0, schedule="constant")
    optimizer, averaged = session._optimizer, session.averaged
    session.train("b", share=1.0, schedule="constant")
    assert session._optimizer is optimizer and session.averaged is averaged
    expected = state(averaged)
    assert not same(expected, state(session.model))
    session.settle()
    assert same(state(session.model), expected), "the averaged weights are the result"
    assert session.averaged is session.model and session._optimizer is None


def test_without_averaging_the_network_itself_is_the_result() -> None:
    session = session_of(recipe=Recipe(batch_size=32, ema=0.0))
    session.train("a", share=1.0)
    expected = state(session.model)
    assert session.averaged is session.model
    session.settle()
    assert same(state(session.model), expected)


@pytest.mark.parametrize("ema", [0.999, 0.0])
@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([(0.5, 0.1), (0.5, 0.3), (0.9, 0.2)], 2),
        ([(0.5, 0.3), (0.6, 0.3), (0.4, 0.3)], 2),
        ([(0.5, 0.3), (0.5, 0.3), (0.5, 0.3)], 3),
        ([(0.5, 0.3), (0.1, 0.1), (0.1, 0.2)], 1),
    ],
)
def test_selection_keeps_the_most_robust_epoch_and_the_later_of_equals(
    scores: list[tuple[float, float]], best: int, ema: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(epochs=3.0, recipe=Recipe(batch_size=32, ema=ema))
    seen: list[dict[str, torch.Tensor]] = []

    def validate(self: Session) -> tuple[float, float]:
        seen.append(state(self.averaged))
        return scores[len(seen) - 1]

    monkeypatch.setattr(Session, "validate", validate)
    session.train("tail", share=1.0, select=True)
    session.settle()
    assert len(seen) == 3
    assert same(state(session.model), seen[best - 1])
    assert [r["val_robust"] for r in session.history] == [robust for _, robust in scores]


@pytest.mark.parametrize("epochs", [0.4, 1.0, 1.4, 8.0, 16.4, 24.4])
def test_the_last_epoch_is_always_looked_at(epochs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(epochs=epochs, recipe=Recipe(batch_size=32))
    looked: list[int] = []
    monkeypatch.setattr(Session, "validate", lambda self: (looked.append(1), (0.1, 0.1))[1])
    session.train("tail", share=1.0, select=True)
    assert "val_robust" in session.history[-1], "the end of a phase, where the learning rate is lowest, is a candidate"
    assert len(looked) <= 17


def test_validation_neither_trains_nor_draws() -> None:
    session = session_of()
    session.train("a", share=0.4)
    session.model.train()
    before, drawn = state(session.model), session._attack_generator.get_state()
    assert session.validate() == session.validate()
    assert same(state(session.model), before)
    assert torch.equal(session._attack_generator.get_state(), drawn)
    assert session.model.training and all(p.requires_grad for p in session.model.parameters())


def test_attacked_images_lie_in_the_ball_and_change_from_call_to_call() -> None:
    session = session_of()
    first = list(session.attacked(2, steps=2))
    second = list(session.attacked(2, steps=2))
    assert len(first) == len(second) == 2
    assert not torch.equal(first[0][0], second[0][0])
    for x, y in first:
        assert x.shape == (32, 3, 16, 16) and y.shape == (32,)
        assert float(x.min()) >= 0 and float(x.max()) <= 1


def test_attacked_leaves_the_network_as_it_was() -> None:
    session = session_of()
    session.model.train()
    before = state(session.model)
    generator: Iterator[Any] = session.attacked(3, steps=1)
    next(generator)
    generator.close()  # type: ignore[attr-defined]
    assert session.model.training
    assert same(state(session.model), before)
    assert all(p.grad is None for p in session.model.parameters())


def test_limits_and_fits_agree_with_the_measured_cost() -> None:
    session = session_of("residual", budget=Budget(macs=0.5, max_params=1e9))
    assert session.limits == (session.goal.reference.macs * 0.5, 1e9)
    assert not session.fits(session.editor.widths)
    narrow = {group.name: group.width // 2 for group in session.editor.editable}
    assert session.fits(narrow)
    for group in session.editor.editable:
        session.editor.prune(group.name, range(narrow[group.name]))
    assert session.cost().macs <= session.limits[0]


def test_recalibrated_statistics_are_those_of_the_training_images() -> None:
    session = session_of(recipe=Recipe(batch_size=115, augment="none"))
    momentum = session.model.bn1.momentum
    session.model.eval()
    session.recalibrate(batches=1)
    x = small_data().train.as_float()
    activations = session.model.conv1(x)
    assert torch.allclose(session.model.bn1.running_mean, activations.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(session.model.bn1.running_var, activations.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert session.model.bn1.momentum == momentum and not session.model.training


def test_strategies_cannot_see_the_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    ours = {tuple(image.flatten().tolist()) for image in small_data().test.pixels}
    fed = session._batches.images.pixels
    assert not any(tuple(image.flatten().tolist()) in ours for image in fed)
    assert isinstance(session.editor, StructuralEditor) and isinstance(session.goal.threat, ThreatModel)
