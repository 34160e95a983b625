"""GRAPE: its events, its score against oracles, and that growth is what the structural layer promises."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import robustcompress as rc
from robustcompress.robust.attacks import eval_mode
from robustcompress.session import Session
from robustcompress.shapes import floor_widths, rounded, uniform_widths
from robustcompress.strategies.grape import Grape, _spend
from robustcompress.strategies.utilization import Utilization, _ranks, _Taps, measure_utilization
from tests.strategies.nets import build, make_session, small_data

ORDERS = ("guided", "random", "uniform", "sequential")


def grown(net: str = "residual", *, epochs: float = 1.0, seed: int = 0, **options: Any) -> Session:
    session = make_session(build(net), epochs=epochs, seed=seed)
    Grape(**options).run(session)
    return session


@pytest.mark.parametrize("events", [1, 3])
def test_phases_and_events_come_in_the_planned_order(events: int) -> None:
    session = grown(events=events, epochs=8.0, grow_until=0.5)
    told = [r["phase"] if "event" not in r else f"{r['event']}@{r['phase']}" for r in session.history]
    once = [name for i, name in enumerate(told) if i == 0 or told[i - 1] != name]
    planned = ["prune@prune"]
    for event in range(1, events + 1):
        planned += [f"grow {event}/{events}", f"grow@grow {event}/{events}"]
    assert once == [*planned, "tail"]
    steps = {r["phase"]: r["steps"] for r in session.history if "steps" in r}
    assert steps.pop("tail") == 12
    assert set(steps.values()) == {12 // events}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("net", ["residual", "joined", "chain", "transformer"])
def test_every_order_ends_within_budget_and_caps(order: Any, net: str) -> None:
    reference = make_session(build(net))
    full, target = reference.editor.widths, uniform_widths(reference)
    session = grown(net, order=order, cap=1.25)
    assert session.cost().macs <= session.limits[0]
    assert session.cost().macs > 0.85 * session.limits[0]
    for group in session.editor.editable:
        grows = group.kind in ("hidden", "heads")
        cap = max(target[group.name], int(1.25 * full[group.name])) if grows else target[group.name]
        assert group.width <= cap, group.name
    if order in ("uniform", "sequential"):
        assert {g.name: g.width for g in session.editor.editable} == target


@pytest.mark.parametrize("round_to", [1, 4])
def test_the_seed_is_narrow_where_growth_is_possible_and_nowhere_else(
    round_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(build("residual"), round_to=round_to, budget=rc.Budget(macs=0.6))
    target, floor = uniform_widths(session), floor_widths(session.editor, round_to)
    kinds = {g.name: g.kind for g in session.editor.editable}
    monkeypatch.setattr(Session, "train", lambda *_, **__: None)
    monkeypatch.setattr(Grape, "_grow", lambda *_: None)
    Grape(seed=0.5).run(session)
    for group in session.editor.editable:
        name, width = group.name, target[group.name]
        expected = rounded(0.5 * width, round_to, floor[name], width) if kinds[name] == "hidden" else width
        assert group.width == expected, name


@pytest.mark.parametrize("order", ["uniform", "sequential"])
def test_scheduled_growth_is_on_its_way_after_every_event(order: Any) -> None:
    session = grown(order=order, events=3)
    widths = [r["widths"] for r in session.history if "widths" in r]
    assert len(widths) == 4
    for early, late in itertools.pairwise(widths):
        assert all(early[name] <= late[name] for name in early)
    changed = [{n for n in a if a[n] != b[n]} for a, b in itertools.pairwise(widths)]
    if order == "sequential":
        assert not (changed[0] & changed[1] or changed[1] & changed[2] or changed[0] & changed[2])


@pytest.mark.parametrize("init", ["pair", "zero_out", "clone"])
@pytest.mark.parametrize("net", ["residual", "joined", "transformer"])
def test_growth_changes_no_output_and_keeps_every_moment(net: str, init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each event, of the raw and of the averaged network; old channels keep their momentum bit for bit."""
    grow, events = Grape._grow, []
    x = small_data().test.as_float()

    def outputs(session: Session) -> list[torch.Tensor]:
        found = []
        for network in (session.model, session.averaged):
            for training in (False, True):
                found.append(copy.deepcopy(network).train(training)(x).detach())
        return found

    def moments(session: Session) -> dict[str, torch.Tensor]:
        assert session._optimizer is not None
        held = session._optimizer.state
        return {n: held[p]["momentum_buffer"].clone() for n, p in session.model.named_parameters()}

    def watched(self: Grape, session: Session, *args: Any) -> None:
        before, old, widths = outputs(session), moments(session), session.editor.widths
        grow(self, session, *args)
        new = moments(session)
        assert session._optimizer is not None
        live = {id(p) for group in session._optimizer.param_groups for p in group["params"]}
        assert live == {id(p) for p in session.model.parameters()}
        for a, b in zip(before, outputs(session), strict=True):
            assert torch.allclose(a, b, atol=2e-4), float((a - b).abs().max())
        for name, tensor in old.items():
            if tensor.shape == new[name].shape:
                assert torch.equal(new[name], tensor), name
            elif net == "residual":  # without concatenation newcomers are behind the old channels
                part = new[name][tuple(slice(size) for size in tensor.shape)]
                assert torch.equal(part, tensor), name
                rest = new[name].clone()
                rest[tuple(slice(size) for size in tensor.shape)] = 0
                assert not rest.any(), name
            else:
                assert math.isclose(float(new[name].double().sum()), float(tensor.double().sum()), abs_tol=1e-6), name
        events.append(sum(session.editor.widths.values()) - sum(widths.values()))

    monkeypatch.setattr(Grape, "_grow", watched)
    session = make_session(build(net), epochs=2.0)
    Grape(init=init, events=2).run(session)
    assert len(events) == 2 and sum(events) > 0


