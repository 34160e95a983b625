"""Masks on single weights: what runs under them, what they leave behind, and zeros that stay zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import robustcompress as rc
from robustcompress.structure.masks import TopK, largest_entries, straight_through
from robustcompress.structure.weights import Sparsity, WeightGates, count_weights, maskable_weights
from tests.strategies.nets import NETS, SIZE, build, same, state

nets = pytest.mark.parametrize("net", sorted(NETS))


def images(n: int = 6) -> torch.Tensor:
    return torch.rand((n, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))


def first_scores(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=generator) for name, w in maskable_weights(model).items()}


@given(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40), st.integers(0, 45))
def test_the_largest_entries_are_kept_and_ties_are_spread(values: list[float], k: int) -> None:
    bits = largest_entries(torch.tensor(values), k)
    kept, dropped = (
        [abs(v) for v, b in zip(values, bits.tolist(), strict=True) if b is side] for side in (True, False)
    )
    assert len(kept) == min(k, len(values))
    assert not kept or not dropped or min(kept) >= max(dropped)


def test_of_nothing_but_ties_every_row_keeps_some() -> None:
    bits = largest_entries(torch.zeros(10, 16), 16)
    assert bits.sum() == 16 and all(row.any() for row in bits)


@given(st.integers(0, 10_000))
def test_the_gradient_goes_straight_through_twice(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    bits, slope = torch.rand(7, generator=generator) < 0.5, torch.randn(7, generator=generator, dtype=torch.float64)
    mask = straight_through(scores, bits)
    assert torch.equal(mask.detach(), bits.double())
    (first,) = torch.autograd.grad((mask**3 * slope).sum(), scores, create_graph=True)
    assert torch.equal(first.detach(), 3 * bits.double() * slope * scores.detach().sign())
    (second,) = torch.autograd.grad(first.sum(), scores)
    assert torch.allclose(second, 6 * bits.double() * slope)


def test_what_is_kept_is_worked_out_again_only_when_something_moved() -> None:
    calls: list[int] = []
    scores, rate = {"a": nn.Parameter(torch.arange(6.0))}, torch.tensor(0.5)

    def counts(values: Any) -> dict[str, int]:
        calls.append(1)
        return {"a": int(rate * 6)}

    rule = TopK(counts, watch=[rate])
    for _ in range(3):
        assert rule.bits(scores)["a"].sum() == 3
    assert len(calls) == 1
    with torch.no_grad():
        scores["a"][0] = 9.0
    assert rule.bits(scores)["a"].tolist() == [True, False, False, False, True, True] and len(calls) == 2
    rate.fill_(0.34)
    assert rule.bits(scores)["a"].sum() == 2 and len(calls) == 3
    assert rule.bits({"a": -torch.arange(6.0)})["a"].tolist() == [False] * 4 + [True] * 2 and len(calls) == 4


@nets
def test_under_the_gates_it_runs_as_with_zeros_in_the_weights(net: str) -> None:
    model = build(net).eval()
    scores, weights = first_scores(model), maskable_weights(model)
    counts = {name: max(1, s.numel() // 3) for name, s in scores.items()}
    before = state(model)
    with WeightGates(model, scores, TopK(lambda s: counts)) as gates:
        masked, kept = model(images()), gates.kept()
        slopes = torch.autograd.grad(masked.square().sum(), gates.parameters(), materialize_grads=True)
    assert {name: int(bits.sum()) for name, bits in kept.items()} == counts
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in maskable_weights(twin).items():
            weight.mul_(kept[name])
    zeroed = twin(images())
    assert torch.allclose(masked, zeroed, atol=1e-6)
    inner = torch.autograd.grad(zeroed.square().sum(), list(maskable_weights(twin).values()), materialize_grads=True)
    for name, slope, gradient in zip(scores, slopes, inner, strict=True):
        signs = torch.where(scores[name] < 0, -1.0, 1.0)
        assert torch.allclose(slope, gradient * weights[name].detach() * signs, atol=1e-4), name
    assert same(state(model), before) and list(state(model)) == list(before), "and in the same order"
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert maskable_weights(model) == weights, "the very same parameters"


def test_an_error_under_the_gates_leaves_no_trace() -> None:
    model = build("residual")
    before, kinds = state(model), [type(m) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), WeightGates(model, first_scores(model)):
        model(images())
        raise ZeroDivisionError
    assert same(state(model), before) is False, "running statistics moved: it ran in training mode"
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_gates_on_what_is_not_there_are_refused_all_at_once() -> None:
    model = build("chain")
    with pytest.raises(rc.InputError) as caught:
        WeightGates(model, {"conv9.weight": torch.ones(3), "fc.weight": torch.ones(2, 2), "bn1.weight": torch.ones(12)})
    for part in ("'conv9.weight'", "'fc.weight' needs scores of shape [10, 16], not [2, 2]", "'bn1.weight'"):
        assert part in str(caught.value)


def test_weights_that_two_layers_share_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_weights(model) == (16, 16)
    with pytest.raises(rc.InputError, match="1 shares its weight with 0"):
        maskable_weights(model)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=1e-2),
}


@nets
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_zeros_stay_zeros_and_the_rest_trains_as_if_they_were_not_there(net: str, optimizer: str) -> None:
    model = build(net).eval()
    twin = copy.deepcopy(model)
    masks = {name: largest_entries(s, max(1, s.numel() // 4)) for name, s in first_scores(model).items()}
    sparsity = Sparsity(model)
    sparsity.set_masks(masks)
    ours, theirs = (OPTIMIZERS[optimizer](list(m.parameters())) for m in (model, twin))
    with sparsity:
        for _ in range(3):
            ours.zero_grad()
            model(images()).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            ours.step()
        found = torch.autograd.grad(
            model(images()).sum(), list(maskable_weights(model).values()), materialize_grads=True
        )
        for name, gradient in zip(masks, found, strict=True):
            assert not gradient[~masks[name]].any(), "also for who asks autograd.grad, as weight perturbation does"
    for _ in range(3):  # the twin multiplies by the masks in its graph
        theirs.zero_grad()
        with WeightGates(twin, {n: m.float() for n, m in masks.items()}):
            twin(images()).square().mean().backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
    for name, weight in maskable_weights(model).items():
        assert not weight[~masks[name]].any()
        assert torch.allclose(weight, maskable_weights(twin)[name] * masks[name], atol=1e-5), name
    assert count_weights(model)[1] <= sum(int(m.sum()) for m in masks.values())
    model(images()).square().mean().backward()
    assert any(w.grad is not None and w.grad[~masks[n]].any() for n, w in maskable_weights(model).items()), "let go"


def test_masks_go_into_a_state_and_come_back() -> None:
    model, other = build("joined"), build("joined")
    sparsity, again = Sparsity(model), Sparsity(other)
    sparsity.set_masks({name: largest_entries(s, 3) for name, s in first_scores(model).items()})
    again.load_state_dict(sparsity.state_dict())
    assert same(state(other), state(model)) and count_weights(other)[1] == 3 * len(sparsity.masks)
    with pytest.raises(rc.InputError, match="one mask a weight"):
        again.set_masks({"fc.weight": torch.ones(1, 1)})
    frozen = build("joined").requires_grad_(False)
    with Sparsity(frozen):
        pass
