"""HYDRA: what moves during the search, what is kept after it, and that without a search it is `magnitude`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.robust.objectives import PGDAT, ObjectiveStep
from robustcompress.session import Session
from robustcompress.strategies import units as module
from robustcompress.structure.gates import top_channels
from robustcompress.structure.magnitudes import group_norms
from tests.strategies.nets import build, make_session, same, state


@pytest.mark.parametrize("net", ["residual", "joined", "imported"])
def test_without_a_search_it_is_magnitude_bit_for_bit(net: str) -> None:
    ends = []
    for strategy in (rc.Hydra(search=0, pretrain=0.4, finetune_lr=0.5), rc.Magnitude(pretrain=0.4, finetune_lr=0.5)):
        session = make_session(build(net, **({"num_classes": 10} if net == "imported" else {})), epochs=2.0)
        torch.manual_seed(0)
        strategy.run(session)
        session.settle()
        ends.append((session.editor.edits, state(session.model), [r.get("loss") for r in session.history]))
    assert ends[0][0] == ends[1][0] and ends[0][2] == ends[1][2]
    assert same(ends[0][1], ends[1][1])


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Notes weights before and after the search, the gates, and the widths that were planned."""
    seen: dict[str, Any] = {}
    train_only, gates, plan = Session.train_only, rc.StructuralEditor.gates, module.uniform_widths

    def watch_train(self: Session, *args: Any, **settings: Any) -> None:
        seen["before"] = state(self.model)
        train_only(self, *args, **settings)
        seen["after"] = state(self.model)
        seen["flags"] = [p.requires_grad for p in self.model.parameters()]

    def watch_gates(self: rc.StructuralEditor, scores: Any, rule: Any = None) -> Any:
        seen["start"] = {name: values.clone() for name, values in scores.items()}
        seen["gates"] = gates(self, scores, rule)
        return seen["gates"]

    def watch_plan(session: Session, **settings: Any) -> dict[str, int]:
        seen["widths"] = plan(session, **settings)
        return dict(seen["widths"])

    monkeypatch.setattr(Session, "train_only", watch_train)
    monkeypatch.setattr(rc.StructuralEditor, "gates", watch_gates)
    monkeypatch.setattr(module, "uniform_widths", watch_plan)
    return seen


@pytest.mark.parametrize("net", ["residual", "joined"])
def test_only_scores_and_batch_norms_move_during_the_search(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    session = make_session(build(net), epochs=4.0)
    norms = {name.split(".")[0] for name, m in session.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    rc.Hydra(search=0.5, pretrain=0.25).run(session)
    moved = {name for name in seen["before"] if not torch.equal(seen["before"][name], seen["after"][name])}
    assert moved and {name.split(".")[0] for name in moved} <= norms
    assert {name.split(".")[1] for name in moved} == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip
    assert all(seen["flags"])
    for name, values in seen["gates"].scores.items():
        assert not torch.equal(values.detach(), seen["start"][name]), name


def test_scores_start_in_proportion_to_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    session = make_session(build("chain"), epochs=0.2, pretrained=True)
    norms = group_norms(session.editor)
    rc.Hydra().run(session)
    for name, start in seen["start"].items():
        assert float(start.max()) == pytest.approx(6**0.5)
        assert torch.allclose(start / start.max(), (norms[name] / norms[name].max()).float())


@pytest.mark.parametrize("net", ["residual", "joined"])
def test_it_keeps_exactly_what_the_scores_chose(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    session = make_session(build(net), epochs=3.0)
    rc.Hydra(search=0.5, pretrain=0.25, score_lr=0.3).run(session)
    widths = {group.name: group.width for group in session.editor.editable}
    assert widths == seen["widths"]
    edits = {edit.group: edit.sources for edit in session.editor.edits}
    for name, scores in seen["gates"].scores.items():
        if name in edits:
            assert edits[name] == tuple(top_channels(scores, widths[name]).tolist())
    record = next(r for r in session.history if r.get("event") == "scores")
    start_keep = {name: set(top_channels(s, widths[name]).tolist()) for name, s in seen["start"].items()}
    changed = sum(len(start_keep[n] ^ set(edits.get(n, range(widths[n])))) for n in start_keep)
    assert record["changed"] == pytest.approx(changed / sum(len(s) for s in seen["start"].values()))
    assert changed > 0, "with this learning rate some decision changes"


def test_the_search_finds_the_channels_that_matter() -> None:
    """Half of a trained layer is silenced, and its norms are made ten times as large in front of the batch norm, which
    undoes that: by its weights it would be kept, by the loss it is dead.
    """
    session = make_session(build("chain"), epochs=30.0, recipe=rc.Recipe(batch_size=32, ema=0.0, val_images=1))
    session.train("before", share=1.0)
    session.settle()
    model, dead = session.model, set(range(0, 16, 2))
    with torch.no_grad():
        for channel in dead:
            model.conv2.weight[channel] *= 10
            model.conv2.bias[channel] *= 10
            model.bn2.running_mean[channel] *= 10
            model.bn2.running_var[channel] *= 100
            model.bn2.weight[channel] = model.bn2.bias[channel] = 0
    norms = group_norms(session.editor)["conv2"]
    trained = make_session(model, epochs=30.0, pretrained=True)
    rc.Hydra(pretrain=0.0, search=0.95, score_lr=0.1).run(trained)
    width = trained.editor.widths["conv2"]
    kept = set(next(e.sources for e in trained.editor.edits if e.group == "conv2"))
    assert dead <= set(norms.argsort(descending=True)[:width].tolist()), "the construction: norms keep the dead"
    assert len(kept - dead) >= 6, "the search swaps them for the living"


def test_a_failure_in_the_search_leaves_no_trace() -> None:
    class Broken(PGDAT):
        def loss(self, *args: Any, **settings: Any) -> ObjectiveStep:
            if calls.append(1) or len(calls) == 2:  # type: ignore[func-returns-value]
                raise ZeroDivisionError
            return super().loss(*args, **settings)

    calls: list[int] = []
    session = make_session(build("residual"), objective=Broken(steps=1), pretrained=True, epochs=3.0)
    session.model.bn0.bias.requires_grad_(False)
    before = state(session.model)
    with pytest.raises(ZeroDivisionError):
        rc.Hydra(pretrain=0.05, search=0.9).run(session)
    assert [n for n, p in session.model.named_parameters() if not p.requires_grad] == ["bn0.bias"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in session.model.modules())
    for name, parameter in session.model.named_parameters():
        if "bn" not in name:
            assert torch.equal(parameter, before[name]), name
    assert torch.equal(session.model.bn0.bias, before["bn0.bias"]), "a frozen batch norm stays frozen in the search"


@pytest.mark.parametrize(
    "wrong",
    [
        {"search": -0.1},
        {"pretrain": -0.1},
        {"pretrain": 0.9, "search": 0.1},
        {"score_lr": 0.0},
        {"score_lr": float("nan")},
        {"finetune_lr": 0.0},
        {"finetune_lr": float("nan")},
        {"search": "0.1"},
    ],
    ids=str,
)
def test_bad_options_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(rc.InputError) as caught:
        rc.Hydra(**wrong)
    for name, value in wrong.items():
        assert f"{name}={value!r}" in str(caught.value)
