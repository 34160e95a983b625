"""What a search that is asked to `diagnose` records of itself at each epoch."""

from __future__ import annotations

import math

import torch

from robustcompress.diagnostics.curvature import top_eigenvalue
from robustcompress.diagnostics.loss import attacked_loss
from robustcompress.diagnostics.sharpness import sharpness
from robustcompress.robust.attacks import eval_mode
from robustcompress.session import Session
from robustcompress.structure.masks import ScoreMasks

IMAGES = 128
"""Training images that curvature and sharpness are measured on: the same in every run over the same data."""

FLIPS = 0.01
"""Share of the mask bits that the ball of the sharpness flips, whatever radius a search itself uses."""


def look_at_search(session: Session, gates: ScoreMasks) -> dict[str, float]:
    """Measure the mask as it is now, and leave nothing of the run changed: no score, buffer, mode or generator.

    Curvature and sharpness are those of the goal's objective in eval mode, on 128 training images without augmentation
    that depend on neither seed nor strategy, attacked anew at the present mask from the same noise. The accuracies are
    those that select epochs elsewhere (PGD-10 on the validation split), with the running statistics of the moment;
    left out where there is no validation split or `val_images` is 0.

    Args:
        session: The network under compression, in a search.
        gates: Its gates, open.

    Returns:
        "top_eigenvalue" (of the loss in the gates), "sharpness" (the rise of the loss) with "sharpness_gamma" and
        "sharpness_flips" (the radius, and the share of bits that it flips), "mask_clean" and "mask_robust" (accuracies
        before any fine-tuning). What is not finite is left out.
    """
    goal, device = session.goal, next(session.model.parameters()).device
    chosen = torch.randperm(len(goal.data.train), generator=torch.Generator().manual_seed(0))[:IMAGES]
    images = goal.data.train.subset(chosen).to(device)
    x, y, noise = images.as_float(), images.labels, torch.Generator(device).manual_seed(0)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # an attack in train mode may draw
        loss = attacked_loss(session.model, x, y, goal.objective, goal.threat, generator=noise)
        with eval_mode(session.model):
            top = top_eigenvalue(gates, loss, generator=torch.Generator().manual_seed(0))
            ball = sharpness(gates, loss, flips=FLIPS)
        record = {"top_eigenvalue": top.value, "sharpness": ball.rise}
        record |= {"sharpness_gamma": ball.gamma, "sharpness_flips": ball.flips}
        if len(goal.data.val) and goal.recipe.val_images:
            record["mask_clean"], record["mask_robust"] = session.validate()
    return {name: value for name, value in record.items() if math.isfinite(value)}
