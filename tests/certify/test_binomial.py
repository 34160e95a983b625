from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import beta

from robustcompress.certify import certified_radius, lower_bound
from robustcompress.errors import InputError


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(
    ("k", "n"), [(0, 10), (1, 10), (7, 10), (10, 10), (510, 1000), (9_990, 10_000), (99_000, 100_000)]
)
def test_against_the_beta_quantile(k: int, n: int, alpha: float) -> None:
    exact = float(beta.ppf(alpha, k, n - k + 1)) if k else 0.0
    found = lower_bound(k, n, alpha)
    assert found <= exact + 1e-15 and found == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_coverage(p: float) -> None:
    """Of many experiments, the bound lies above the truth in no more than alpha of them."""
    n, alpha, repeats = 200, 0.05, 4000
    draws = torch.distributions.Binomial(n, torch.tensor(p, dtype=torch.float64))
    torch.manual_seed(0)
    counts = draws.sample((repeats,)).long().tolist()
    failed = sum(lower_bound(k, n, alpha) > p for k in counts) / repeats
    assert failed <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / repeats)
    assert failed > 0.005 or p == 0.99  # and it is no bound that never says anything (200 of 200 bound 0.985)


def test_radius() -> None:
    # All of 100,000 draws: 0.001^(1/100000) = 0.99993 and 3.8 sigma (the plateau of Cohen et al. 2019, figure 4).
    assert certified_radius(100_000, 100_000, sigma=0.5, alpha=0.001) == pytest.approx(0.5 * 3.8115, abs=1e-3)
    assert certified_radius(50, 100, sigma=0.5, alpha=0.001) == 0
    assert certified_radius(55, 100, sigma=0.5, alpha=0.001) == 0  # too few draws to show it


@pytest.mark.parametrize(("k", "n", "alpha"), [(-1, 10, 0.1), (11, 10, 0.1), (0, 0, 0.1), (1, 10, 0.0), (1, 10, 1.0)])
def test_refusals(k: int, n: int, alpha: float) -> None:
    with pytest.raises(InputError):
        lower_bound(k, n, alpha)
