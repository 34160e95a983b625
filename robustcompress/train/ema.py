"""Averaged weights: the one stabiliser every strategy shares, exponential or equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from robustcompress.train.recipe import Recipe
from robustcompress.train.statistics import estimate_statistics


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of a model's parameters and buffers.

    The decay of update `n` is `min(decay, (1 + n) / (10 + n))`. Structural edits reach the average through
    `StructuralEditor.follow`.

    Args:
        model: The network to follow; call `.update_parameters(model)` after each step.
        decay: Largest decay, in (0, 1).
    """
    return _averaged(model, lambda n: 1 - min(decay, (1 + n) / (10 + n)))


def equally_averaged(model: nn.Module) -> AveragedModel:
    """Return the mean of all states of a model that it is updated with, which is stochastic weight averaging's.

    Args:
        model: The network to follow; see `average_epoch`. Structural edits reach the mean as they reach `averaged`.
    """
    return _averaged(model, lambda n: 1 / (n + 1))


def make_average(model: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The average that a recipe asks for; None where it asks for none."""
    if recipe.averaging == "swa":
        return equally_averaged(model)
    return averaged(model, recipe.ema) if recipe.ema > 0 else None


def average_epoch(
    average: AveragedModel,
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    counts: bool,
) -> int:
    """Take an epoch's last weights into an equal average (Izmailov et al., UAI 2018, algorithm 1).

    Args:
        average: Of `equally_averaged`. Until an epoch counts, it is a copy of the network.
        model: The network at the end of the epoch.
        batches: Clean images `[B, C, H, W]` with labels, on its device: batch-norm statistics of a mean of weights are
            no mean of statistics, and are estimated anew on some of them.
        counts: Whether averaging has begun.

    Returns:
        Of how many epochs it is the mean; 0 before it has begun.
    """
    if not counts:
        average.n_averaged.zero_()
    average.update_parameters(model)
    if not counts:
        average.n_averaged.zero_()
    count = int(average.n_averaged)
    if count > 1:
        estimate_statistics(average.module, batches)
    return count


def _averaged(model: nn.Module, weight: Callable[[int], float]) -> AveragedModel:
    """An average that moves by `weight(n)` of the way to the network at its n-th update; the first is a copy."""

    def update(averages: Sequence[torch.Tensor], currents: Sequence[torch.Tensor], count: torch.Tensor | int) -> None:
        floating = averages[0].is_floating_point()
        if floating:
            torch._foreach_lerp_(list(averages), list(currents), weight(int(count)))
        else:  # counters of batch norms
            torch._foreach_copy_(list(averages), list(currents))

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
