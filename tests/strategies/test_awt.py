"""AWT: masked kernels are those of pruned networks, tickets keep their initialisation, runs go on bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import robustcompress as rc
from robustcompress.robust.objectives import PGDAT, TRADES, Objective
from robustcompress.robust.tangent import tangent_kernel, trained_parameters
from robustcompress.session import Session
from robustcompress.strategies import saliency
from robustcompress.strategies.tickets import TangentDistance, compare_tickets
from robustcompress.strategies.units import granular
from robustcompress.structure.masks import TopK, largest_entries
from robustcompress.structure.weights import WeightGates, maskable_weights
from tests.robust.test_tangent import images, jacobian, make
from tests.strategies.nets import SIZE, build, make_session, same, state
from tests.strategies.test_resume import compress, until_finished, without_times

WEIGHT: dict[str, Any] = {"granularity": "weight"}
TENTH = rc.Budget(density=0.1)
SMALL = settings(max_examples=8, deadline=None)


def drawn(like: Mapping[str, Tensor], seed: int, *, share: float = 0.5) -> dict[str, Tensor]:
    """Bits, at least one of each."""
    generator = torch.Generator().manual_seed(seed)
    bits = {name: torch.rand(t.shape, generator=generator) < share for name, t in like.items()}
    for mask in bits.values():
        mask.view(-1)[0] = True
    return bits


def output(seed: int) -> Tensor:
    return torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("net", ["chain", "residual", "joined"])
@SMALL
@given(seed=st.integers(0, 1000))
def test_the_kernel_under_channel_gates_is_that_of_the_pruned_network(net: str, seed: int) -> None:
    model = make(net, seed)
    editor = rc.StructuralEditor(model, torch.zeros(2, 3, SIZE, SIZE))
    bits = drawn({group.name: torch.zeros(group.width) for group in editor.editable}, seed)
    x, x_adv, v = images(seed, 3), images(seed + 1, 2), output(seed)
    with editor.gates({name: b.float() for name, b in bits.items()}):
        masked = tangent_kernel(model, x, x_adv, v, trained_parameters(model))
    whole = tangent_kernel(model, x, x_adv, v, trained_parameters(model))
    for name, mask in bits.items():
        editor.prune(name, mask.nonzero().flatten().tolist())
    pruned = tangent_kernel(model, x, x_adv, v, trained_parameters(model))
    assert torch.allclose(masked, pruned, rtol=1e-9, atol=1e-12)
    assert torch.allclose(pruned, jacobian(model, x, v) @ jacobian(model, x_adv, v).T, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(masked, whole, rtol=1e-3)


@pytest.mark.parametrize("net", ["residual", "imported"])
@SMALL
@given(seed=st.integers(0, 1000))
def test_the_kernel_under_weight_gates_is_that_in_the_surviving_weights(net: str, seed: int) -> None:
    model = make(net, seed)
    bits = drawn(maskable_weights(model), seed)
    x, x_adv, v = images(seed, 2), images(seed + 1, 3), output(seed)
    with WeightGates(model, {name: b.float() for name, b in bits.items()}):
        masked = tangent_kernel(model, x, x_adv, v, trained_parameters(model))
    for name, weight in maskable_weights(model).items():
        with torch.no_grad():
            weight.mul_(bits[name])
    survive = torch.cat([bits.get(n, torch.ones_like(p)).flatten() for n, p in model.named_parameters()])
    wanted = (jacobian(model, x, v) * survive) @ jacobian(model, x_adv, v).T
    assert torch.allclose(masked, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("granularity", ["channel", "weight"])
@SMALL
@given(seed=st.integers(0, 1000))
def test_its_gradient_in_soft_gates_is_what_differences_say(granularity: str, seed: int) -> None:
    model = make("joined", seed)
    editor = rc.StructuralEditor(model, torch.zeros(2, 3, SIZE, SIZE))
    x, x_adv, v = images(seed, 2), images(seed + 1, 2), output(seed)
    shapes = {g.name: torch.zeros(g.width) for g in editor.editable} if granularity == "channel" else None
    generator = torch.Generator().manual_seed(seed)
    soft = {n: torch.rand(t.shape, generator=generator) + 0.5 for n, t in (shapes or maskable_weights(model)).items()}
    with editor.gates(soft) if granularity == "channel" else WeightGates(model, soft) as gates:
        gradients = torch.autograd.grad(
            tangent_kernel(model, x, x_adv, v, trained_parameters(model)).square().sum(), gates.parameters()
        )
        along = {n: torch.randn(s.shape, generator=generator) for n, s in gates.scores.items()}
        rule, step, values = gates.rule, 1e-8, []  # so small that hardly a ReLU changes its side, where kernels jump
        for sign in (1, -1):  # in double precision: scores themselves are floats
            gates.rule = lambda scores, sign=sign: {  # type: ignore[misc]
                n: s.double() + sign * step * along[n].double() for n, s in rule(scores).items()
            }
            with torch.no_grad():
                values.append(float(tangent_kernel(model, x, x_adv, v, trained_parameters(model)).square().sum()))
    slope = sum(float((g.double() * along[n].double()).sum()) for n, g in zip(along, gradients, strict=True))
    scale = sum(float((g.double() * along[n].double()).abs().sum()) for n, g in zip(along, gradients, strict=True))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, abs=1e-3 * scale)


def distance_of(model: nn.Module, dense: nn.Module, attack: Objective, **options: Any) -> TangentDistance:
    return TangentDistance(dense, attack, dict(model.named_parameters()), **({"samples": 3, "weight": 2.0} | options))


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_the_loss_is_what_it_says_and_reaches_closed_units(granularity: str) -> None:
    session = make_session(build("residual"), budget=TENTH if granularity == "weight" else rc.Budget(macs=0.5))
    session.recalibrate()
    model = session.model.eval()
    units = granular(session, granularity=granularity)  # type: ignore[arg-type]
    dense = copy.deepcopy(model).requires_grad_(False)
    objective = distance_of(model, dense, PGDAT(steps=2))
    x, y = session.goal.data.train.first(8).as_float(), session.goal.data.train.first(8).labels
    noise = torch.Generator().manual_seed(4)
    x_adv = objective.attack(model, x, y, session.goal.threat, generator=noise)
    assert torch.equal(x_adv[3:], x[3:]) and not torch.equal(x_adv[:3], x[:3])
    first = units.first_scores(units.magnitudes())
    with units.gates(first, TopK(units.counts)) as gates:
        step = objective.loss_on(model, x, x_adv, y)  # in eval mode statistics stay
        step.loss.backward()  # type: ignore[no-untyped-call]
        closed = {name: ~bits for name, bits in gates.kept().items()}
        assert any(bool((gates.scores[n].grad[c] != 0).any()) for n, c in closed.items())  # type: ignore[index]
        f_s = model(x).detach()
        k_s = tangent_kernel(model, x[:3], x_adv[:3], objective._direction, trained_parameters(model))
    assert objective._direction is not None
    f_d, v = dense.eval()(x), objective._direction
    k_d = (
        jacobian(copy.deepcopy(dense).requires_grad_(True), x[:3], v)
        @ jacobian(copy.deepcopy(dense).requires_grad_(True), x_adv[:3], v).T
    )
    outputs, kernel = (float(((a - b).norm() / b.norm()).detach()) for a, b in ((f_s, f_d), (k_s, k_d)))
    assert step.loss.item() == pytest.approx(outputs**2 + 2 * kernel**2, rel=1e-4)
    assert objective.read() == pytest.approx({"output_distance": outputs, "kernel_distance": kernel}, rel=1e-4)
    alone = objective.loss_on(model, x, x_adv, y).loss.detach()
    assert float(alone) == pytest.approx(0, abs=1e-8), "all open, the network is the dense one"


def stopped_before_training(strategy: rc.Strategy, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run up to the first phase that trains weights."""

    class Reached(Exception):
        pass

    def train(self: Session, phase: str, **_: Any) -> None:
        assert phase == "finetune"
        raise Reached

    with monkeypatch.context() as patch, pytest.raises(Reached):
        patch.setattr(Session, "train", train)
        strategy.run(session)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("estimator", ["kernel", "ntk-sap"])
