"""What a search that is asked to `diagnose` records of itself at each epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from robustcompress.data import Batches
from robustcompress.diagnostics.curvature import top_eigenvalue
from robustcompress.diagnostics.loss import attacked_loss
from robustcompress.diagnostics.sharpness import sharpness
from robustcompress.robust.attacks import kept_buffers, kept_modes
from robustcompress.session import Session
from robustcompress.structure.masks import ScoreMasks
from robustcompress.train import augmentation, estimate_statistics, with_auxiliary

IMAGES = 128
"""Training images that curvature and sharpness are measured on: the same in every run over the same data."""

FLIPS = 0.01
"""Share of the mask bits that the ball of the sharpness flips, whatever radius a search itself uses."""


def look_at_search(session: Session, gates: ScoreMasks) -> dict[str, float]:
    """Measure the mask as it is now, and leave nothing of the run changed: no score, buffer, mode or generator.

    Running statistics lag behind masks that move, so they are first re-estimated for this mask, on as many images of
    the same kind as before the cut, and put back at the end. Curvature and sharpness are those of the goal's objective,
    whatever the search itself minimises, with batch statistics and without dropout; on 128 training images that depend
    on neither seed nor strategy, without augmentation, attacked anew at the present mask from the same noise. The
    accuracies are those that select epochs elsewhere (PGD-10 on the validation split); left out where there is no such
    split or `val_images` is 0.

    Args:
        session: The network under compression, in a search.
        gates: Its gates, open.

    Returns:
        "top_eigenvalue" (of the loss in the gates), "sharpness" (the rise of the loss) with "sharpness_gamma" and
        "sharpness_flips" (the radius, and the share of bits that it flips), "mask_clean" and "mask_robust" (accuracies
        before any fine-tuning). What is not finite is left out.
    """
    goal, model, device = session.goal, session.model, next(session.model.parameters()).device
    order = torch.randperm(len(goal.data.train), generator=torch.Generator().manual_seed(0))
    images = goal.data.train.subset(order[:IMAGES]).to(device)
    x, y, noise = images.as_float(), images.labels, torch.Generator(device).manual_seed(0)
    batches = Batches(
        goal.data.train,
        min(goal.recipe.batch_size, len(goal.data.train)),
        device=device,
        augment=augmentation(goal.recipe, goal.data.name),
        generator=torch.Generator().manual_seed(0),
        drop_last=True,
        channels_last=False,
    )
    # What draws from torch's own generators (dropout in train mode) must not move them.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), kept_buffers(model):
        estimate_statistics(model, batches)
        objective = with_auxiliary(goal.objective, session.editor)
        loss = attacked_loss(model, x, y, objective, goal.threat, generator=noise)
        with _batch_statistics(model):
            top = top_eigenvalue(gates, loss, generator=torch.Generator().manual_seed(0))
            ball = sharpness(gates, loss, flips=FLIPS)
        record = {"top_eigenvalue": top.value, "sharpness": ball.rise}
        record |= {"sharpness_gamma": ball.gamma, "sharpness_flips": ball.flips}
        if len(goal.data.val) and goal.recipe.val_images:
            record["mask_clean"], record["mask_robust"] = session.validate()
    return {name: value for name, value in record.items() if math.isfinite(value)}


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Eval mode, but for batch norms."""
    with kept_modes(model):
        for module in model.modules():
            module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield
