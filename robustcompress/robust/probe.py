"""A quick look at how accurate a network is, clean and attacked (by PGD, mostly): a progress meter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

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
) -> tuple[float, float]:
    """Clean and PGD accuracy, in [0, 1], in eval mode; zeros where there are no images.

    Args:
        model: Maps images to logits; its modes are as before afterwards.
        batches: Images `[B, C, H, W]` with labels `[B]`, on the model's device.
        threat: What the adversary may do.
        steps: Of PGD.
        generator: The attack's randomness.
        objective: What is trained for; where it has a view of its own of what is withstood, that stands for PGD.
    """
    clean = robust = seen = 0
    with eval_mode(model):
        for x, y in batches:
            right = None if objective is None else objective.withstood(model, x, y, threat, generator=generator)
            if right is None:
                x_adv = pgd(model, x, y, threat, steps=steps, generator=generator)
                with torch.no_grad():
                    right = model(x_adv).argmax(1) == y
            with torch.no_grad():
                clean += int((model(x).argmax(1) == y).sum())
            robust += int(right.sum())
            seen += len(y)
    return clean / max(1, seen), robust / max(1, seen)
