"""How many of what is kept: uniformly, by one ranking of all, with residual streams frozen; within the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import robustcompress as rc
from robustcompress.session import Session
from robustcompress.strategies.units import Channels, Choice, Weights, at_least_one, granular, shares
from robustcompress.structure.weights import count_weights
from tests.strategies.nets import build, make_session, small_data

sizes = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 500), min_size=1, max_size=8)


@given(sizes, st.floats(0.0, 1.0))
def test_shares_spend_the_total_in_proportion_and_leave_nobody_empty(sizes: dict[str, int], density: float) -> None:
    total = max(len(sizes), int(density * sum(sizes.values())))
    counts = shares(sizes, total)
    assert sum(counts.values()) == total
    for name, size in sizes.items():
        assert 1 <= counts[name] <= size
        exact = total * size / sum(sizes.values())
        assert counts[name] <= max(1, exact + 1) and counts[name] >= min(exact, size) - len(sizes) - 1


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(0, 50), min_size=1, max_size=8))
def test_one_for_each_is_taken_from_whoever_has_most(counts: dict[str, int]) -> None:
    made = at_least_one(counts)
    assert all(count >= 1 for count in made.values())
    assert sum(made.values()) == max(sum(counts.values()), len(counts))
    assert all(made[name] <= max(1, count) for name, count in counts.items())


def session(net: str = "residual", budget: rc.Budget | None = None, **settings: Any) -> Session:
    return make_session(build(net), budget=budget or rc.Budget(macs=0.5), **settings)


@pytest.mark.parametrize("net", ["chain", "residual", "joined"])
@pytest.mark.parametrize("macs", [0.3, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_one_ranking_of_all_channels_meets_the_budget_and_respects_the_order(net: str, macs: float, seed: int) -> None:
    run = session(net, rc.Budget(macs=macs))
    units = Channels(run, allocation="global", residual="coupled")
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(width, generator=generator) for name, width in units.widths.items()}
    counts = units.counts(scores)
    assert run.fits(counts)
    assert not any(run.fits({**counts, n: counts[n] + 1}) for n in counts if counts[n] < units.widths[n]), "all spent"
    units_of_one = {n: s * (3.0 if n == next(iter(scores)) else 1.0) for n, s in scores.items()}
    assert units.counts(units_of_one) == counts, "scores are compared as shares of their group's largest"
    boosted = next(iter(scores))
    flat = {**scores, boosted: torch.ones_like(scores[boosted])}
    assert units.counts(flat)[boosted] == units.widths[boosted], "a group of equals stays whole while others can give"


def test_a_frozen_residual_stream_keeps_its_width() -> None:
    run = session("residual", rc.Budget(macs=0.75))
    frozen, coupled = (Channels(run, allocation="uniform", residual=r) for r in ("freeze", "coupled"))  # type: ignore[arg-type]
    residual = {g.name for g in run.editor.editable if g.kind == "residual"}
    assert residual and set(coupled.widths) - set(frozen.widths) == residual
    counts = frozen.counts({})
    assert run.fits(counts) and all(width < frozen.widths[name] for name, width in counts.items())


def test_a_budget_that_frozen_streams_cannot_meet_is_refused_before_any_training() -> None:
    with pytest.raises(rc.BudgetError, match="cannot be reached"):
        rc.compress(build("residual"), rc.Magnitude(residual="freeze"), budget=0.05, progress=False)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_weights_are_counted_to_the_last(allocation: Any, density: float) -> None:
    run = session("residual", rc.Budget(density=density))
    units = Weights(run, allocation=allocation)
    total = count_weights(run.model)[0]
    counts = units.counts(units.magnitudes())
    assert sum(counts.values()) == units.total == int(density * total)
    assert all(1 <= counts[name] <= size for name, size in units.sizes.items())
    if allocation == "uniform":
        assert all(abs(counts[n] - density * size) <= 1 for n, size in units.sizes.items())


def test_one_ranking_of_all_weights_keeps_the_largest() -> None:
    run = session("chain", rc.Budget(density=0.4))
    units = granular(run, granularity="weight", allocation="global")
    values = units.magnitudes()
    counts = units.counts(values)
    everything = torch.cat([v.abs().flatten() for v in values.values()]).sort(descending=True).values
    threshold = everything[sum(counts.values()) - 1]
    assert {n: int((v.abs() >= threshold).sum()) for n, v in values.items()} == counts
    scores = units.first_scores(values)
    assert units.counts(scores) == counts, "the first scores of a search rank as the weights do"


def test_a_cut_of_weights_takes_counts_that_were_chosen() -> None:
    run = session("chain", rc.Budget(density=0.2))
    units = Weights(run, allocation="uniform")
    counts = dict.fromkeys(units.sizes, 2)
    with units.cut(lambda: Choice(units.magnitudes(), lambda: counts)):
        assert count_weights(run.model)[1] == 2 * len(counts)
        run.train("finetune", share=1.0)
    run.settle()
    assert count_weights(run.model)[1] <= 2 * len(counts)
    assert run.history[0]["weights"] == counts and 0 < run.history[0]["density"] < 0.2


def test_heads_go_one_by_one_whatever_widths_are_rounded_to() -> None:
    spec = rc.ModelSpec("vit_micro", {"image_size": 16})
    run = make_session(spec.build(), budget=rc.Budget(macs=0.5), round_to=8)
    units = Channels(run, allocation="global", residual="coupled")
    generator = torch.Generator().manual_seed(0)
    found = [units.counts({n: torch.rand(w, generator=generator) for n, w in units.widths.items()})]
    found.append(Channels(run, allocation="uniform", residual="coupled").counts({}))
    for counts in found:
        heads = {g.name for g in run.editor.editable if g.kind == "heads"}
        assert heads and run.fits(counts)
        assert any(counts[name] % 8 for name in heads) and all(counts[name] >= 1 for name in heads)
        assert all(width % 8 == 0 for name, width in counts.items() if name not in heads)


@pytest.mark.parametrize(("net", "round_to"), [("residual", 8)])
def test_a_width_that_is_no_multiple_can_be_kept_whole(net: str, round_to: int) -> None:
    run = session(net, rc.Budget(macs=0.99), round_to=round_to)
    counts = Channels(run, allocation="uniform", residual="coupled").counts({})
    full = {g.name: g.width for g in run.editor.editable}
    odd = [name for name, width in full.items() if width % round_to]
    assert odd and any(counts[name] == full[name] for name in odd)
    assert all(counts[name] % round_to == 0 or counts[name] == full[name] for name in counts)
    used = run.cost_model.predict(counts)[0] / run.limits[0]
    assert 0.9 < used <= 1, "what is left is less than a step of any group"


def test_a_layer_of_zeros_can_be_searched_and_cut() -> None:
    model = build("chain")
    torch.nn.init.zeros_(model.fc.weight)
    run = make_session(model, budget=rc.Budget(density=0.2), epochs=3.0)
    rc.Hydra(granularity="weight", pretrain=0.0, search=0.5, score_lr=0.1).run(run)
    run.settle()
    assert run.model.fc.weight.count_nonzero() > 5
    assert sum(bool(row.any()) for row in run.model.fc.weight) >= 5, "many classes have some"
    flat = make_session(model, budget=rc.Budget(macs=0.5), epochs=1.0)
    rc.Harp(pretrain=0.0).run(flat)
    assert flat.fits(flat.editor.widths)


@pytest.mark.parametrize("net", ["chain", "residual", "joined", "imported"])
def test_the_density_that_is_advised_is_enough(net: str) -> None:
    def run(density: float) -> None:
        rc.compress(
            build(net),
            rc.Magnitude(granularity="weight"),
            budget=rc.Budget(density=density),
            data=small_data(),
            epochs=0.1,
            objective="natural",
            attacks=(),
            progress=False,
        )

    with pytest.raises(rc.BudgetError, match="give at least") as caught:
        run(1e-5)
    run(float(str(caught.value).rsplit(" ", 1)[1]))
