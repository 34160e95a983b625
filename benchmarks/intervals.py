"""What several seeds on the same test images say about a difference, and how sure one may be.

Two things vary: training (the seeds) and the choice of test images. The interval covers both, conservatively:
half-width = sqrt((t x s / sqrt(k))^2 + (1.96 x e)^2), where s is the standard deviation over the k seeds, t Student's
quantile with its degrees of freedom, and e the standard error over the images of the flags averaged over the seeds.
Three seeds alone hardly tell how much training varies (t = 4.3). So s is pooled over all rows of a grid, as in an
analysis of variance: it is taken for granted that training varies alike in all of them.
(The spread over seeds holds a part of the images' noise already, so the interval is rather too wide than too narrow.)
For e, four imaginary images are added, two at each end of the scale (after Agresti and Coull 1998): where all images
agree they are still a sample.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Noise = tuple[float, int]
"""Standard deviation from seed to seed, and its degrees of freedom."""

STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""0.975 quantiles of Student's t by degrees of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over seeds and images.

    Attributes:
        mean: In [-1, 1].
        low: Lower end of the 95 % interval; -inf for a single seed, which says nothing about training.
        high: Upper end.
        seeds: How many.
        images: How many images each seed was judged on.
        values: The mean of each seed.
    """

    mean: float
    low: float
    high: float
    seeds: int
    images: int
    values: tuple[float, ...]

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def points(self, *, signed: bool) -> str:
        """In per cent or points, with the interval: "-1.2 [-3.0, +0.6]"."""
        form = "{:+.1f}" if signed else "{:.1f}"
        mean = form.format(100 * self.mean)
        if not math.isfinite(self.low):
            return mean
        return f"{mean} [{form.format(100 * self.low)}, {form.format(100 * self.high)}]"


def student(freedom: int) -> float:
    """The 0.975 quantile of Student's t (beyond the table: Cornish and Fisher's expansion, right to 0.001)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    expanded = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return STUDENT.get(freedom, expanded)


def pooled(groups: Sequence[Sequence[float]]) -> Noise | None:
    """How much values vary within groups, pooled over them; None where no group has two."""
    groups = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return None
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return math.sqrt(squares / freedom), freedom


def estimate(
    per_seed: Sequence[torch.Tensor], *, low: float = 0.0, high: float = 1.0, noise: Noise | None = None
) -> Estimate:
    """Mean and interval of values given by seed and image.

    Args:
        per_seed: For every seed `[N]` numbers, of the same images in the same order: flags, or differences of flags.
        low: The least that a value can be: 0 for flags, -1 for differences.
        high: The most.
        noise: How much training varies; by default as these seeds alone say.
    """
    values = torch.stack([v.double() for v in per_seed])
    seeds, images = values.shape
    means = values.mean(1).tolist()
    mean = statistics.fmean(means)
    if seeds < 2:
        half = math.inf
    else:
        spread, freedom = noise or (statistics.stdev(means), seeds - 1)
        training = student(freedom) * spread / math.sqrt(seeds)
        padded = torch.cat([values.mean(0), torch.tensor([low, low, high, high], dtype=torch.float64)])
        sampling = 1.96 * float(padded.std()) / math.sqrt(images + 4)
        half = math.hypot(training, sampling)
    bounds = (mean - half, mean + half) if seeds < 2 else (max(low, mean - half), min(high, mean + half))
    return Estimate(mean=mean, low=bounds[0], high=bounds[1], seeds=seeds, images=images, values=tuple(means))
