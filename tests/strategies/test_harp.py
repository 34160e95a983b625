"""HARP: rates that are learnt, what they cost, and that the budget is met whatever was learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import robustcompress as rc
from robustcompress.robust.objectives import PGDAT, TRADES
from robustcompress.session import Session
from robustcompress.strategies.harp import EPOCHS, LearnedTopK, Price, PricedObjective, Rates
from robustcompress.strategies.units import granular
from robustcompress.structure.magnitudes import reader_norms
from tests.strategies.nets import build, make_session, state
from tests.train.test_ascent import Whole

BUDGETS = {"channel": rc.Budget(macs=0.5), "weight": rc.Budget(density=0.1)}
both = pytest.mark.parametrize("granularity", ["channel", "weight"])


def rates_of(granularity: Any, net: str = "residual", budget: rc.Budget | None = None) -> tuple[Session, Any, Rates]:
    session = make_session(build(net), budget=budget or BUDGETS[granularity])
    units = granular(session, granularity=granularity)
    return session, units, Rates(session, units, floor=0.1)


def shift(rates: Rates, seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rates.parameters():
            parameter.add_(spread * torch.randn((), generator=generator))


@both
def test_rates_start_where_the_uniform_network_meets_the_budget(granularity: str) -> None:
    _, _, rates = rates_of(granularity)
    values = list(rates.values().values())
    assert max(values) - min(values) < 1e-6
    assert float(rates.cost().detach()) == pytest.approx(1.0, abs=1e-3)


def test_the_cost_of_whole_widths_is_the_cost_models_own() -> None:
    session, units, rates = rates_of("channel", budget=rc.Budget(macs=0.5, params=0.6))
    widths = {name: max(1, width // 2) for name, width in units.widths.items()}
    macs, params = session.cost_model.predict(widths)
    exact = max(macs / session.limits[0], params / session.limits[1])
    found = rates._over({name: torch.tensor(float(width)) for name, width in widths.items()})
    assert float(found) == pytest.approx(exact, rel=1e-6)


@both
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_slope_of_the_cost_is_right_for_coupled_layers(granularity: str, seed: int) -> None:
    _, _, rates = rates_of(granularity)
    shift(rates, seed, 1.0)
    slopes = torch.autograd.grad(rates.cost(), rates.parameters())
    for parameter, slope in zip(rates.parameters(), slopes, strict=True):
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter.add_(step)
                ends.append(float(rates.cost()))
                parameter.sub_(step)
        assert float(slope) == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2, abs=2e-4)
        assert float(slope) >= 0


@pytest.mark.parametrize("net", ["chain", "residual", "joined"])
@both
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), spread=st.floats(0, 6))
def test_the_budget_is_met_whatever_was_learnt(granularity: str, net: str, seed: int, spread: float) -> None:
    session, units, rates = rates_of(granularity, net)
    shift(rates, seed, spread)
    before = rates.values()
    counts = rates.counts_in_budget()
    assert rates.values() == before, "only looked at"
    if granularity == "weight":
        assert sum(counts.values()) == units.total
        sizes = units.sizes
    else:
        assert session.fits(counts)
        sizes = units.widths
        wider = [n for n in counts if counts[n] < sizes[n] and session.fits({**counts, n: counts[n] + 1})]
        assert not wider, "nothing is left over"
    assert all(1 <= counts[name] <= sizes[name] for name in sizes)
    if spread == 0 and granularity == "weight":
        assert all(abs(counts[n] / sizes[n] - 0.1) < 0.1 for n in sizes)


def test_learnt_differences_between_layers_survive_the_budget() -> None:
    _, units, rates = rates_of("channel")
    names = list(units.widths)
    with torch.no_grad():
        rates.parameters()[names.index("conv1")].add_(3.0)
        rates.parameters()[names.index("conv3")].sub_(3.0)
    counts = rates.counts_in_budget()
    assert counts["conv1"] / units.widths["conv1"] > 2 * counts["conv3"] / units.widths["conv3"]


def test_a_rates_gradient_is_the_sum_of_its_masks() -> None:
    _, units, rates = rates_of("channel")
    scores = {n: nn.Parameter(torch.randn(w, generator=torch.Generator().manual_seed(w))) for n, w in
              units.widths.items()}  # fmt: skip
    rule = LearnedTopK(rates)
    masks = rule(scores)
    assert {n: int(m.detach().sum()) for n, m in masks.items()} == rates.counts()
    slopes = {n: torch.arange(float(len(m))) - 3 for n, m in masks.items()}
    total = torch.stack([(masks[n] * slopes[n]).sum() for n in masks]).sum()
    found = torch.autograd.grad(total, [*scores.values(), *rates.keep().values()], allow_unused=True)
    for (name, values), gradient in zip(scores.items(), found[: len(scores)], strict=True):
        assert torch.equal(gradient, slopes[name] * values.detach().sign())
    again = torch.autograd.grad(
        torch.stack([(rule(scores)[n] * slopes[n]).sum() for n in masks]).sum(), rates.parameters()
    )
    for name, parameter, gradient in zip(masks, rates.parameters(), again, strict=True):
        k = rates.keep()[name]
        (through,) = torch.autograd.grad(k, parameter)
        assert float(gradient) == pytest.approx(float(slopes[name].sum() * through), rel=1e-4)


def test_masks_follow_the_rates() -> None:
    _, units, rates = rates_of("weight", "chain")
    scores, rule = {n: nn.Parameter(v) for n, v in units.magnitudes().items()}, LearnedTopK(rates)
    before = {n: int(m.detach().sum()) for n, m in rule(scores).items()}
    with torch.no_grad():
        rates.parameters()[0].add_(1.0)
    after = {n: int(m.detach().sum()) for n, m in rule(scores).items()}
    first, *others = before
    assert after[first] > before[first] and all(after[n] == before[n] for n in others)


def test_channels_start_from_what_reads_them() -> None:
    """The released code mixes outputs into the norms: a kernel with all its mass on one input gave equal scores."""
    session = make_session(build("chain"))
    with torch.no_grad():
        session.model.conv2.weight.zero_()
        session.model.conv2.weight[:, 2] = 1.0
    norms = reader_norms(session.editor, only=["conv1", "conv2"])
    assert norms["conv1"].nonzero().flatten().tolist() == [2]
    assert float(norms["conv1"][2]) == 16 * 9
    expected = session.model.conv3.weight.detach().abs().sum((0, 2, 3)).double()
    assert torch.allclose(norms["conv2"], expected)


def test_the_price_grows_while_the_cost_is_away_from_the_target_and_then_stays() -> None:
    _, _, rates = rates_of("channel")
    price = Price(PGDAT(steps=1), rates, weight=0.01, steps=2 * EPOCHS)
    for _ in range(8):
        price.step()
    assert price.weight == 0.01 and float(price().detach()) < 1e-4, "a search starts at its budget"
    for shift in (1.0, -2.0):
        with torch.no_grad():
            for parameter in rates.parameters():
                parameter.add_(shift)
        before, weights = int(price.raised), []
        for _ in range(8):
            price.step()
            weights.append(price.weight)
        assert weights == pytest.approx([0.01 * (1 + before + (step + 1) // 2) for step in range(8)])
        away = float(rates.cost().detach()) - 1
        assert away * shift > 0 and float(price().detach()) == pytest.approx(weights[-1] * abs(away))
    with torch.no_grad():
        for parameter in rates.parameters():
            parameter.add_(1.0)
    for _ in range(8):
        price.step()
    assert price.weight == pytest.approx(weights[-1])
    twin = Price(PGDAT(steps=1), rates, weight=0.01, steps=2 * EPOCHS)
    twin.load_state_dict(price.state_dict())
    assert twin.weight == price.weight and int(twin.done) == int(price.done), "checkpoints hold it"


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_a_search_stays_near_its_budget(granularity: Any) -> None:
    session = make_session(build("residual"), budget=BUDGETS[granularity], epochs=20.0, pretrained=True)
    rc.Harp(granularity=granularity, pretrain=0.0, search=0.9).run(session)
    costs = [r["cost_over_target"] for r in session.history if "cost_over_target" in r]
    assert len(costs) == 18 and all(0.8 < cost < 1.25 for cost in costs[4:]), costs
    weights = [r["cost_weight"] for r in session.history if "cost_weight" in r]
    assert weights == sorted(weights) and weights[-1] >= 0.1


@pytest.mark.parametrize("objective", [PGDAT(steps=1), TRADES(steps=1)], ids=["pgd-at", "trades"])
def test_the_objective_is_the_goals_and_the_price(objective: Any) -> None:
    session, _, rates = rates_of("channel")
    with torch.no_grad():
        for parameter in rates.parameters():
            parameter.add_(1.0)
    price = Price(objective, rates, weight=0.5, steps=4)
    priced = PricedObjective(price)
    x, y = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    x_adv = priced.attack(session.model, x, y, session.goal.threat, generator=torch.Generator().manual_seed(0))
    plain = objective.attack(session.model, x, y, session.goal.threat, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x_adv, plain) and int(price.done) == 1
    session.model.eval()
    difference = priced.loss_on(session.model, x, x_adv, y).loss - objective.loss_on(session.model, x, x_adv, y).loss
    assert float(difference.detach()) == pytest.approx(float(price().detach()), rel=1e-3)
    assert priced.to_json() == objective.to_json()


@both
def test_rates_and_cost_are_in_the_history_and_only_rates_scores_and_norms_move(granularity: str) -> None:
    session = make_session(build("residual"), budget=BUDGETS[granularity], epochs=4.0, pretrained=True)
    before = state(session.model)
    seen: dict[str, Any] = {}
    train_only = Session.train_only

    def watch(self: Session, *args: Any, **options: Any) -> None:
        train_only(self, *args, **options)
        seen.update({n: p.detach().clone() for n, p in self.model.named_parameters() if "weight" in n})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "train_only", watch)
        rc.Harp(granularity=granularity, search=0.5, rate_lr=0.3).run(session)  # type: ignore[arg-type]
    epochs = [r for r in session.history if r["phase"] == "search" and "epoch" in r]
    assert len(epochs) == 2 and epochs[0]["rates"] != epochs[1]["rates"]
    assert all(0 < k < 1 for r in epochs for k in r["rates"].values())
    assert all(0 < r["cost_over_target"] < 10 for r in epochs)
    for name, tensor in seen.items():
        stem = name.replace("parametrizations.weight.original", "weight")
        if "bn" not in stem and stem in before:
            assert torch.equal(tensor, before[stem]), stem


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rate_lr": -1.0}, "rate_lr=-1.0"),
        ({"cost_weight": float("nan")}, "cost_weight=nan"),
        ({"floor": 1.0}, "floor=1.0"),
        ({"search": 2.0}, "search=2.0"),
        ({"allocation": "global"}, "harp learns how much of each layer is kept"),
    ],
    ids=str,
)
def test_bad_options_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(rc.InputError, match=said):
        rc.Harp(**wrong)


def test_an_objective_without_parts_is_refused_before_any_training() -> None:
    session = make_session(build("chain"), objective=Whole())
    with pytest.raises(rc.InputError, match="'whole' cannot be split"):
        rc.Harp().run(session)
    assert session.history == []
