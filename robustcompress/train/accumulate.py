"""One step of training in parts: a large batch in the memory of a small one, or shared by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.data.batches import hashed_seed
from robustcompress.distributed import Parts
from robustcompress.robust.objectives import Objective, ObjectiveStep
from robustcompress.robust.threat import ThreatModel
from robustcompress.train.ascent import Ascent, forward_backward
from robustcompress.train.engine import Engine


def step_in_parts(
    parts: Parts,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objectives: Sequence[Objective],
    threat: ThreatModel,
    *,
    generator: torch.Generator,
    precision: AbstractContextManager[Any],
    ascent: Ascent | None,
    engine: Engine,
    count: int | None = None,
    key: str = "",
) -> ObjectiveStep:
    """Leave the gradient of the objective on the whole batch in `.grad`, attacking and passing one part at a time.

    The sum is that of the whole batch up to rounding, given the same adversarial images, where each image is treated by
    itself. Batch norms in train mode are not so: they see the statistics of a part; the running ones of all parts begin
    where the step does, and their mean (by numbers of images) is what the step leaves. With an ascent each part climbs
    on its own, from the same weights.

    Several parts draw their random numbers (starts of attacks, dropout) from the seed of the generator, the key and
    the number of the part: whoever computes them gets the same. One part draws from the generator itself.

    Args:
        parts: Into how many the batch is cut, and which of them are for this process.
        model: See `forward_backward`, as for all that follows.
        x: Images of this process's parts, [n, C, H, W].
        y: Their labels, int64 [n].
        objectives: The loss, a mean over images, of each of this process's parts; one for all where it keeps no memory.
        threat: What the adversary may do.
        generator: The attack's randomness.
        precision: Context of each forward pass.
        ascent: Where to compute the gradient.
        engine: Adds up over processes.
        count: Images of the whole batch; those given where None.
        key: Names the step in its run.

    Returns:
        The step of this process's parts; its loss is their share of the mean over all images of the batch, without a
        graph where there are several parts.
    """

    def whole(
        x: Tensor, y: Tensor, objective: Objective, generator: torch.Generator, share: float, last: bool
    ) -> ObjectiveStep:
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
            backward=lambda loss: engine.backward(loss, last=last),
        )

    if parts.whole:
        return whole(x, y, objectives[0], generator, 1.0, True)
    count = len(y) if count is None else count
    cut = parts.cut(count)
    sizes = [size for _, size in cut]
    images, labels = torch.split(x, sizes), torch.split(y, sizes)
    seed, noise = generator.initial_seed(), torch.Generator(generator.device)
    loss: Tensor | None = None
    steps: list[ObjectiveStep] = []
    with engine.buffers_averaged() as note, _own_randomness(x.device) as reseed:
        for number, (part, size) in enumerate(cut):
            share = size / count
            noise.manual_seed(hashed_seed(f"{seed}/attack/{key}/{part}"))
            reseed(hashed_seed(f"{seed}/network/{key}/{part}"))
            objective = objectives[number % len(objectives)]
            step = whole(images[number], labels[number], objective, noise, share, number == len(cut) - 1)
            note(share)
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


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Give what seeds torch's generators of the CPU and of the device; on exit both stand where they stood."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):

        def reseed(seed: int) -> None:
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)

        yield reseed