def test_random_growth_depends_on_the_seed_alone() -> None:
    widths = [grown(order="random", epochs=0.2, seed=seed).editor.widths for seed in (0, 0, 1, 2)]
    assert widths[0] == widths[1]
    assert not widths[0] == widths[2] == widths[3]


def test_guided_growth_follows_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(session: Session, groups: list[str], *, batches: int) -> dict[str, Utilization]:
        return {name: Utilization(0.5, 0.5, 100.0 if name == wanted else 1e-3) for name in groups}

    monkeypatch.setattr("robustcompress.strategies.grape.measure_utilization", score)
    ends = {}
    for wanted in ("conv1", "conv3"):
        ends[wanted] = grown(epochs=0.2, events=2).editor.widths
    assert ends["conv1"]["conv1"] > ends["conv3"]["conv1"]
    assert ends["conv3"]["conv3"] > ends["conv1"]["conv3"]


def test_beta_zero_leaves_the_pressure_out() -> None:
    used = Utilization(0.8, 0.4, 7.0)
    harmonic = 2 * 0.8 * 0.4 / 1.2
    assert used.score(0.0) == pytest.approx(harmonic)
    assert used.score(2.0) == pytest.approx(harmonic * 49)
    assert Utilization(0.0, 0.0, 0.0).score(1.0) == 1e-6


@pytest.mark.parametrize("n", [1, 2, 7])
def test_ranks_of_known_spectra(n: int) -> None:
    assert _ranks(torch.eye(n, dtype=torch.float64) * 3) == pytest.approx((1.0, 1.0))
    vector = torch.arange(1, n + 1, dtype=torch.float64)
    assert _ranks(torch.outer(vector, vector)) == pytest.approx((1 / n, 1 / n), abs=1e-6)
    assert _ranks(torch.zeros(n, n, dtype=torch.float64)) == (1 / n, 1 / n)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.integers(0, 99))
def test_ranks_depend_on_the_spectrum_alone_and_are_ordered(values: list[float], seed: int) -> None:
    spectrum = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    rotation = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    soft, hard = _ranks(rotation @ torch.diag(spectrum) @ rotation.T)
    if spectrum.sum() > 1e-3:
        p = spectrum / spectrum.sum()
        assert hard == pytest.approx(float(1 / p.square().sum()) / n, rel=1e-4)
        assert soft == pytest.approx(math.exp(-sum(v * math.log(v) for v in p.tolist() if v > 0)) / n, rel=1e-3)
    assert 1 / n - 1e-6 <= hard <= soft + 1e-6 <= 1 + 1e-5, "Renyi entropies fall with their order"


class Pressed(nn.Module):
    """Two equal branches; the logits listen ten times as hard to the first."""

    def __init__(self, gain: float, *, joined: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.b.load_state_dict(self.a.state_dict())
        self.joined = joined
        if joined:
            self.head = nn.Conv2d(12, 10, 1)
            half = torch.randn(10, 6, 1, 1) * 0.1
            self.head.weight.data.copy_(torch.cat([gain * half, half], 1))
        else:
            self.head_a, self.head_b = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)
            self.head_b.load_state_dict(self.head_a.state_dict())
            self.head_a.weight.data.mul_(gain)
            self.fc = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        if self.joined:
            return self.head(torch.cat([a, b], 1)).mean((2, 3))
        return self.fc((self.head_a(a) + self.head_b(b)).mean((2, 3)))


