"""A quick look at how accurate a network is, clean and attacked (by PGD, mostly): a progress meter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from robustcompress.distributed import ALONE, World
from robustcompress.robust.attacks import eval_mode, pgd
from robustcompress.robust.objective import Objective
from robustcompress.robust.threat import ThreatModel


def accuracies(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    threat: ThreatModel,
    *,
    steps: int = 10,
    generator: torch.Generator | None = None,
    objective: Objective | None = None,
    world: World = ALONE,
) -> tuple[float, float]:
    """Clean and PGD accuracy, in [0, 1], in eval mode; zeros where there are no images.

    Args:
        model: Maps images to logits; its modes are as before afterwards.
        batches: Images `[B, C, H, W]` with labels `[B]`, on the model's device.
        threat: What the adversary may do.
        steps: Of PGD.
        generator: The attack's randomness.
        objective: What is trained for; where it has a view of its own of what is withstood, that stands for PGD.
        world: The processes that share the batches, all of which call this: each gets what one would.
    """
    clean = robust = seen = 0
    dealt = objective is None or type(objective).withstood is Objective.withstood  # else who knows what is drawn
    with eval_mode(model):
        for number, (x, y) in enumerate(batches):
            if dealt and number % world.size != world.rank:
                threat.random_start(x, generator)
                continue
            right = None if objective is None else objective.withstood(model, x, y, threat, generator=generator)
            if right is None:
                x_adv = pgd(model, x, y, threat, steps=steps, generator=generator)
                with torch.no_grad():
                    right = model(x_adv).argmax(1) == y
            with torch.no_grad():
                clean += int((model(x).argmax(1) == y).sum())
            robust += int(right.sum())
            seen += len(y)
    if dealt:
        clean, robust, seen = (int(total) for total in world.totals([clean, robust, seen]))
    else:
        clean, robust, seen = world.broadcast([clean, robust, seen])
    return clean / max(1, seen), robust / max(1, seen)
