"""The guard against catastrophic overfitting: when it acts, what it puts back, and that it cures."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress import Recipe, ThreatModel, load_data
from robustcompress.data import Batches
from robustcompress.robust import FGSMRS, PGDAT, TRADES, FreeAT
from robustcompress.robust.probe import accuracies
from robustcompress.session import Session
from robustcompress.train import Guard
from robustcompress.train.guard import Snapshot, collapsed, stronger
from tests.strategies.nets import QUICK_RECIPE, build, make_session, same, small_data, state

GUARDED = Recipe(batch_size=32, val_images=20, guard=16)
GOOD, BAD = (0.5, 0.4), (0.9, 0.0)


def session_of(measured: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Session:
    """A session whose guard finds these accuracies, one after the other, the first before training."""
    values = iter(measured)
    monkeypatch.setattr(Guard, "_measure", lambda self: next(values))
    return make_session(build("residual"), **({"objective": FGSMRS(), "epochs": 4.0, "recipe": GUARDED} | settings))


def plain(name: str = "residual", **settings: Any) -> Session:
    return make_session(build(name), **({"objective": FGSMRS(), "epochs": 4.0, "recipe": GUARDED} | settings))


def momentum(session: Session) -> list[torch.Tensor]:
    optimizer = session._optimizer
    assert optimizer is not None
    return [s["momentum_buffer"].clone() for s in optimizer.state.values() if s.get("momentum_buffer") is not None]


def test_without_a_collapse_training_is_bit_for_bit_what_it_is_without_a_guard() -> None:
    watched, alone = plain("imported"), plain("imported", recipe=Recipe(batch_size=32, val_images=20, guard=0))
    for session in (watched, alone):
        torch.manual_seed(0)  # this network has dropout
        session.train("a", share=0.5)
        session.editor.prune(session.editor.editable[0].name, range(6))
        session.train("b", share=0.5, select=True)
    assert same(state(watched.model), state(alone.model)) and same(state(watched.averaged), state(alone.averaged))
    assert all(r["guard_images"] == 16 and r["attack_steps"] == 1 for r in watched.history)
    assert not any("guard_images" in record for record in alone.history)


@pytest.mark.parametrize("objective", [FGSMRS(), FreeAT(replays=2)], ids=lambda o: o.name)
def test_a_collapse_undoes_its_epoch_and_goes_on_with_more_steps(
    objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of([(0.1, 0.1), GOOD, BAD, GOOD, GOOD], monkeypatch, objective=objective)
    said: list[str] = []
    monkeypatch.setattr(Session, "say", lambda self, line: said.append(line))
    session._guard._say = session.say  # type: ignore[union-attr]
    kept: list[Any] = []
    look = Guard.look

    def spy(self: Guard, record: dict[str, Any]) -> None:
        before = state(session.model), state(session.averaged), momentum(session)
        look(self, record)
        kept.append((before, (state(session.model), state(session.averaged), momentum(session))))

    monkeypatch.setattr(Guard, "look", spy)
    session.train("a", share=1.0)
    good, undone = kept[0][1], kept[1]
    assert not same(undone[0][0], good[0]) and same(undone[1][0], good[0]), "weights and running statistics"
    assert not same(undone[0][1], good[1]) and same(undone[1][1], good[1]), "the average"
    assert all(torch.equal(a, b) for a, b in zip(undone[1][2], good[2], strict=True)), "the optimizer"
    assert [record["attack_steps"] for record in session.history] == [1, 1, 2, 2]
    assert [record.get("collapsed") for record in session.history] == [None, True, None, None]
    assert len(said) == 1 and "phase 'a', epoch 2" in said[0] and "on with PGD-2" in said[0]
    assert session._guard is not None
    assert session._guard.current == PGDAT(steps=2, step_size=ThreatModel().eps / 2)


def test_a_collapse_in_the_first_epoch_goes_back_to_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of([(0.1, 0.1), BAD], monkeypatch, epochs=1.0)
    before = state(session.model)
    session.train("a", share=1.0)
    assert same(state(session.model), before) and momentum(session) == []


def test_the_stronger_attack_stays_in_later_phases_and_is_raised_until_no_more_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = (0.1, 0.1)
    session = session_of([start, BAD, start, BAD, start, BAD, start, BAD, start, GOOD], monkeypatch, epochs=5.0)
    for phase in "abcde":
        session.train(phase, share=0.2)
    assert [record["attack_steps"] for record in session.history] == [1, 2, 4, 8, 8]
    assert session.history[3]["collapsed"] and session.history[3]["loss"] > 0
    assert session._guard is not None and session._guard.state_dict()["level"] == 3


def test_after_the_last_attack_a_collapsed_epoch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of([(0.1, 0.1), BAD, BAD, BAD, BAD], monkeypatch)
    seen = []
    monkeypatch.setattr(Session, "record", lambda self, record: seen.append(state(self.model)))
    session.train("a", share=1.0)
    assert same(seen[0], seen[1]) and same(seen[1], seen[2]) and not same(seen[2], seen[3])


@pytest.mark.parametrize("objective", [PGDAT(steps=1), TRADES(steps=1)], ids=lambda o: o.name)
def test_other_objectives_are_not_watched(objective: Any) -> None:
    session = plain(objective=objective, epochs=1.0)
    session.train("a", share=1.0)
    assert session._guard is None and "guard_pgd" not in session.history[0]


def test_scores_are_trained_on_what_the_guard_says_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of([(0.1, 0.1), BAD], monkeypatch, epochs=2.0)
    session.train("a", share=0.5)
    session.train_only("scores", [{"params": [session.model.conv1.weight]}], share=0.5, lr=0.01)
    assert "guard_pgd" not in session.history[1]


@pytest.mark.parametrize(
    ("single", "robust", "least", "best", "expected"),
    [
        (0.90, 0.00, 0.05, 0.40, True),
        (0.70, 0.10, 0.05, 0.40, True),  # fallen to a quarter of its best, a seventh of the other
        (0.70, 0.10, 0.05, 0.20, False),  # half of its best: watch on
        (0.45, 0.40, 0.02, 0.40, False),
        (0.15, 0.00, 0.00, 0.10, False),  # nothing is learnt yet, and nothing is lost
        (0.60, 0.30, 0.05, 0.35, False),  # a large radius
        (0.50, 0.02, 0.40, 0.02, False),  # a natural network, as it came
        (0.90, 0.02, 0.40, 0.05, True),
    ],
)
def test_what_a_collapse_is(single: float, robust: float, least: float, best: float, expected: bool) -> None:
    assert collapsed(single, robust, least=least, best=best) is expected


def test_the_stronger_attack_keeps_the_options_about_labels() -> None:
    threat = ThreatModel("l2", 0.5)
    objective = FGSMRS(label_smoothing=0.1, class_weights=(1.0, 2.0), attack_mode="train")
    expected = PGDAT(steps=2, step_size=0.25, label_smoothing=0.1, class_weights=(1.0, 2.0), attack_mode="train")
    assert stronger(objective, 2, threat) == expected
    assert stronger(FreeAT(label_smoothing=0.1), 8, threat) == PGDAT(steps=8, step_size=0.125, label_smoothing=0.1)


def test_it_measures_what_it_says() -> None:
    """Against the accuracies of the package's own meter, in eval mode, whatever the mode of the network."""
    session = plain()
    session.model.train()
    guard = session._guard
    assert guard is not None
    guard.enter(session.model, [], torch.optim.SGD(session.model.parameters(), lr=0.1), begun=True)
    found = [guard._measure() for _ in range(2)]
    assert found[0] == found[1] and session.model.training
    batches = Batches(guard._images.images, 32)
    _, robust = accuracies(session.model, batches, ThreatModel(), generator=torch.Generator().manual_seed(0))
    assert found[0][1] == pytest.approx(robust, abs=2 / 16), "the same attack, from another start"