@pytest.mark.parametrize("joined", [True, False], ids=["concat", "sum"])
def test_pressure_is_in_proportion_to_the_gradient(joined: bool) -> None:
    torch.manual_seed(0)
    session = make_session(Pressed(10.0, joined=joined))
    found = measure_utilization(session, ["a", "b"], batches=2)
    assert found["a"].pressure / found["b"].pressure == pytest.approx(10.0, rel=1e-3)
    assert (found["a"].pressure + found["b"].pressure) / 2 == pytest.approx(1.0)
    assert found["a"].soft_rank == pytest.approx(found["b"].soft_rank)
    assert found["a"].score(1.0) > 5 * found["b"].score(1.0)


def test_scores_repeat_and_leave_no_trace() -> None:
    found = []
    for _ in range(2):
        session = make_session(build("joined"))
        session.model.train()
        weights = copy.deepcopy(session.model.state_dict())
        found.append(measure_utilization(session, ["stem", "side", "point"], batches=2))
        assert all(torch.equal(weights[n], t) for n, t in session.model.state_dict().items())
        assert session.model.training
        assert all(p.grad is None and p.requires_grad for p in session.model.parameters())
        assert not any(m._forward_pre_hooks for m in session.model.modules())
    assert found[0] == found[1]


@pytest.mark.parametrize(("net", "group"), [("imported", "features.3"), ("joined", "side"), ("chain", "conv2")])
def test_a_group_is_looked_at_channel_by_channel(net: str, group: str) -> None:
    """Also behind a flatten, where each channel has many positions: a covariance over all of them is no spectrum of
    channels, and in a network of ordinary size it would not fit into memory.
    """
    session = make_session(build(net))
    x = small_data().test.as_float()
    with _Taps(session, session.model, [group]) as taps, eval_mode(session.model):
        session.model(x)
    assert taps.channels(group, taps.seen[group]).shape[1] == session.editor.widths[group]


NET = make_session(build("residual"))
FULL = NET.editor.widths
HIDDEN = ("conv1", "conv3")


class Purse:
    """As much of a session as `_spend` looks at."""

    def __init__(self, limits: tuple[float, float], round_to: int) -> None:
        self.limits, self.cost_model, self.latency = limits, NET.cost_model, None
        self.goal = type("Goal", (), {"round_to": round_to})()
        self.editor = NET.editor

    def fits(self, widths: dict[str, int], *, without: tuple[str, ...] = ()) -> bool:
        assert not without
        macs, params = self.cost_model.predict(widths)
        return macs <= self.limits[0] and params <= self.limits[1]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    now=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    shares=st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)),
    caps=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    slack=st.tuples(st.floats(1.0, 4.0), st.one_of(st.floats(1.0, 4.0), st.just(math.inf))),
    left=st.integers(1, 4),
    round_to=st.sampled_from([1, 2, 8]),
)
def test_spending_never_exceeds_the_budget(
    now: tuple[int, int],
    shares: tuple[float, float],
    caps: tuple[int, int],
    slack: tuple[float, float],
    left: int,
    round_to: int,
) -> None:
    widths = {**FULL, **dict(zip(HIDDEN, now, strict=True))}
    macs, params = NET.cost_model.predict(widths)
    purse = Purse((macs * slack[0] + 1, params * slack[1] + 1), round_to)
    limits = {name: max(cap, width) for name, cap, width in zip(HIDDEN, caps, now, strict=True)}
    wanted = _spend(purse, widths, dict(zip(HIDDEN, shares, strict=True)), limits, left=left)  # type: ignore[arg-type]
    final = {name: max(widths[name], wanted.get(name, 0)) for name in widths}  # growth never shrinks a group
    assert purse.fits(final)
    for name in HIDDEN:
        assert widths[name] <= wanted[name] <= limits[name]
    if left == 1:
        for name in HIDDEN:
            wider = {**final, name: final[name] + round_to}
            assert wider[name] > limits[name] or not purse.fits(wider), "the last event spends what it can"


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": "guide"},
        {"seed": 0.0},
        {"seed": 1.5},
        {"seed": "half"},
        {"events": 0},
        {"events": 2.5},
        {"events": True},
        {"grow_until": 1.0},
        {"cap": 0.0},
        {"beta": -1.0},
        {"beta": float("nan")},
        {"init": "pairs"},
        {"score_batches": 0},
        {"score_batches": 1.5},
    ],
    ids=str,
)
def test_bad_options_are_named_before_anything_runs(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(rc.InputError) as caught:
        Grape(**wrong)
    assert f"{name}={value!r}" in str(caught.value)


def test_all_bad_options_are_named_at_once() -> None:
    with pytest.raises(rc.InputError, match=r"(?s)did you mean 'guided'.*seed=2.*events=0"):
        Grape(order="guide", seed=2, events=0)  # type: ignore[arg-type]
