"""All that a strategy may touch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from robustcompress.budget import Budget, Cost, CostModel, measure
from robustcompress.data import Batches, DataSplits
from robustcompress.robust.attacks import eval_mode, pgd
from robustcompress.robust.objectives import Objective
from robustcompress.robust.threat import ThreatModel
from robustcompress.structure import StructuralEditor
from robustcompress.train import (
    Ascent,
    Progress,
    Recipe,
    Schedule,
    augmentation,
    averaged,
    make_optimizer,
    safe_memory_format,
    set_memory_format,
    train,
    weight_ascent,
)

SELECTIONS = 8
"""At most so many epochs of a selecting phase are attacked on the validation split."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What the run is for; a strategy reads it and cannot change it.

    Attributes:
        data: The three splits; strategies see `train` and `val` alone.
        threat: What the network must withstand.
        objective: The loss of every phase.
        budget: What the compact network may cost.
        reference: What the reference costs.
        epochs: Passes over the training images, all phases together.
        recipe: Training settings.
        seed: Seeds everything random.
        pretrained: Whether the reference already is robust, so that pretraining is skipped.
        round_to: Widths are multiples of this wherever a group is that wide.
    """

    data: DataSplits
    threat: ThreatModel
    objective: Objective
    budget: Budget
    reference: Cost
    epochs: float
    recipe: Recipe
    seed: int
    pretrained: bool
    round_to: int


class Session:
    """A network under compression.

    Args:
        model: The network, on its device; edited and trained in place.
        editor: Its editor.
        example: One image batch of the right shape, on the same device.
        goal: What the run is for.
        progress: Where progress is shown.
        on_record: Called with every record of the history as it is written.

    Attributes:
        model: The network.
        editor: The only way to change its shape; optimizer and average follow every edit.
        goal: What the run is for.
        cost_model: Predicts the cost of any widths.
        history: One record an epoch or an event.
        generator: The strategy's own randomness, on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        editor: StructuralEditor,
        example: torch.Tensor,
        goal: Goal,
        *,
        progress: Progress | None = None,
        on_record: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if goal.recipe.awp:
            goal.objective.require_parts()
        self.model = model
        self.editor = editor
        self.goal = goal
        self.history: list[dict[str, Any]] = []
        self.generator = torch.Generator().manual_seed(goal.seed + 1)
        self.cost_model = CostModel(editor, example)
        self.progress = progress or Progress(enabled=False)
        self._example = example
        self._on_record = on_record
        self._device = example.device
        self._attack_generator = torch.Generator(self._device).manual_seed(goal.seed + 2)
        self._batches = Batches(
            goal.data.train,
            min(goal.recipe.batch_size, len(goal.data.train)),
            device=self._device,
            augment=augmentation(goal.recipe, goal.data.name),
            generator=torch.Generator().manual_seed(goal.seed),
            drop_last=True,
            channels_last=False,  # until `_lay_out` says otherwise
        )
        self._memory_format = torch.contiguous_format
        self._optimizer: torch.optim.Optimizer | None = None
        self._ema: AveragedModel | None = None
        self._spent = 0.0  # share of the run's epochs that phases have had so far
        bf16 = goal.recipe.bf16
        self._autocast = bf16 is True or (
            bf16 == "auto" and self._device.type == "cuda" and torch.cuda.is_bf16_supported()
        )

    @property
    def limits(self) -> tuple[float, float]:
        """The absolute limits on MACs and parameters."""
        return self.goal.budget.limits(self.goal.reference)

    @property
    def averaged(self) -> nn.Module:
        """The averaged network where there is one, else the network: what scores and selections look at."""
        return self._ema.module if self._ema is not None else self.model

    def fits(self, widths: Mapping[str, int]) -> bool:
        """Whether the network with these widths keeps the budget."""
        macs, params = self.cost_model.predict(widths)
        return macs <= self.limits[0] and params <= self.limits[1]

    def cost(self) -> Cost:
        """What the network costs now, measured."""
        return measure(self.model, self._example)

    def train(
        self,
        phase: str,
        *,
        share: float,
        schedule: Schedule = "one-cycle",
        lr_scale: float = 1.0,
        select: bool = False,
        awp: float | None = None,
    ) -> None:
        """Train all weights for a share of the run's epochs.

        Optimizer and average go on from the phase before, across edits, until `settle`.

        Args:
            phase: Its name in progress and history.
            share: Share of all epochs.
            schedule: The learning rate's course over this phase.
            lr_scale: Factor on the recipe's learning rate.
            select: Keep the epoch whose averaged weights withstand PGD-10 best on the validation split.
            awp: Radius of adversarial weight perturbation in this phase; None for the recipe's.
        """
        recipe = self.goal.recipe
        if self._optimizer is None:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            self._optimizer = make_optimizer(recipe, parameters, lr=recipe.lr)
            self.editor.follow(self._optimizer)
        if self._ema is None and recipe.ema > 0:
            self._ema = averaged(self.model, recipe.ema)
            self.editor.follow(self._ema)
        selection = _Selection(self, share) if select else None
        begins = (recipe.awp_warmup - self._spent) / share if share else 0.0
        ascent = weight_ascent(self._optimizer, recipe.awp if awp is None else awp, begins=begins)
        self._loop(phase, share, self._optimizer, recipe.lr * lr_scale, schedule, self._ema, selection, ascent)
        if selection is not None:
            selection.restore()

    def train_only(
        self,
        phase: str,
        parameter_groups: Sequence[dict[str, Any]],
        *,
        share: float,
        lr: float,
        schedule: Schedule = "cosine",
        ascent: Ascent | None = None,
    ) -> None:
        """Train only these parameters (scores, batch-norm affines) with Adam; all others are frozen meanwhile.

        Args:
            phase: Its name in progress and history.
            parameter_groups: Adam parameter groups; "lr_scale" multiplies `lr`.
            share: Share of all epochs.
            lr: Peak learning rate.
            schedule: Its course.
            ascent: Compute gradients one ascent above, from its beginning on; the recipe's `awp` is for weights alone.
        """
        moving = {id(p) for group in parameter_groups for p in group["params"]}
        frozen = [p for p in self.model.parameters() if id(p) not in moving and p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            optimizer = torch.optim.Adam([dict(group) for group in parameter_groups], lr=lr)
            self._loop(phase, share, optimizer, lr, schedule, None, None, ascent)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _lay_out(self) -> None:
        """Choose the memory format for the widths of the moment."""
        memory_format = safe_memory_format(self.model, self._device)
        if memory_format != self._memory_format:
            self._memory_format = self._batches.memory_format = memory_format
            set_memory_format(self.model, memory_format)
            if self._ema is not None:
                set_memory_format(self._ema, memory_format)

    def _loop(
        self,
        phase: str,
        share: float,
        optimizer: torch.optim.Optimizer,
        lr: float,
        schedule: Schedule,
        ema: AveragedModel | None,
        selection: _Selection | None,
        ascent: Ascent | None,
    ) -> None:
        self._spent += share
        self._lay_out()
        macs, params = self.cost_model.predict(self.editor.widths)

        def on_epoch(record: dict[str, Any]) -> None:
            record |= {"macs": round(macs), "params": round(params)}
            if selection is not None:
                selection.look(record)
            self.record(record)

        train(
            self.model,
            self._batches,
            self.goal.objective,
            self.goal.threat,
            self.goal.recipe,
            epochs=share * self.goal.epochs,
            optimizer=optimizer,
            lr=lr,
            schedule=schedule,
            generator=self._attack_generator,
            phase=phase,
            ema=ema,
            progress=self.progress,
            on_epoch=on_epoch,
            autocast=self._autocast,
            ascent=ascent,
        )

    def recalibrate(self, *, batches: int = 20) -> None:
        """Re-estimate batch-norm statistics on clean training images: a cut leaves those of the layers behind it wrong.

        Args:
            batches: How many batches to average over.
        """
        update_bn((x for _, (x, _) in zip(range(batches), self._batches, strict=False)), self.model)

    def settle(self) -> None:
        """Give the network its averaged weights, and forget optimizer and average."""
        if self._ema is not None:
            self.model.load_state_dict(self._ema.module.state_dict())
            self.editor.unfollow(self._ema)
            self._ema = None
        if self._optimizer is not None:
            self.editor.unfollow(self._optimizer)
            self._optimizer = None

    def attacked(self, batches: int, *, steps: int = 10) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield training images attacked by PGD on the averaged network, which is in eval mode.

        Args:
            batches: How many batches; other images each time it is called.
            steps: PGD steps.

        Yields:
            `(x_adv, y)`: `[B, 3, H, W]` and `[B]`.
        """
        net = self.averaged
        for count, (x, y) in enumerate(self._batches):
            if count == batches:
                return
            with eval_mode(net):
                yield pgd(net, x, y, self.goal.threat, steps=steps, generator=self._attack_generator), y

    def record(self, record: dict[str, Any]) -> None:
        """Add a record to the history."""
        self.history.append(record)
        if self._on_record is not None:
            self._on_record(record)

    def say(self, line: str) -> None:
        """Tell the person who waits."""
        self.progress.say(line)

    def validate(self) -> tuple[float, float]:
        """Clean and PGD-10 accuracy of the averaged network on (at most `recipe.val_images`) validation images."""
        net = self.averaged
        images = self.goal.data.val.first(self.goal.recipe.val_images)
        generator = torch.Generator(self._device).manual_seed(self.goal.seed)  # the same noise every time
        clean = robust = 0
        with eval_mode(net):
            for x, y in Batches(images, self.goal.recipe.batch_size, device=self._device):
                x_adv = pgd(net, x, y, self.goal.threat, steps=10, generator=generator)
                with torch.no_grad():
                    clean += int((net(x).argmax(1) == y).sum())
                    robust += int((net(x_adv).argmax(1) == y).sum())
        return clean / max(1, len(images)), robust / max(1, len(images))


class _Selection:
    """Keeps the best epoch of a phase by its robust accuracy on the validation split."""

    def __init__(self, session: Session, share: float) -> None:
        self._session = session
        steps = max(1, round(share * session.goal.epochs * len(session._batches)))
        self._epochs = math.ceil(steps / len(session._batches))
        self._best: tuple[float, float] = (-1.0, -1.0)
        self._state: dict[str, torch.Tensor] | None = None

    def look(self, record: dict[str, Any]) -> None:
        remaining = self._epochs - record["epoch"]
        every = max(1, self._epochs // SELECTIONS)
        if len(self._session.goal.data.val) == 0 or self._session.goal.recipe.val_images == 0 or remaining % every:
            return
        clean, robust = self._session.validate()
        record |= {"val_clean": clean, "val_robust": robust}
        if (robust, clean) >= self._best:  # the later of equals: it has been averaged longer
            self._best = (robust, clean)
            self._state = copy.deepcopy(self._session.averaged.state_dict())

    def restore(self) -> None:
        if self._state is not None:
            self._session.averaged.load_state_dict(self._state)
