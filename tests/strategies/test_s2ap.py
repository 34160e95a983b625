"""S2AP: what it adds to its host's search, how its radius is chosen, and that without it nothing is added."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.robust.objectives import PGDAT
from robustcompress.session import Session
from robustcompress.strategies import make_strategy
from robustcompress.strategies.s2ap import ScoreAscent, calibrate
from robustcompress.structure.masks import TopK
from tests.strategies.nets import build, make_session, same, state
from tests.train.test_ascent import Whole


def run(strategy: rc.Strategy, net: str = "residual", **settings: Any) -> Session:
    model = build(net, **({"num_classes": 10} if net == "imported" else {}))
    session = make_session(model, **({"epochs": 8.0} | settings))
    torch.manual_seed(0)
    strategy.run(session)
    session.settle()
    return session


def untimed(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "images_per_s"} for record in history]


@pytest.mark.parametrize("net", ["residual", "imported"])
def test_switched_off_it_is_its_host_bit_for_bit(net: str) -> None:
    host = rc.Hydra(pretrain=0.3, search=0.4, score_lr=0.2)
    ours = run(rc.S2AP(host=host, gamma=0.0, finetune_awp=0.0), net, epochs=4.0)
    theirs = run(host, net, epochs=4.0)
    assert ours.editor.edits == theirs.editor.edits and ours.editor.edits
    assert same(state(ours.model), state(theirs.model))
    assert untimed(ours.history) == untimed(theirs.history)


def test_it_searches_as_usual_then_above_the_scores_then_fine_tunes_above_the_weights() -> None:
    host = rc.Hydra(pretrain=0.25, search=0.5)
    session, plain = run(rc.S2AP(host=host, flips=0.04)), run(host)
    of = {name: [r for r in session.history if r["phase"] == name and "epoch" in r] for name in ("search", "finetune")}
    before = [r for r in untimed(plain.history) if r["phase"] == "search"]
    assert untimed(session.history)[:3] == untimed(plain.history)[:3], "pretraining, and a quarter of the search"
    assert len(of["search"]) == 4 and untimed(of["search"])[0] == before[0] and "gamma" not in of["search"][0]
    for record in of["search"][1:]:
        assert {"gamma", "flips", "loss_before", "loss_after"} <= record.keys() and "awp" not in record
        assert 1e-6 < record["gamma"] < 1 and 0 < record["flips"] < 0.3
        assert record["loss_before"] != record["loss_after"], "flipped masks give another loss"
        assert record["loss"] == pytest.approx(record["loss_after"])
    assert [r["awp"] for r in of["finetune"]] == [0.005] * 2
    assert not any("awp" in r for r in session.history if r["phase"] == "pretrain")
    assert not same(state(session.model), state(plain.model))


def test_the_recipes_own_perturbation_stays_where_fine_tuning_has_none_of_its_own() -> None:
    recipe = rc.Recipe(batch_size=32, val_images=1, awp=0.01)
    history = run(rc.S2AP(finetune_awp=0.0), epochs=2.0, recipe=recipe).history
    trained = {r["phase"]: r.get("awp") for r in history if "epoch" in r}
    assert trained == {"pretrain": 0.01, "search": None, "finetune": 0.01}


def test_only_scores_and_batch_norms_move_in_its_search_and_every_bit_of_a_score_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session, seen = make_session(build("residual"), epochs=4.0, pretrained=True), {}
    raised, train_only = ScoreAscent.raised, Session.train_only

    def watch(self: Session, *args: Any, **settings: Any) -> None:
        before = state(self.model)
        train_only(self, *args, **settings)
        seen["moved"] = {n.split(".")[0] for n, v in self.model.state_dict().items() if not torch.equal(v, before[n])}

    class Watched:
        def __init__(self, *args: Any) -> None:
            self.context, self.ascent = raised(*args), args[0]

        def __enter__(self) -> None:
            self.scores = [p.detach().clone() for p in self.ascent.parameters]
            self.context.__enter__()
            for before, after in zip(self.scores, self.ascent.parameters, strict=True):
                assert 0 < (after - before).norm().item() <= 0.03 * before.norm().item() * (1 + 1e-4)

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)
            assert all(torch.equal(a, b) for a, b in zip(self.scores, self.ascent.parameters, strict=True))
            seen["ascents"] = seen.get("ascents", 0) + 1

    monkeypatch.setattr(Session, "train_only", watch)
    monkeypatch.setattr(ScoreAscent, "raised", lambda *args: Watched(*args))
    rc.S2AP(host=rc.Hydra(search=0.5), gamma=0.03, warmup=0.5).run(session)
    assert seen["moved"] and all(name.startswith("bn") for name in seen["moved"])
    assert seen["ascents"] == 3, "of 6 steps the second half"
    assert session.history[1]["gamma"] == 0.03


def gates(widths: dict[str, int], seed: int = 0) -> Any:
    """Scores as channel norms are distributed, a quarter of the mean apart; half of each group stays open."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: nn.Parameter((1 + 0.25 * torch.randn(width, generator=generator)).abs()) for name, width in widths.items()
    }
    rule = TopK(lambda scores: {name: width // 2 for name, width in widths.items()})
    return SimpleNamespace(
        scores=scores,
        parameters=lambda: list(scores.values()),
        kept=lambda values=None: rule.bits(scores if values is None else values),
    )


def climb(ascent: ScoreAscent, gate: Any, seed: int) -> None:
    """One step along a random gradient, which the masks of before and after it are compared for."""
    generator = torch.Generator().manual_seed(seed)
    slopes = [torch.randn(s.shape, generator=generator) for s in gate.scores.values()]

    def loss() -> torch.Tensor:
        return torch.stack([(s * g).sum() for s, g in zip(gate.scores.values(), slopes, strict=True)]).sum()

    masks = gate.kept()
    with ascent.raised(nn.Identity(), loss):
        ascent.note(loss())
        changed = sum(int((bits != masks[name]).sum()) for name, bits in gate.kept().items())
    ascent.changed = changed  # type: ignore[attr-defined]


@pytest.mark.parametrize("flips", [0.005, 0.01, 0.03])
def test_the_radius_flips_the_wanted_share(flips: float) -> None:
    gate = gates({"a": 512, "b": 1024, "c": 64})
    ascent = ScoreAscent(gate, gamma=None, flips=flips)
    climb(ascent, gate, 1)
    assert ascent.changed / 1600 == pytest.approx(flips, abs=2.1 / 1600)  # bits flip in pairs
    record = ascent.read()
    assert record["flips"] == pytest.approx(ascent.changed / 1600, abs=1e-6)
    assert record["loss_after"] > record["loss_before"]
    for seed in range(2, 7):  # another direction of the same epoch flips about as many
        climb(ascent, gate, seed)
    record = ascent.read()
    assert record["flips"] == pytest.approx(flips, rel=0.4)


def test_a_small_network_gets_at_least_one_swap() -> None:
    gate = gates({"a": 16, "b": 12})
    ascent = ScoreAscent(gate, gamma=None, flips=0.005)
    climb(ascent, gate, 1)
    assert ascent.changed == 2, "one in, one out: less would do nothing at all"


def test_a_radius_depends_on_its_own_epoch_alone() -> None:
    gate = gates({"a": 512})
    long, fresh = (ScoreAscent(gate, gamma=None, flips=0.02) for _ in range(2))
    climb(long, gate, 1)
    first = long.read()
    climb(long, gate, 2)
    climb(fresh, gate, 2)
    assert long.read() == fresh.read() != first


def test_a_radius_that_is_given_is_kept() -> None:
    gate = gates({"a": 512})
    ascent = ScoreAscent(gate, gamma=0.3, flips=0.01)
    for _ in range(2):
        climb(ascent, gate, 1)
        record = ascent.read()
        assert record["gamma"] == 0.3 and record["flips"] > 0.1


def test_calibration_finds_the_smallest_radius_and_knows_when_there_is_none() -> None:
    assert calibrate(lambda gamma: gamma, 0.01) == pytest.approx(0.01, rel=1e-4)
    assert calibrate(lambda gamma: math.floor(gamma * 50) / 50, 0.001) == pytest.approx(0.02, rel=1e-4)
    assert calibrate(lambda gamma: min(gamma, 0.003), 0.01) == pytest.approx(0.003, rel=1e-4), "all there is"
    assert calibrate(lambda gamma: 0.0, 0.01) == 0.0


def test_scores_that_cannot_flip_stay_and_are_tried_again() -> None:
    gate = gates({"a": 8})
    ascent = ScoreAscent(gate, gamma=None, flips=0.01)
    with ascent.raised(nn.Identity(), lambda: 0 * gate.scores["a"].sum()):
        pass
    climb(ascent, gate, 1)
    record = ascent.read()
    assert record["gamma"] > 0 and record["flips"] == pytest.approx((0 + 2 / 8) / 2)


def test_hosts_by_name_by_json_and_as_they_are() -> None:
    for host in ("hydra", {"name": "hydra"}, rc.Hydra()):
        assert make_strategy("s2ap", host=host) == rc.S2AP()
    made = rc.S2AP(host=rc.Hydra(search=0.3, score_lr=0.5), gamma=0.02, warmup=0.5, finetune_awp=0.0)
    record = json.loads(json.dumps(made.to_json()))
    assert record["host"] == rc.Hydra(search=0.3, score_lr=0.5).to_json() and record["host"]["name"] == "hydra"
    assert make_strategy(record.pop("name"), **record) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "magnitude"}, "host='magnitude' learns no scores; give one of: .*hydra"),
        ({"host": rc.Grape()}, "host=Grape.* learns no scores"),
        ({"host": rc.S2AP()}, "host=S2AP.* learns no scores"),
        ({"host": 3}, "host=3 learns no scores"),
        ({"host": "hidra"}, "'hidra' does not exist; did you mean 'hydra'"),
        ({"host": {"search": 0.1}}, "has no 'name'"),
        ({"host": {"name": "hydra", "serch": 0.1}}, "'serch' does not exist; did you mean 'search'"),
        ({"host": {"name": "hydra", "search": 2}}, "search=2"),
        ({"gamma": -0.1}, "gamma=-0.1"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"gamma": "auto"}, "gamma='auto'"),
        ({"flips": 0.0}, "flips=0.0"),
        ({"flips": 0.9}, "flips=0.9"),
        ({"flips": None}, "flips=None"),
        ({"warmup": 1.1}, "warmup=1.1"),
        ({"finetune_awp": -1}, "finetune_awp=-1"),
        ({"host": "none", "gamma": 2, "flips": 2}, r"(?s)host='none'.*gamma=2.*flips=2"),
    ],
    ids=str,
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(rc.InputError, match=message):
        rc.S2AP(**options)


def test_an_objective_without_parts_is_refused_before_any_training() -> None:
    session = make_session(build("chain"), objective=Whole())
    with pytest.raises(rc.InputError, match="'whole' cannot be split"):
        rc.S2AP().run(session)
    assert session.history == []
    rc.S2AP(gamma=0.0, finetune_awp=0.0).run(session)
    assert session.history


def test_it_learns_to_keep_what_matters() -> None:
    """Half of a trained layer is silenced: the search under ascents, too, swaps it for channels that live."""
    session = make_session(build("chain"), epochs=30.0, objective=PGDAT(steps=1))
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
    trained = make_session(model, epochs=30.0, pretrained=True)
    rc.S2AP(host=rc.Hydra(pretrain=0.0, search=0.95, score_lr=0.1), flips=0.03).run(trained)
    kept = set(next(e.sources for e in trained.editor.edits if e.group == "conv2"))
    assert len(kept - dead) >= 6
