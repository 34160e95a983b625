"""One step of training in parts: the gradient of a large batch in the memory of a small one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.robust.objectives import Objective, ObjectiveStep
from robustcompress.robust.threat import ThreatModel
from robustcompress.train.ascent import Ascent, forward_backward


def step_in_parts(
    parts: int,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    threat: ThreatModel,
    *,
    generator: torch.Generator,
    precision: AbstractContextManager[Any],
    ascent: Ascent | None,
) -> ObjectiveStep:
    """Leave the gradient of the objective on the whole batch in `.grad`, attacking and passing one part at a time.

    The sum is that of the whole batch up to rounding, given the same adversarial images, where each image is treated by
    itself. Batch norms in train mode are not so: they see the statistics of a part, and their running ones move once a
    part. With an ascent each part climbs on its own, from the same weights. Random starts are drawn part after part:
    for linf those of the whole batch, for l2 others of the same distribution.

    Args:
        parts: Into how many the batch is cut, as equal as they can be; a batch of fewer images makes fewer parts.
        model: See `forward_backward`, as for all that follows.
        x: Images, [N, C, H, W].
        y: Labels, int64 [N].
        objective: The loss, a mean over images.
        threat: What the adversary may do.
        generator: The attack's randomness.
        precision: Context of each forward pass.
        ascent: Where to compute the gradient.

    Returns:
        The step of the whole batch; its loss is the mean over images, without a graph where there are several parts.
    """

    def whole(x: Tensor, y: Tensor, share: float) -> ObjectiveStep:
        return forward_backward(
            model,
            x,
            y,
            objective,
            threat,
            generator=generator,
            precision=precision,
            ascent=ascent,
            share=share,
        )

    if parts == 1:
        return whole(x, y, 1.0)
    loss: Tensor | None = None
    steps: list[ObjectiveStep] = []
    for images, labels in zip(torch.tensor_split(x, parts), torch.tensor_split(y, parts), strict=True):
        if not len(labels):
            continue
        share = len(labels) / len(y)
        step = whole(images, labels, share)
        loss = step.loss.detach() * share if loss is None else loss + step.loss.detach() * share
        steps.append(step)
    assert loss is not None
    clean = [step.clean_logits for step in steps if step.clean_logits is not None]
    return ObjectiveStep(
        loss,
        torch.cat([step.logits.detach() for step in steps]),
        torch.cat([step.x_adv for step in steps]),
        torch.cat(clean) if len(clean) == len(steps) else None,
    )