@pytest.mark.parametrize("pretrained", [False, True])
def test_what_survives_has_its_initial_values(
    estimator: Any, pretrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(build("residual"), budget=rc.Budget(density=0.2), epochs=6.0, pretrained=pretrained)
    before = state(session.model)
    stopped_before_training(rc.AWT(**WEIGHT, search=0.5, estimator=estimator, rounds=3), session, monkeypatch)
    after, masked = state(session.model), maskable_weights(session.model)
    kept = sum(int((after[name] != 0).sum()) for name in masked)
    assert kept == session.goal.kept_weights
    for name, tensor in after.items():
        if name in masked:
            assert torch.equal(tensor, before[name] * (tensor != 0)), name
        elif not name.endswith(STATISTICS):
            assert torch.equal(tensor, before[name]), name
    assert any(not torch.equal(after[n], before[n]) for n in after if n.endswith(STATISTICS))
    assert all(p.requires_grad for p in session.model.parameters())


@pytest.mark.parametrize("estimator", ["kernel", "ntk-sap"])
def test_channels_that_survive_have_their_initial_values(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(build("residual"), epochs=6.0)
    session.model.bn1.weight.requires_grad_(False)
    reference = copy.deepcopy(session.model)
    stopped_before_training(rc.AWT(search=0.5, estimator=estimator, rounds=3), session, monkeypatch)
    assert session.editor.edits and session.cost().macs <= session.limits[0]
    rc.StructuralEditor.replay(reference, torch.zeros(2, 3, SIZE, SIZE), session.editor.edits)
    for (name, ours), theirs in zip(session.model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert [n for n, p in session.model.named_parameters() if not p.requires_grad] == ["bn1.weight"]


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({}, {"search": 6, "finetune": 6}),
        ({"estimator": "ntk-sap", "rounds": 2}, {"finetune": 12}),
        ({"search": 0.0}, {"finetune": 12}),
    ],
    ids=str,
)
def test_all_epochs_are_spent(options: dict[str, Any], phases: dict[str, int]) -> None:
    session = make_session(build("residual"), epochs=4.0)
    rc.AWT(**({"search": 0.5} | options)).run(session)
    assert {r["phase"]: r["steps"] for r in session.history if "steps" in r} == phases
    tangent = [r for r in session.history if r.get("event") == "tangent"]
    assert len(tangent) == (0 if options.get("search") == 0 else 1)
    if tangent:
        assert list(tangent[0]["distances"]) == ["magnitude", "random", "found"]


def test_without_a_search_it_is_magnitude_at_the_initialisation() -> None:
    ends = []
    for strategy in (rc.AWT(search=0), rc.Magnitude(pretrain=0.0)):
        session = make_session(build("residual"), epochs=2.0)
        strategy.run(session)
        ends.append((session.editor.edits, state(session.model)))
    assert ends[0][0] == ends[1][0] and same(ends[0][1], ends[1][1])


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_a_ticket_of_everything_is_the_dense_network(granularity: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = TENTH if granularity == "weight" else rc.Budget(macs=0.5)
    session = make_session(build("joined"), budget=budget, objective=TRADES(steps=1))
    units = granular(session, granularity=granularity)
    found = units.first_scores(units.magnitudes())
    before, flags = state(session.model), [m.training for m in session.model.modules()]
    some = compare_tickets(session, units, found, samples=4)
    assert some["found"] == some["magnitude"] and some["found"]["kernel"] > 0.01 and some["found"]["outputs"] > 0.01
    assert some["random"] != some["found"]
    monkeypatch.setattr(type(units), "counts", lambda self, scores: {n: s.numel() for n, s in scores.items()})
    for ticket, of in compare_tickets(session, units, found, samples=4).items():
        assert of == pytest.approx({"outputs": 0, "kernel": 0, "cosine": 1}, abs=1e-5), ticket
    assert same(state(session.model), before) and [m.training for m in session.model.modules()] == flags


def test_the_search_comes_nearer_to_the_dense_network_than_its_start() -> None:
    session = make_session(build("residual"), epochs=20.0, recipe=rc.Recipe(batch_size=32, val_images=1))
    rc.AWT(search=0.9, score_lr=0.05, samples=16).run(session)
    said = next(r for r in session.history if r.get("event") == "tangent")["distances"]
    total = {name: of["outputs"] ** 2 + of["kernel"] ** 2 for name, of in said.items()}
    assert total["found"] < total["magnitude"] and total["found"] < total["random"], said


@SMALL
@given(seed=st.integers(0, 1000))
def test_the_saliency_of_a_linear_network_is_known(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)).double()
    torch.nn.init.normal_(model[1].weight, std=0.3, generator=generator)
    x, x_adv = torch.rand(2, 5, 3, 2, 2, dtype=torch.float64, generator=generator)
    bits = drawn(maskable_weights(model), seed)
    mask = bits["1.weight"].double()
    noise = saliency.noise_like(trained_parameters(model), torch.Generator().manual_seed(seed))["1.weight"]
    with WeightGates(model, {n: b.float() for n, b in bits.items()}) as gates:
        seeded = torch.Generator().manual_seed(seed)
        found = saliency.trace_saliency(model, gates, x, x_adv, generator=seeded)["1.weight"]
    a, b = x.flatten(1), x_adv.flatten(1)
    moved_a, moved_b = a @ (mask * noise).T, b @ (mask * noise).T  # what the noise does to the outputs
    wanted = noise * (moved_b.T @ a + moved_a.T @ b) / noise.square().sum()
    assert torch.allclose(found.double(), wanted.abs(), rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_closed_units_rank_below_all_open_ones_in_their_order(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = {n: torch.rand(size, generator=generator) for n, size in (("a", 5), ("b", 9))}
    found["b"][torch.rand(9, generator=generator) < 0.3] = 0.0  # units in which nothing was found
    before = {n: torch.rand(t.shape, generator=generator) for n, t in found.items()}
    bits = drawn(found, seed, share=share)
    scores = saliency.below(found, before, bits)
    smallest = min(float(scores[n][b].min()) for n, b in bits.items())
    for name, b in bits.items():
        positive = b & (found[name] > 0)
        assert torch.equal(scores[name][positive], found[name][positive])
        assert bool((scores[name][~b] < smallest).all())
        assert torch.equal(scores[name][~b].argsort(), before[name][~b].argsort())


@pytest.mark.parametrize("granularity", ["channel", "weight"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_rounds_close_and_never_open(granularity: Any, allocation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(build("residual"), budget=TENTH if granularity == "weight" else rc.Budget(macs=0.5))
    units = granular(session, granularity=granularity, allocation=allocation)
    seen: list[dict[str, Tensor]] = []
    measure = saliency.trace_saliency

    def watch(model: nn.Module, gates: Any, *images: Tensor, **settings: Any) -> dict[str, Tensor]:
        seen.append({name: s.detach() != 0 for name, s in gates.scores.items()})
        return measure(model, gates, *images, **settings)

    monkeypatch.setattr(saliency, "trace_saliency", watch)
    before = state(session.model)
    scores = saliency.prune_in_rounds(session, units, rounds=5)
    assert same(state(session.model), before)
    counts = units.counts(scores)
    final = {name: largest_entries(s, counts[name]) for name, s in scores.items()}
    course = [sum(int(b.sum()) for b in bits.values()) for bits in [*seen, final]]
    assert course == sorted(course, reverse=True) and len(set(course)) == 6
    if allocation == "uniform":
        for earlier, later in zip(seen, [*seen[1:], final], strict=True):
            assert all(bool((earlier[name] | ~later[name]).all()) for name in later)
    budget = session.goal.kept_weights if granularity == "weight" else None
    assert course[-1] == budget or (budget is None and session.fits({**session.editor.widths, **counts}))


VARIANTS = {
    "weights": (rc.AWT(**WEIGHT, search=0.5), TENTH),
    "channels in rounds": (rc.AWT(estimator="ntk-sap", rounds=2), rc.Budget(macs=0.5)),
    "weights in rounds": (rc.AWT(**WEIGHT, estimator="ntk-sap", rounds=2), TENTH),
    "under an ascent": (rc.S2AP(host=rc.AWT(search=0.5), warmup=0.0), rc.Budget(macs=0.5)),
    "weights under an ascent": (rc.S2AP(host=rc.AWT(**WEIGHT, search=0.5), warmup=0.0), TENTH),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_goes_on_bit_for_bit_after_a_stop(variant: str, tmp_path: Path) -> None:
    strategy, budget = VARIANTS[variant]
    whole = compress("imported", strategy, epochs=4.0, budget=budget)
    kept: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_every_s": 0, "deadline": 0}
    resumed, stops = until_finished(
        lambda: compress("imported", strategy, epochs=4.0, budget=budget, **kept), rc.OutOfTime
    )
    assert stops >= 3 and same(state(resumed.model), state(whole.model))
    assert without_times(resumed.history) == without_times(whole.history)
    if "ascent" in variant:
        searched = [r for r in whole.history if r["phase"] == "search" and "epoch" in r]
        assert searched and all({"gamma", "loss_before", "kernel_distance"} <= r.keys() for r in searched)


def test_scores_that_nothing_learns_are_not_climbed_in() -> None:
    session = make_session(build("residual"))
    host = rc.AWT(estimator="ntk-sap", rounds=2)
    with pytest.raises(rc.InputError, match="learns no scores to climb in"):
        rc.S2AP(host=host).run(session)
    rc.S2AP(host=host, gamma=0).run(session)
    assert any(r.get("event") == "tangent" for r in session.history)


def test_an_objective_that_cannot_attack_by_itself_is_told_before_any_training() -> None:
    class Whole(PGDAT):
        attack = Objective.attack

    session = make_session(build("residual"), objective=Whole())
    with pytest.raises(rc.InputError, match="cannot be split"):
        rc.AWT().run(session)
    assert session.history == []


def test_the_person_who_waits_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    result = compress("residual", "awt", progress=True)
    said = next(r for r in result.history if r.get("event") == "tangent")["distances"]
    told = f"tangent kernels: magnitude {said['magnitude']['kernel']:.3f}, random {said['random']['kernel']:.3f}, found"
    assert told in capfd.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {"pretrain": 0.3},
        {"samples": 0},
        {"samples": 2.5},
        {"weight": -1.0},
        {"rounds": 0},
        {"estimator": "kernels"},
        {"search": 1.5, "estimator": "sap", "pretrain": 0.1},
        {"search": -1, "score_lr": 0, "pretrain": 0.1},
    ],
    ids=str,
)
def test_bad_options_are_named_all_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(rc.InputError) as caught:
        rc.AWT(**wrong)
    said = str(caught.value)
    assert said.count("awt cannot run") == 1
    assert all(f"{name}={value!r}" in said for name, value in wrong.items())
    assert said.count("\n  - ") == (len(wrong) if len(wrong) > 1 else 0)


def test_without_epochs_for_a_search_the_rounds_still_look() -> None:
    session = make_session(build("chain"), epochs=1.0)
    rc.AWT(estimator="ntk-sap", search=0.0, rounds=3).run(session)
    assert any(r.get("event") == "tangent" for r in session.history)
    plain = make_session(build("chain"), epochs=1.0)
    rc.AWT(search=0.0).run(plain)
    assert not any(r.get("event") == "tangent" for r in plain.history), "nothing was searched: it is magnitude"


def test_a_network_that_says_the_same_of_all_images_is_refused() -> None:
    model = build("chain")
    torch.nn.init.zeros_(model.fc.weight)
    with pytest.raises(rc.InputError, match="gives all images the same logits"):
        rc.AWT().run(make_session(model))


def test_its_records_call_nothing_robust_and_are_of_one_point() -> None:
    ends = {}
    for name, strategy in (("awt", rc.AWT(search=0.5)), ("s2ap", rc.S2AP(host=rc.AWT(search=0.5), warmup=0.0))):
        session = make_session(build("chain"), epochs=4.0)
        strategy.run(session)
        ends[name] = [r for r in session.history if r["phase"] == "search" and "epoch" in r]
        assert len(ends[name]) == 2 and not any("robust" in r for r in ends[name])
    for record in ends["s2ap"]:  # where the loss was found, its two parts were too
        parts = record["output_distance"] ** 2 + record["kernel_distance"] ** 2
        assert parts == pytest.approx(record["loss_after"], rel=1e-3)


def test_rounds_leave_nothing_to_climb_in() -> None:
    with pytest.raises(rc.InputError, match="host='awt' learns no scores to climb in"):
        rc.S2AP(host=rc.AWT(estimator="ntk-sap"))
    rc.S2AP(host=rc.AWT(estimator="ntk-sap"), gamma=0.0)
    with pytest.raises(rc.InputError, match="diagnose=True"):
        rc.AWT(estimator="ntk-sap", diagnose=True)
