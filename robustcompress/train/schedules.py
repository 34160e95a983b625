"""Learning-rate schedules, as factors of the peak over the progress of one phase."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["one-cycle", "cosine", "step", "constant", "warm-up", "decay"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

WARM_UP = 0.15
"""Share of a phase over which "one-cycle" rises to the peak; "warm-up" takes half of its phase."""


def warm_up_factor(warmup: float, passed: float) -> float:
    """Return the largest factor on the peak learning rate while a run warms up: it rises linearly, step by step.

    Args:
        warmup: Share of the run's epochs that the warm-up takes; 0 for none.
        passed: Share of the run's epochs at the end of the step, above 0.
    """
    return 1.0 if warmup == 0 else min(1.0, passed / warmup)


def lr_factor(schedule: Schedule, progress: float) -> float:
    """Return the factor on the peak learning rate.

    Args:
        schedule: "one-cycle" rises linearly, then falls along a cosine to zero; "cosine" only falls along it;
            "decay" falls linearly to zero; "step" divides by ten at 50 % and 75 % (Rice et al. 2020); "constant" stays;
            "warm-up" rises linearly over the first half, then stays.
        progress: Share of the phase done, in [0, 1].
    """
    if schedule == "constant":
        return 1.0
    if schedule == "warm-up":
        return min(1.0, max(0.02, 2 * progress))
    if schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    if schedule == "decay":
        return 1.0 - progress
    if schedule == "one-cycle":
        if progress < WARM_UP:
            return max(0.02, progress / WARM_UP)
        progress = (progress - WARM_UP) / (1 - WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
