import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustcompress.data.splits import deal, stratified, without

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(torch.tensor)


@settings(max_examples=150, deadline=None)
@given(labels=LABELS, share=st.floats(0, 1), seed=st.integers(0, 9))
def test_every_class_keeps_its_share(labels: torch.Tensor, share: float, seed: int) -> None:
    count = round(len(labels) * share)
    chosen = stratified(labels, count, seed=seed)
    assert len(chosen) == count
    assert torch.equal(chosen, chosen.unique())  # ascending, none twice
    total = torch.bincount(labels, minlength=6)
    got = torch.bincount(labels[chosen], minlength=6)
    assert float((got - total * (count / len(labels))).abs().max()) < 1 + 1e-6
    rest = without(len(labels), chosen)
    assert torch.cat([chosen, rest]).sort().values.tolist() == list(range(len(labels)))
    assert torch.equal(stratified(labels, count, seed=seed), chosen)


@settings(max_examples=100, deadline=None)
@given(labels=LABELS, count=st.integers(1, 90), leave=st.integers(0, 3))
def test_some_of_each_class_are_left(labels: torch.Tensor, count: int, leave: int) -> None:
    chosen = stratified(labels, count, seed=0, leave=leave)
    total = torch.bincount(labels)
    rest = torch.bincount(labels[without(len(labels), chosen)], minlength=len(total))
    assert bool((rest >= total.clamp(max=leave)).all())


@settings(max_examples=100, deadline=None)
@given(labels=LABELS, extra=st.integers(0, 30))
def test_each_class_gets_its_least_within_the_count(labels: torch.Tensor, extra: int) -> None:
    total = torch.bincount(labels)
    floor = total.clamp(max=2)
    count = min(len(labels), int(floor.sum()) + extra)
    got = torch.bincount(labels[stratified(labels, count, seed=1, at_least=2)], minlength=len(total))
    assert bool((got >= floor).all()) and int(got.sum()) == count


def test_seeds_choose_other_images_evenly() -> None:
    labels = torch.arange(40) % 2
    hits = torch.zeros(40)
    for seed in range(400):
        hits[stratified(labels, 10, seed=seed)] += 1
    assert float((hits - 100).abs().max()) < 5 * (400 * 0.25 * 0.75) ** 0.5


@settings(max_examples=100, deadline=None)
@given(labels=LABELS, n=st.integers(1, 80))
def test_dealt_labels_are_fair_from_the_first_on(labels: torch.Tensor, n: int) -> None:
    labels = labels.sort().values
    order = deal(labels)
    assert order.sort().values.tolist() == list(range(len(labels)))
    n = min(n, len(labels))
    got = torch.bincount(labels[order[:n]], minlength=6)
    fair = torch.bincount(labels, minlength=6) * (n / len(labels))
    assert float((got - fair).abs().max()) <= 3
    assert torch.equal(deal(labels), order)


def test_mixed_labels_are_left_in_place() -> None:
    assert deal(torch.tensor([0, 1, 0, 1])).tolist() == [0, 1, 2, 3]
    assert deal(torch.tensor([3])).tolist() == [0]
    assert deal(torch.tensor([0, 0, 1, 1])).tolist() == [0, 2, 1, 3]


def test_a_rare_class_is_spread_out() -> None:
    order = deal(torch.tensor([0] * 50 + [1] * 5))
    assert [int((order[i : i + 11] >= 50).sum()) for i in range(0, 55, 11)] == [1] * 5