def test_a_snapshot_survives_two_restorations() -> None:
    model = build("chain")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 3, 16, 16)).square().sum().backward()
        optimizer.step()

    step()
    snapshot, before = Snapshot([model], optimizer), state(model)
    ends = []
    for _ in range(2):
        step()
        step()
        ends.append(state(model))
        snapshot.restore()
        assert same(state(model), before)
    assert same(*ends)


def test_a_run_with_a_collapse_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of accuracies by the weights themselves: what was measured before a stop is not measured again."""

    def measure(self: Guard) -> tuple[float, float]:
        assert self._model is not None
        odd = int(float(next(self._model.parameters()).detach().double().sum()) * 1e6) % 2
        return BAD if odd else GOOD

    monkeypatch.setattr(Guard, "_measure", measure)
    settings: dict[str, Any] = {"data": small_data(), "recipe": QUICK_RECIPE, "attacks": (), "progress": False}
    settings |= {"objective": FGSMRS(), "epochs": 8.0}
    whole = rc.compress(build("imported"), "magnitude", **settings)
    assert sum(record.get("collapsed", False) for record in whole.history) >= 2
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = None, 0
    while resumed is None:
        with contextlib.suppress(rc.OutOfTime):
            resumed = rc.compress(build("imported"), "magnitude", **settings, **kept)
        stops += resumed is None
    assert stops >= 6 and same(state(resumed.model), state(whole.model))
    steps = [[r.get("attack_steps") for r in result.history] for result in (resumed, whole)]
    assert steps[0] == steps[1] and {1, 2} <= set(steps[0])


@pytest.mark.slow
def test_a_provoked_collapse_is_cured() -> None:
    """A large radius, steps three times as long, no augmentation, no decay: without the guard PGD finds everything."""
    data = load_data("digits", image_size=16, train_limit=512, test_limit=40)
    images, threat = Batches(data.train.first(256), 128), ThreatModel("linf", 0.25)
    ends = []
    for guard in (0, 1000):
        torch.manual_seed(0)
        model = rc.build_model("resnet8", num_classes=10)[0]
        recipe = Recipe(lr=0.02, batch_size=64, augment="none", weight_decay=0.0, guard=guard)
        settings: dict[str, Any] = {"data": data, "objective": FGSMRS(step_scale=3.0), "threat": threat}
        session = make_session(model, epochs=30.0, recipe=recipe, **settings)
        session.train("a", share=1.0, schedule="constant")
        ends.append(accuracies(model, images, threat, generator=torch.Generator().manual_seed(0))[1])
    assert ends[0] < 0.01 < 0.04 < ends[1]
    assert any(record.get("collapsed") for record in session.history)
