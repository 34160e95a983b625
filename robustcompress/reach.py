"""Whether a budget can be met at all: said before any training."""

from __future__ import annotations

import math

import torch
from torch import nn

from robustcompress.budget import Budget, Cost, CostModel, human
from robustcompress.errors import BudgetError, Problems
from robustcompress.export.timing import Stopwatch
from robustcompress.strategies import Strategy
from robustcompress.structure import StructuralEditor
from robustcompress.structure.weights import maskable_weights
from robustcompress.train import Progress


def default_rounding(editor: StructuralEditor) -> int:
    """The largest of 8, 4, 2, 1 that is at most an eighth of the narrowest group."""
    narrowest = min((group.width for group in editor.editable if group.kind != "heads"), default=1)
    return next(step for step in (8, 4, 2, 1) if step <= max(1, narrowest // 8))


def least_fraction(
    strategy: Strategy, editor: StructuralEditor, example: torch.Tensor, axis: str, round_to: int
) -> float:
    """The smallest fraction of the reference's size that a strategy can reach, about.

    Args:
        strategy: Says how narrow it can go.
        editor: Of the reference.
        example: One image batch.
        axis: What size is: "macs", "params", "latency" (which is measured), "density".
        round_to: Steps of widths.
    """
    if axis == "density":
        weights = [p.numel() for p in maskable_weights(editor.model).values()]
        return len(weights) / max(1, sum(weights))
    narrowest = strategy.narrowest(editor, round_to)
    if axis == "latency":
        channels, height, width = example.shape[1:]
        stopwatch = Stopwatch(editor, (channels, height, width))
        return min(1.0, stopwatch.time(stopwatch.resized(narrowest)).ratio)
    cost_model, place = CostModel(editor, example), ("macs", "params").index(axis)
    return cost_model.predict(narrowest)[place] / cost_model.predict(editor.widths)[place]


def check_budget(
    strategy: Strategy,
    editor: StructuralEditor,
    example: torch.Tensor,
    budget: Budget,
    reference: Cost,
    round_to: int,
    progress: Progress,
) -> None:
    """Tell what widths can reach, and refuse a budget that none of them meets, or that asks for nothing.

    The strategy's own objections come first.

    Args:
        strategy: Says how narrow and how wide it can go, and whether channels or weights leave.
        editor: Of the reference.
        example: One image batch.
        budget: What is asked for.
        reference: What the reference costs.
        round_to: Steps of widths.
        progress: Told what is reachable.

    Raises:
        BudgetError: It cannot be met, or is met already.
        InputError: The strategy objects to the network or the budget.
    """
    objections = Problems(f"{strategy.name} cannot run")
    for objection in strategy.objections(editor, budget):
        objections.add(objection)
    objections.raise_if_any()
    if strategy.direction == "none":
        return
    if strategy.granularity == "weight":
        _check_density(editor.model, budget, reference, progress)
        return
    if not editor.editable:
        reasons = "; ".join(f"{group.name}: {group.reason}" for group in editor.groups.values())
        raise BudgetError(f"nothing in this model can be resized: {reasons}")
    cost_model = CostModel(editor, example)
    smallest = cost_model.predict(strategy.narrowest(editor, round_to))
    largest = cost_model.predict(strategy.largest(editor.widths))
    limits = budget.limits(reference)
    asked = [f"{human(limit)} {unit}" for limit, unit in zip(limits, ("MACs", "params"), strict=True) if limit < 1e300]
    heads = ", heads one by one" if any(group.kind == "heads" for group in editor.editable) else ""
    progress.say(
        f"reachable: {human(smallest[0])} to {human(largest[0])} MACs, {human(smallest[1])} to {human(largest[1])} "
        f"params; asked for at most {' and '.join(asked) or 'any number'} (reference: {human(reference.macs)} MACs, "
        f"{human(reference.params)} params); widths in steps of {round_to}{heads}"
    )
    problems = Problems("the budget cannot be used")
    for limit, low, unit in zip(limits, smallest, ("MACs", "parameters"), strict=True):
        if limit < low:
            problems.add(
                f"{human(limit)} {unit} cannot be reached: with every group at its narrowest {human(low)} are left; "
                f"raise the budget, lower round_to={round_to}, or start from a smaller model"
            )
    unmet = budget.limits_latency or not budget.allows(reference, reference)  # latency is looked at once measured
    widens = strategy.direction == "search" and strategy.largest(editor.widths) != editor.widths
    if strategy.direction in ("prune", "search") and not strategy.given_shape and not unmet and not widens:
        problems.add(
            f"the model already meets {budget} ({human(reference.macs)} MACs, {human(reference.params)} parameters); "
            "lower the budget, or use strategy='none' to train it as it is"
        )
    problems.raise_if_any(BudgetError)


def _enough(kept: int, weights: int) -> float:
    """A density, to three digits, at which so many weights stay."""
    unit = 10.0 ** (math.floor(math.log10(kept / weights)) - 2)
    return math.ceil(kept / weights / unit + 1e-9) * unit


def _check_density(model: nn.Module, budget: Budget, reference: Cost, progress: Progress) -> None:
    layers, weights = len(maskable_weights(model)), reference.weights or 0
    wanted = int((budget.density or 0) * weights)
    progress.say(f"{human(wanted)} of {human(weights)} weights may stay, in {layers} layers; the shape stays")
    if wanted < layers:
        raise BudgetError(
            f"density={budget.density:g} leaves {wanted} weights for {layers} layers, which keep at least one each; "
            f"give at least {_enough(layers, weights):.3g}"
        )
