from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustcompress.errors import InputError
from robustcompress.robust import AttackResult, RobustReport, ThreatModel, compare, paired_test, wilson
from robustcompress.robust.statistics import mcnemar

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_the_score_equation(case):
    k, n = case
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    for end in (low, high):
        assert abs(k / n - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-9)
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_known_values():
    assert wilson(0, 10) == pytest.approx((0.0, Z**2 / (10 + Z**2)))
    assert wilson(10, 10)[1] == 1.0
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)  # Newcombe 1998, table I, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(50, 100, 0.68)
    assert wilson(50, 100)[0] < low < high < wilson(50, 100)[1]


@pytest.mark.parametrize("args", [(-1, 5), (6, 5), (1, 5, 0.0), (1, 5, 95)])
def test_wilson_refuses(args):
    with pytest.raises(InputError):
        wilson(*args)


@pytest.mark.parametrize("total", range(12))
def test_mcnemar_against_all_coin_tosses(total):
    heads = [sum(tosses) for tosses in itertools.product((0, 1), repeat=total)]
    for only_a in range(total + 1):
        only_b = total - only_a
        as_far = sum(abs(2 * k - total) >= abs(only_a - only_b) for k in heads)
        assert mcnemar(only_a, only_b) == pytest.approx(as_far / len(heads))


def test_mcnemar_of_many_is_exact_and_quick():
    assert mcnemar(5000, 5000) == 1.0
    assert 0 < mcnemar(4000, 6000) < 1e-80
    assert mcnemar(4900, 5100) == pytest.approx(math.erfc(199 / math.sqrt(10000) / math.sqrt(2)), rel=1e-2)


def flags(both, only_a, only_b, neither):
    a = torch.tensor([1] * both + [1] * only_a + [0] * only_b + [0] * neither, dtype=torch.bool)
    b = torch.tensor([1] * both + [0] * only_a + [1] * only_b + [0] * neither, dtype=torch.bool)
    return a, b


cells = st.tuples(*[st.integers(0, 40)] * 4).filter(lambda c: sum(c) > 0)


@given(cells)
@settings(deadline=None)
def test_paired_test_is_consistent(case):
    both, only_a, only_b, neither = case
    n = sum(case)
    result = paired_test(*flags(*case))
    assert (result.n, result.only_a, result.only_b) == (n, only_a, only_b)
    assert result.difference == pytest.approx((only_a - only_b) / n)
    assert -1 <= result.low <= result.difference <= result.high <= 1
    swapped = paired_test(*flags(both, only_b, only_a, neither))
    assert (swapped.low, swapped.high) == pytest.approx((-result.high, -result.low))
    assert swapped.p_value == result.p_value == mcnemar(only_a, only_b)


def test_interval_covers_as_often_as_it_says():
    """Coverage over all tables of n = 30, exact: no simulation."""
    n = 30
    tables = [(b, c, paired_test_interval(n, b, c)) for b in range(n + 1) for c in range(n + 1 - b)]
    coverages = []
    for p_b, p_c in itertools.product((0.05, 0.15, 0.3), repeat=2):
        covered = 0.0
        for b, c, (low, high) in tables:
            if low <= p_b - p_c <= high:
                ways = math.comb(n, b) * math.comb(n - b, c)
                covered += ways * p_b**b * p_c**c * (1 - p_b - p_c) ** (n - b - c)
        coverages.append(covered)
    assert min(coverages) > 0.91
    assert 0.94 < sum(coverages) / len(coverages) < 0.99


def paired_test_interval(n, b, c):
    both = (n - b - c) // 2
    result = paired_test(*flags(both, b, c, n - b - c - both))
    return result.low, result.high


def test_pairing_is_tighter_than_two_intervals():
    a, b = flags(450, 30, 10, 510)
    paired = paired_test(a, b)
    apart = wilson(int(a.sum()), 1000), wilson(int(b.sum()), 1000)
    assert paired.low > 0 and paired.p_value < 0.01
    assert apart[0][0] < apart[1][1]  # the two intervals overlap
    assert "+2.00 points" in str(paired) and "30 against 10" in str(paired)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(3), torch.ones(3, dtype=torch.bool), "a is torch.float32"),
        (torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool), "same images"),
        (torch.ones(0, dtype=torch.bool), torch.ones(0, dtype=torch.bool), "at least one"),
        (torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool), "bool vector"),
    ],
)
def test_paired_test_refuses(a, b, message):
    with pytest.raises(InputError, match=message):
        paired_test(a, b)


def report(correct, *, suite="standard", threat=ThreatModel(), sha="a"):
    clean = AttackResult(name="clean", correct=torch.ones(20, dtype=torch.bool), seconds=0.0)
    attacked = AttackResult(name="autoattack", correct=correct, seconds=0.0, suite=suite)
    return RobustReport(
        threat=threat, n=20, seed=0, attacks=(clean, attacked), images_sha256=sha, indices=torch.arange(20)
    )


def test_compare_takes_the_images_that_both_judged():
    a = torch.tensor([True] * 10 + [False] * 10)
    b = torch.tensor([False] * 6 + [True] * 6)
    result = compare(report(a), report(b))
    assert (result.n, result.only_a, result.only_b) == (12, 6, 2)
    assert compare(report(a), report(b), attack="clean").n == 20
    assert compare(report(a), report(b), attack="worst case").n == 12


def test_compare_refuses_what_is_not_paired():
    a = torch.ones(20, dtype=torch.bool)
    with pytest.raises(InputError, match="different images"):
        compare(report(a), report(a, sha="b"))
    with pytest.raises(InputError, match="linf 8/255 and linf 4/255"):
        compare(report(a), report(a, threat=ThreatModel("linf", 4 / 255)))
    with pytest.raises(InputError, match="'standard' and 'custom'"):
        compare(report(a), report(a, suite="custom"))
    with pytest.raises(InputError, match="'pgd-20' was not run"):
        compare(report(a), report(a), attack="pgd-20")
    assert dataclasses.is_dataclass(compare(report(a), report(a)))
