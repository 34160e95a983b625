"""How little a probability can be, after it was seen so often: exact bounds, nothing but sums of binomial terms."""

from __future__ import annotations

import functools
import math

import numpy as np

from robustcompress.errors import Problems

_HALVINGS = 60  # of [0, 1]: down to 1e-18, below what a double can tell there
_ROUNDING = 1e-6  # well above what sums of 100,000 logarithms are off; of the bound it costs about 1e-8


@functools.lru_cache(maxsize=65536)
def lower_bound(successes: int, n: int, alpha: float) -> float:
    """Return the one-sided lower confidence bound of a proportion (Clopper and Pearson 1934).

    The smallest p under which so many successes, or more, have a probability of at least `alpha`: whatever the true
    proportion is, the bound lies above it with a probability of at most `alpha`. What rounding leaves open is given
    away downwards, so that the bound stays on the safe side.

    Args:
        successes: How many of the `n` trials succeeded.
        n: Number of trials, at least one.
        alpha: How often the bound may fail, in (0, 1).

    Raises:
        InputError: The counts are not 0 <= successes <= n, or `alpha` is not within (0, 1).
    """
    problems = Problems("there is no such bound")
    if n < 1 or not 0 <= successes <= n:
        problems.add(f"successes={successes}, n={n}: must be 0 <= successes <= n, and n at least 1")
    if not 0 < alpha < 1:
        problems.add(f"alpha={alpha!r}: must lie in (0, 1), such as 0.001")
    problems.raise_if_any()
    if successes == 0:
        return 0.0
    if successes == n:
        return math.exp(math.log(alpha) / n) * (1 - 1e-15)
    counts = np.arange(successes, n + 1, dtype=np.float64)
    ways = _log_choose(n, successes)
    low, high = 0.0, successes / n
    for _ in range(_HALVINGS):
        p = (low + high) / 2
        terms = ways + counts * math.log(p) + (n - counts) * math.log1p(-p)
        top = float(terms.max())
        tail = top + math.log(float(np.exp(terms - top).sum()))
        if tail <= math.log(alpha) - _ROUNDING:
            low = p
        else:
            high = p
    return low


def _log_choose(n: int, least: int) -> np.ndarray:
    """The logarithms of how many ways there are to choose `least`, ..., n of n."""
    first = math.lgamma(n + 1) - math.lgamma(least + 1) - math.lgamma(n - least + 1)
    later = np.arange(least + 1, n + 1, dtype=np.float64)
    ratios = np.log((n - later + 1) / later)
    return np.concatenate([[first], first + np.cumsum(ratios)])
