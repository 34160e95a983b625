"""The one training loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from robustcompress.data import Batches
from robustcompress.errors import RobustCompressError
from robustcompress.robust.attacks import eval_mode, kept_modes
from robustcompress.robust.objectives import Objective
from robustcompress.robust.threat import ThreatModel
from robustcompress.train.accumulate import step_in_parts
from robustcompress.train.ascent import Ascent
from robustcompress.train.large_batch import Lamb, Lars
from robustcompress.train.progress import Progress
from robustcompress.train.recipe import Recipe
from robustcompress.train.remat import rematerialised
from robustcompress.train.schedules import Schedule, lr_factor, warm_up_factor

CLEAN_EVERY = 10
"""Clean training accuracy is looked at every so many steps: a full look would cost one more forward pass a step."""


class TrainingError(RobustCompressError):
    """The loss is no longer finite."""


def make_optimizer(recipe: Recipe, parameters: Sequence[nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
    """Build the recipe's optimizer; vectors (batch norms, biases) are neither decayed nor scaled by their norm."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # One kernel for all tensors in place of several a tensor. On the CPU the plain one stays: it is what results there
    # were made with, bit for bit.
    fused = True if all(p.is_cuda and p.is_floating_point() for p in parameters) else None
    if recipe.optimizer in ("lars", "lamb"):
        for group in groups:
            group["adapt"] = group["params"][0].dim() > 1
        if recipe.optimizer == "lars":
            return Lars(groups, lr=lr, momentum=recipe.momentum, trust=recipe.trust)
        return Lamb(groups, lr=lr, betas=(recipe.momentum, 0.999))
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(recipe.momentum, 0.999), fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=fused)


@dataclass(slots=True)
class _Meter:
    """Running means since the last `reset`; the tensors stay on the device until they are read."""

    loss: torch.Tensor | float = 0.0
    right: torch.Tensor | float = 0.0
    clean_right: torch.Tensor | float = 0.0
    seen: int = 0
    clean_seen: int = 0
    started: float = field(default_factory=time.perf_counter)

    def read(self) -> dict[str, float]:
        metrics = {"loss": float(self.loss) / max(1, self.seen), "robust": float(self.right) / max(1, self.seen)}
        # Only now: reading waited for the device to finish what it was given.
        metrics["images_per_s"] = self.seen / max(time.perf_counter() - self.started, 1e-9)
        if self.clean_seen:
            metrics["clean"] = float(self.clean_right) / self.clean_seen
        return metrics


def phase_steps(epochs: float, batches: Batches) -> int:
    """How many steps `epochs` are: rounded to whole steps, at least one."""
    return max(1, round(epochs * len(batches)))


