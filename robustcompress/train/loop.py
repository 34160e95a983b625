"""The one training loop."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from robustcompress.allocator import kept_memory
from robustcompress.data import Batches
from robustcompress.distributed import Parts
from robustcompress.interrupt import listen
from robustcompress.robust.attacks import eval_mode, kept_modes
from robustcompress.robust.objectives import Objective, ObjectiveStep
from robustcompress.robust.threat import ThreatModel
from robustcompress.train.accumulate import step_in_parts
from robustcompress.train.ascent import Ascent
from robustcompress.train.care import LOOK_EVERY, Care, TrainingError
from robustcompress.train.engine import Engine
from robustcompress.train.large_batch import Lamb, Lars
from robustcompress.train.midway import Midway
from robustcompress.train.progress import Progress
from robustcompress.train.recipe import Recipe
from robustcompress.train.remat import rematerialised
from robustcompress.train.schedules import Schedule, lr_factor, warm_up_factor

CLEAN_EVERY = 10
"""Clean training accuracy is looked at every so many steps, or less often (`clean_every`)."""
_LOOKED_AT = 2_000


def clean_every(images: int) -> int:
    """Steps between two looks at clean training accuracy, each of which is a forward pass more, in epochs so long.

    Some 2,000 images an epoch tell the accuracy to a point; more would take time and tell no more.
    """
    return max(CLEAN_EVERY, images // _LOOKED_AT)


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


_SUMS = ("loss", "right", "clean_right", "seen", "clean_seen")


@dataclass(slots=True)
class _Meter:
    """Running means since the last `reset`; the tensors stay on the device until they are read."""

    loss: torch.Tensor | float = 0.0
    right: torch.Tensor | float = 0.0
    clean_right: torch.Tensor | float = 0.0
    seen: int = 0
    clean_seen: int = 0
    started: float = field(default_factory=time.perf_counter)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SUMS} | {"seconds": time.perf_counter() - self.started}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _SUMS:
            setattr(self, name, state[name])
        self.started = time.perf_counter() - state["seconds"]

    def add(self, sums: Sequence[torch.Tensor | float], count: int, *, looked: bool) -> None:
        """Take the sums of a step over so many images."""
        self.loss, self.right = self.loss + sums[0], self.right + sums[1]
        self.seen += count
        if looked:
            self.clean_right, self.clean_seen = self.clean_right + sums[2], self.clean_seen + count

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
    midway: Midway | None = None,
    on_step: Callable[[int], None] | None = None,
    parts: Parts | None = None,
    care: Care | None = None,
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
        start: Steps that are done already: a resumed phase. Within an epoch `batches` counts that epoch already.
        span: Shares of the run's epochs at which this phase begins and ends, for objectives that change on the way and
            for the recipe's warm-up.
        midway: Holds what this loop remembers within an epoch; where `start` is within one, has it from a checkpoint.
        on_step: Called with the number of steps done after each that ends no epoch.
        parts: Into how many every batch is cut, and which are this process's: then all of its world call this, and each
            has the same weights and records in the end. By default as many as `recipe.accumulate`, all for this one.
        care: What is done about steps that go wrong, in this phase and others; by default what the recipe says.

    Returns:
        One record an epoch: phase, epoch, steps, lr, loss, robust and clean training accuracy, images/s, and what
        `ascent` tells of itself.

    Raises:
        InputError: There is an ascent, and the objective has no parts to use it with.
        TrainingError: Loss or gradient became infinite or NaN, or memory ran out for good.
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
    midway, parts = midway or Midway(), parts or Parts(recipe.accumulate)
    care = care or Care(recipe, parts=parts.total, say=progress.say)
    moving = [p for group in optimizer.param_groups for p in group["params"]]
    engine = Engine(model, moving, world=parts.world, compression=recipe.gradient_compression)
    meter, done, every = _Meter(), start, clean_every(len(batches.images))
    midway.hold("meter", meter)
    shared = ascent if parts.world.size > 1 else None  # whose sums are those of all processes
    if ascent is not None:
        ascent.world = parts.world
        midway.hold("ascent", ascent)
    with (
        kept_modes(model),
        contextlib.closing(engine),
        kept_memory(device_type) as look_at_memory,
        progress.phase(phase, steps, start) as bar,
    ):
        model.train()
        for objectives, x, y, key, count in _stream(batches, objective, start, steps, midway, parts):
            so_far = _sums(shared)
            passed = span[0] + (span[1] - span[0]) * (done + 1) / steps
            factor = min(lr_factor(schedule, done / steps), warm_up_factor(recipe.warmup, passed))
            for group in optimizer.param_groups:
                group["lr"] = lr * (factor * group.get("lr_scale", 1.0)) * care.factor
            optimizer.zero_grad(set_to_none=True)
            make = functools.partial(
                step_in_parts,
                model=model,
                x=x,
                y=y,
                objectives=[current.at(span[0] + (span[1] - span[0]) * done / steps) for current in objectives],
                threat=threat,
                generator=generator,
                precision=precision,
                ascent=ascent if done >= ascends_from else None,
                engine=engine,
                count=count,
                key=key,
            )
            with rematerialised(model) if recipe.checkpointing else contextlib.nullcontext():
                step, undo = care.step(
                    lambda pieces, make=make: make(parts.finer(pieces)),  # type: ignore[misc]
                    model,
                    optimizer,
                    generator,
                    ascent,
                    engine=engine,
                    size=count,
                    whole=objective.remembers,
                    where={"phase": phase, "steps": done},
                )
            norm = None if recipe.clip_norm is None else nn.utils.clip_grad_norm_(moving, recipe.clip_norm)
            told = f"phase {phase!r}, step {done + 1} of {steps}, lr={lr:g}"
            try:
                good = care.accepts(engine.total(step.loss), moving, norm, told)
            except TrainingError:
                undo()
                raise
            if good:
                optimizer.step()
                if ema is not None:
                    ema.update_parameters(model)
                look = done % len(batches) % every == 0  # at the first step of each epoch, however few it has
                with precision:
                    found = _note(model, step, x, y, look=look, count=count)
                climbed = [now - then for now, then in zip(_sums(shared), so_far, strict=True)]
                sums = engine.totals([*found, *climbed], x.device)
                meter.add(sums[:3], count, looked=look or step.clean_logits is not None)
                if shared is not None:
                    shared.take_sums([then + more for then, more in zip(so_far, sums[3:], strict=True)])
            else:
                undo()
                if objective.remembers:
                    for current in objectives:
                        current.remember({})
            listen(parts.world)
            look_at_memory()
            done += 1
            if done % LOOK_EVERY == 0 or done % len(batches) == 0 or done == steps:
                care.look(told)
            bar.advance(meter.read() if device_type == "cpu" or done % CLEAN_EVERY == 0 else {})
            if done % len(batches) == 0 or done == steps:
                record: dict[str, Any] = {"phase": phase, "epoch": math.ceil(done / len(batches)), "steps": done}
                record |= {"lr": optimizer.param_groups[0]["lr"], **meter.read()}
                if ascent is not None:
                    record |= ascent.read()
                record |= care.read()
                if on_epoch is not None:
                    on_epoch(record)
                history.append(record)
                if done < steps:
                    meter = _Meter()
                    midway.hold("meter", meter)
            elif on_step is not None:
                on_step(done)
    return history


def _stream(
    batches: Batches, objective: Objective, start: int, steps: int, midway: Midway, parts: Parts
) -> Iterator[tuple[list[Objective], torch.Tensor, torch.Tensor, str, int]]:
    """What each step from `start` on minimises, and on what; an epoch has `len(batches)` steps, replays among them.

    Yields:
        The objective (one for each part of this process, where it remembers), images and labels of this process's
        parts, a name of the step that no other step of the run has, and how many images the whole batch has.
    """
    at = start % len(batches)
    left = steps - start + at  # from the beginning of the epoch
    while left > 0:
        currents = [objective.begin() for _ in (parts.own if objective.remembers else range(1))]
        current = currents[0]
        # The memories of other processes are theirs.
        tells = current.memory() is not None
        midway.complete = parts.world.size == 1 if tells else not objective.remembers
        if tells or objective.remembers:
            midway.hold("objective", _Memory(currents))
        else:
            midway.drop("objective")  # of an epoch before: what is trained on may have changed
        first, replayed = divmod(at, current.replays)
        stop = min(left, len(batches))
        batches.epoch += not at
        images = batches.iterate(batches.epoch - 1, start=first, parts=parts)
        for index, (x, y) in enumerate(images, first):
            again = min(current.replays - replayed, stop - at)
            for step in range(at, at + again):
                yield currents, x, y, f"{batches.epoch - 1}/{step}", batches.size(index)
            at, replayed = at + again, 0
            if at == stop:
                break
        left, at = left - stop, 0


class _Memory:
    """What an epoch's objectives remember, one for each part of a batch, for `Midway`."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self._objectives = objectives

    def state_dict(self) -> dict[str, Any]:
        memories = [objective.memory() or {} for objective in self._objectives]
        return {f"{part}.{name}": value for part, memory in enumerate(memories) for name, value in memory.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for part, objective in enumerate(self._objectives):
            prefix = f"{part}."
            objective.remember({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _sums(ascent: Ascent | None) -> list[torch.Tensor | float]:
    return [] if ascent is None else ascent.sums()


@torch.no_grad()
def _note(
    model: nn.Module, step: ObjectiveStep, x: torch.Tensor, y: torch.Tensor, *, look: bool, count: int
) -> list[torch.Tensor | float]:
    """This process's sums of a step: of losses, of images that were right attacked, of those that were right clean."""
    clean = step.clean_logits
    if clean is None and look:
        with eval_mode(model):
            clean = model(x)
    right = (step.logits.argmax(1) == y).sum()
    return [step.loss.detach() * count, right, 0.0 if clean is None else (clean.argmax(1) == y).sum()]
