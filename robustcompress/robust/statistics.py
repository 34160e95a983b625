"""How sure an accuracy is, and whether two models differ on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import TYPE_CHECKING

from torch import Tensor

from robustcompress.errors import InputError, Problems

if TYPE_CHECKING:
    from robustcompress.robust.report import AttackResult, RobustReport


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """Two models judged on the same images.

    Attributes:
        difference: Accuracy of the first minus that of the second, in [-1, 1].
        low: Lower end of the interval around the difference.
        high: Upper end.
        p_value: Two-sided exact McNemar test of "neither is better".
        n: Number of images.
        only_a: Images that the first alone gets right.
        only_b: Images that the second alone gets right.
    """

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    only_a: int
    only_b: int

    def __str__(self) -> str:
        return (
            f"difference {100 * self.difference:+.2f} points "
            f"(95 % interval {100 * self.low:+.2f} to {100 * self.high:+.2f}), "
            f"p = {self.p_value:.3g}, n = {self.n}: {self.only_a} against {self.only_b} images"
        )


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927), without continuity correction.

    Args:
        successes: How many of the `n` trials succeeded.
        n: Number of trials. None at all tell nothing: (0, 1).
        confidence: Coverage aimed at, in (0, 1).

    Returns:
        Lower and upper end, within [0, 1].

    Raises:
        InputError: The counts are not 0 <= successes <= n, or the confidence is not within (0, 1).
    """
    if not 0 <= successes <= n:
        raise InputError(f"successes={successes}, n={n}: must be 0 <= successes <= n")
    z2 = _quantile(confidence) ** 2
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # The ends are exactly 0 and 1 at the extremes; rounding would leave 1e-17 there.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def paired_test(a: Tensor, b: Tensor, *, confidence: float = 0.95) -> PairedTest:
    """Compare two models by their flags on the same images.

    The p-value is McNemar's, exact: a binomial test with one half on the images where the two differ
    (McNemar 1947). The interval is Newcombe's square-and-add of two Wilson intervals with the correlation
    corrected for continuity (Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10). The two can
    disagree at the margin.

    Args:
        a: Which images the first model gets right, bool [N].
        b: The same for the second, same order.
        confidence: Coverage of the interval.

    Raises:
        InputError: The flags are not two bool vectors of one length, or are empty.
    """
    problems = Problems("these flags cannot be compared")
    for name, flags in (("a", a), ("b", b)):
        if str(flags.dtype) != "torch.bool" or flags.dim() != 1:
            problems.add(f"{name} is {flags.dtype} of shape {tuple(flags.shape)}: give a bool vector")
    if a.shape != b.shape:
        problems.add(f"{tuple(a.shape)} and {tuple(b.shape)} flags: both models need the same images")
    if a.numel() == 0:
        problems.add("there are none: judge at least one image")
    problems.raise_if_any()
    a, b = a.cpu(), b.cpu()
    n = a.numel()
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
    neither = n - both - only_a - only_b
    share_a, share_b = (both + only_a) / n, (both + only_b) / n
    low_a, high_a = wilson(both + only_a, n, confidence)
    low_b, high_b = wilson(both + only_b, n, confidence)
    phi = _correlation(both, only_a, only_b, neither)
    down = _square_and_add(share_a - low_a, high_b - share_b, phi)
    up = _square_and_add(high_a - share_a, share_b - low_b, phi)
    difference = (only_a - only_b) / n
    return PairedTest(
        difference=difference,
        low=max(-1.0, difference - down),
        high=min(1.0, difference + up),
        p_value=mcnemar(only_a, only_b),
        n=n,
        only_a=only_a,
        only_b=only_b,
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of `only_a` against `only_b` discordant pairs; 1 where there are none."""
    total = only_a + only_b
    term = tail = 1
    for k in range(min(only_a, only_b)):
        term = term * (total - k) // (k + 1)
        tail += term
    return min(1.0, float(Fraction(2 * tail, 2**total)))


def compare(a: RobustReport, b: RobustReport, *, attack: str = "autoattack") -> PairedTest:
    """Test whether two models differ under one attack, on the images that both reports judged.

    Args:
        a: Report of the first model.
        b: Report of the second, over the same images and threat.
        attack: Name of the attack, or "worst case".

    Returns:
        The paired test over the images that both judged under this attack (one may have stopped earlier).

    Raises:
        InputError: The reports are about different images or threats, one lacks the attack, or the two ran
            different suites of it.
    """
    problems = Problems("these two reports cannot be compared")
    if a.images_sha256 != b.images_sha256:
        problems.add("they judged different images: evaluate both on the same data with the same max_images")
    if attack != "clean" and a.threat != b.threat:
        problems.add(f"threats {a.threat.label()} and {b.threat.label()} differ: evaluate both under one")
    results: list[AttackResult] = []
    for report in (a, b):
        try:
            results.append(report.result(attack))
        except InputError as error:
            problems.add(str(error))
    if len(results) == 2 and results[0].suite != results[1].suite:
        problems.add(f"{attack} ran as {results[0].suite!r} and {results[1].suite!r}: run the same suite")
    problems.raise_if_any()
    n = min(result.n for result in results)
    return paired_test(results[0].correct[:n], results[1].correct[:n])


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise InputError(f"confidence={confidence!r}: must lie in (0, 1), such as 0.95")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    if margins == 0:
        return 0.0
    cross = float(both * neither - only_a * only_b)
    if cross > 0:
        cross = max(0.0, cross - (both + only_a + only_b + neither) / 2)
    return cross / math.sqrt(margins)


def _square_and_add(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))