def train(
    model: nn.Module,
    batches: Batches,
    objective: Objective,
    threat: ThreatModel,
    recipe: Recipe,
    *,
    epochs: float,
    optimizer: torch.optim.Optimizer,
    lr: float,
    schedule: Schedule,
    generator: torch.Generator,
    phase: str = "train",
    ema: AveragedModel | None = None,
    progress: Progress | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    autocast: bool = False,
    ascent: Ascent | None = None,
    start: int = 0,
    span: tuple[float, float] = (0.0, 1.0),
) -> list[dict[str, Any]]:
    """Train for a number of epochs, which may be a fraction.

    Args:
        model: The network, on its device; returned in the mode it came in, also after an error.
        batches: Training images; their `epoch` counts on.
        objective: What a step minimises; asked at the beginning of each epoch what that is (`Objective.begin`). Where
            it replays batches, an epoch has as many steps, and fewer images.
        threat: What the adversary may do.
        recipe: Warm-up, clipping, and what saves memory; the rest is already in `optimizer`, `batches` and `ema`.
        epochs: How long; rounded to whole steps, at least one.
        optimizer: Holds the parameters that move. A parameter group's own "lr_scale" multiplies its learning rate.
        lr: Peak learning rate of this phase.
        schedule: Its course.
        generator: The attack's randomness.
        phase: The name under which progress is shown and history is written.
        ema: Updated after each step.
        progress: Where to show it.
        on_epoch: Called with each epoch's record, to which it may add.
        autocast: Run forward passes in bfloat16.
        ascent: Compute gradients one ascent above the parameters, from its beginning on; loss and accuracies of the
            records are then those found there.
        start: Steps that are done already, whole epochs of them: a resumed phase.
        span: Shares of the run's epochs at which this phase begins and ends, for objectives that change on the way and
            for the recipe's warm-up.

    Returns:
        One record an epoch: phase, epoch, steps, lr, loss, robust and clean training accuracy, images/s, and what
        `ascent` tells of itself.

    Raises:
        InputError: There is an ascent, and the objective has no parts to use it with.
        TrainingError: The loss became infinite or NaN.
    """
    progress = progress or Progress(enabled=False)
    steps = phase_steps(epochs, batches)
    ascends_from = steps
    if ascent is not None:
        objective.require_parts()
        ascends_from = round(ascent.begins * steps)
    history: list[dict[str, Any]] = []
    device_type = batches.device.type
    precision = torch.autocast(device_type, torch.bfloat16) if autocast else contextlib.nullcontext()
    meter, done = _Meter(), start
    with kept_modes(model), progress.phase(phase, steps, start) as bar:
        model.train()
        for current, x, y in _stream(batches, objective, steps - start):
            passed = span[0] + (span[1] - span[0]) * (done + 1) / steps
            factor = min(lr_factor(schedule, done / steps), warm_up_factor(recipe.warmup, passed))
            for group in optimizer.param_groups:
                group["lr"] = lr * factor * group.get("lr_scale", 1.0)
            optimizer.zero_grad(set_to_none=True)
            with rematerialised(model) if recipe.checkpointing else contextlib.nullcontext():
                step = step_in_parts(
                    recipe.accumulate,
                    model,
                    x,
                    y,
                    current.at(span[0] + (span[1] - span[0]) * done / steps),
                    threat,
                    generator=generator,
                    precision=precision,
                    ascent=ascent if done >= ascends_from else None,
                )
            if recipe.clip_norm is not None:
                moving = [p for group in optimizer.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(moving, recipe.clip_norm)
            optimizer.step()
            if ema is not None:
                ema.update_parameters(model)
            with precision:
                _note(meter, model, step.loss, step.logits, step.clean_logits, x, y, look=done % CLEAN_EVERY == 0)
            done += 1
            bar.advance(meter.read() if device_type == "cpu" or done % CLEAN_EVERY == 0 else {})
            if done % len(batches) == 0 or done == steps:
                record: dict[str, Any] = {"phase": phase, "epoch": math.ceil(done / len(batches)), "steps": done}
                record |= {"lr": optimizer.param_groups[0]["lr"], **meter.read()}
                if ascent is not None:
                    record |= ascent.read()
                if not math.isfinite(record["loss"]):
                    raise TrainingError(
                        f"the loss of phase {phase!r} is {record['loss']} after {done} steps; "
                        f"lower the learning rate (lr={lr:g}) or set clip_norm=1.0"
                    )
                if on_epoch is not None:
                    on_epoch(record)
                history.append(record)
                if done < steps:
                    meter = _Meter()
    return history


def _stream(
    batches: Batches, objective: Objective, steps: int
) -> Iterator[tuple[Objective, torch.Tensor, torch.Tensor]]:
    """What each of the next steps minimises, and on what; an epoch has `len(batches)` steps, replays among them."""
    while steps > 0:
        current, left = objective.begin(), min(steps, len(batches))
        steps -= left
        for x, y in batches:
            for _ in range(min(current.replays, left)):
                yield current, x, y
            left -= min(current.replays, left)
            if left == 0:
                break


@torch.no_grad()
def _note(
    meter: _Meter,
    model: nn.Module,
    loss: torch.Tensor,
    logits: torch.Tensor,
    clean: torch.Tensor | None,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    look: bool,
) -> None:
    meter.loss = meter.loss + loss.detach() * len(y)
    meter.right = meter.right + (logits.argmax(1) == y).sum()
    meter.seen += len(y)
    if clean is None and look:
        with eval_mode(model):
            clean = model(x)
    if clean is not None:
        meter.clean_right = meter.clean_right + (clean.argmax(1) == y).sum()
        meter.clean_seen += len(y)
