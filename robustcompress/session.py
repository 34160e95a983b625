"""All that a strategy may touch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from robustcompress.budget import Cost, measure
from robustcompress.budgeted import BudgetedRun
from robustcompress.checkpoint import Journal, State, agree
from robustcompress.data import Batches
from robustcompress.distributed import Parts
from robustcompress.goal import Goal
from robustcompress.robust.attacks import eval_mode, pgd
from robustcompress.robust.objective import Objective
from robustcompress.robust.probe import accuracies
from robustcompress.structure import StructuralEditor
from robustcompress.train import (
    STATISTICS_BATCHES,
    Ascent,
    Care,
    CompiledNetwork,
    Midway,
    Progress,
    Schedule,
    Selection,
    augmentation,
    average_epoch,
    computes_in_bf16,
    estimate_statistics,
    frozen_but,
    make_average,
    make_guard,
    make_optimizer,
    phase_steps,
    recipe_ascent,
    safe_memory_format,
    set_memory_format,
    train,
    with_auxiliary,
)

__all__ = ["Goal", "Session"]


class Session(BudgetedRun):
    """A network under compression.

    Args:
        model: The network, on its device; edited and trained in place.
        editor: Its editor.
        example: One image batch of the right shape, on the same device.
        goal: What the run is for.
        progress: Where progress is shown.
        on_record: Called with every record of the history as it is written.
        journal: Where the run is recorded, to be resumed from there; None for nowhere.
        parts: Into how many every batch is cut, and which of them are this process's; as many as the recipe's
            `accumulate`, all for this process, where None.

    Attributes:
        model: The network.
        editor: The only way to change its shape; optimizer and average follow every edit.
        goal: What the run is for.
        parts: Into how many every batch is cut, and which of them are this process's.
        cost_model: Predicts the cost of any widths.
        latency: The limit on latency; None where the budget says nothing about it.
        tuning: The loss of `finetune`; None for the goal's objective. `teacher.appoint` gives it a teacher.
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
        journal: Journal | None = None,
        parts: Parts | None = None,
    ) -> None:
        self.parts = parts or Parts(goal.recipe.accumulate)
        losses = list(filter(None, (goal.objective, goal.finetune)))
        for objective in losses:
            objective.check(goal.threat)
            if goal.recipe.awp or goal.recipe.sam:
                objective.require_parts()
        super().__init__(
            editor, example, goal, progress=progress, on_record=on_record, journal=journal, world=self.parts.world
        )
        self.model = model
        self.tuning = goal.finetune
        self._example = example
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
            extra=goal.data.extra,
        )
        self.parts.check(self._batches.batch_size)
        self._memory_format = torch.contiguous_format
        self._optimizer: torch.optim.Optimizer | None = None
        self._ema: AveragedModel | None = None
        self._spent = 0.0  # share of the run's epochs that phases have had so far
        self._autocast = computes_in_bf16(goal.recipe.bf16, self._device)
        self._care = Care(goal.recipe, parts=self.parts.total, say=self.say, record=self.record)
        self.keep("care", self._care)
        self._guard = make_guard(
            goal.objective,
            goal.threat,
            goal.data.train,
            count=goal.recipe.guard,
            seed=goal.seed,
            device=self._device,
            batch_size=goal.recipe.batch_size,
            say=self.say,
            world=self.world,
        )
        if self._guard is not None:
            self.keep("guard", self._guard)

    @property
    def averaged(self) -> nn.Module:
        """The averaged network where there is one, else the network: what scores and selections look at."""
        return self._ema.module if self._ema is not None else self.model

    def steps(self, share: float) -> int:
        """How many training steps a phase of this share of the epochs has."""
        return phase_steps(share * self.goal.epochs, self._batches)

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
        objective: Objective | None = None,
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
            objective: What is minimised; the goal's objective by default.
        """
        recipe = self.goal.recipe
        if self._optimizer is None:
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            self._optimizer = make_optimizer(recipe, parameters, lr=recipe.lr)
            self.editor.follow(self._optimizer)
        if self._ema is None and (average := make_average(self.model, recipe)) is not None:
            self._ema = average
            self.editor.follow(average)
        selection = self._selection(share) if select else None
        begins = (recipe.awp_warmup - self._spent) / share if share else 0.0
        ascent = recipe_ascent(self._optimizer, recipe, awp, begins=begins)
        self._loop(
            phase, share, self._optimizer, lr_scale * recipe.lr, schedule, self._ema, selection, ascent, objective
        )
        if selection is not None:
            selection.restore()

    def finetune(self, *, share: float, lr_scale: float = 1.0, awp: float | None = None) -> None:
        """Train what a cut has left, by the loss that the goal has for it; the best epoch is kept.

        The phase is called "finetune". Where that loss wants a teacher and the caller gave none, `teacher.appoint` has
        made one of the reference before the cut.

        Args:
            share: Share of all epochs.
            lr_scale: Factor on the recipe's learning rate.
            awp: Radius of adversarial weight perturbation in this phase; None for the recipe's.
        """
        self.train("finetune", share=share, lr_scale=lr_scale, select=True, awp=awp, objective=self.tuning)

    def train_only(
        self,
        phase: str,
        parameter_groups: Sequence[dict[str, Any]],
        *,
        share: float,
        lr: float,
        schedule: Schedule = "cosine",
        ascent: Ascent | None = None,
        objective: Objective | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Train only these parameters (scores, batch-norm affines) with Adam; all others are frozen meanwhile.

        Args:
            phase: Its name in progress and history.
            parameter_groups: Adam parameter groups; "lr_scale" multiplies `lr`.
            share: Share of all epochs.
            lr: Peak learning rate.
            schedule: Its course.
            ascent: Compute gradients one ascent above, from its beginning on; the recipe's `awp` is for weights alone.
            objective: What is minimised; the goal's objective by default.
            on_epoch: Called with each epoch's record before it is written, to which it may add.
        """
        with frozen_but(self.model, [p for group in parameter_groups for p in group["params"]]):
            optimizer = torch.optim.Adam([dict(group) for group in parameter_groups], lr=lr)
            self._loop(phase, share, optimizer, lr, schedule, None, None, ascent, objective, on_epoch)

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
        selection: Selection | None,
        ascent: Ascent | None,
        objective: Objective | None = None,
        look: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        before, by_epochs = self._spent, self.goal.recipe.averaging == "swa"
        self._spent += share
        self._lay_out()
        done, state, midway = 0, None, Midway()
        steps = self.steps(share)
        if self._journal is not None:
            state = self._state(optimizer, selection, midway)
            done = self._journal.enter(phase, steps, self.history, state)
            if done == steps:
                return
        agree(self.world, phase, state or self._state(optimizer, selection))
        guard = self._guard if optimizer is self._optimizer else None  # scores are no weights: nothing to go back to
        if guard is not None:
            guard.enter(self.model, [ema] if ema is not None else [], optimizer, begun=done > 0, midway=midway)
        macs, params = self.cost_model.predict(self.editor.widths)

        def on_epoch(record: dict[str, Any]) -> None:
            record |= {"macs": round(macs), "params": round(params)}
            if ema is not None and by_epochs:
                spent = before + share * record["steps"] / steps
                record["averaged"] = average_epoch(
                    ema, self.model, self._batches.iterate(0), counts=spent > self.goal.recipe.swa_start + 1e-9
                )
            if guard is not None:  # after the average, which it puts back too
                guard.look(record)
            if selection is not None:
                selection.look(record)
            if look is not None:
                look(record)
            self.record(record)
            if self._journal is not None and state is not None:
                self._journal.epoch_done(record["steps"], self.history, state)
            else:
                self._stop_if_asked(phase)

        def on_step(done: int) -> None:
            if self._journal is not None and state is not None:
                self._journal.step_done(done, self.history, state)
            else:
                self._stop_if_asked(phase)

        # Gates are hooks, opaque to a compiler.
        compiles = self.goal.recipe.compile and self.goal.objective.compiles and optimizer is self._optimizer
        train(
            CompiledNetwork(self.model) if compiles else self.model,
            self._batches,
            with_auxiliary(objective or (self._guard.objective if self._guard else self.goal.objective), self.editor),
            self.goal.threat,
            self.goal.recipe,
            epochs=share * self.goal.epochs,
            optimizer=optimizer,
            lr=lr,
            schedule=schedule,
            generator=self._attack_generator,
            phase=phase,
            ema=None if by_epochs else ema,
            progress=self.progress,
            on_epoch=on_epoch,
            autocast=self._autocast,
            ascent=ascent,
            start=done,
            span=(min(before, 1.0), min(self._spent, 1.0)),
            midway=midway,
            on_step=on_step,
            parts=self.parts,
            care=self._care,
        )

    def _selection(self, share: float) -> Selection:
        epochs = math.ceil(phase_steps(share * self.goal.epochs, self._batches) / len(self._batches))
        judged = len(self.goal.data.val) > 0 and self.goal.recipe.val_images > 0
        return Selection(epochs, lambda: self.averaged, (lambda: self.validate()) if judged else None)

    def _everything(self) -> State:
        return self._state(None, None)

    def _state(
        self, optimizer: torch.optim.Optimizer | None, selection: Selection | None, midway: Midway | None = None
    ) -> State:
        """Where all lies that moves in a phase which this optimizer trains; None where nothing is trained."""
        modules: dict[str, nn.Module] = {"model": self.model}
        if self._ema is not None:
            modules["average"] = self._ema
        optimizers = {} if self._optimizer is None else {"optimizer": self._optimizer}
        if optimizer is not None and optimizer is not self._optimizer:
            optimizers["phase"] = optimizer
        return State(
            modules=modules,
            optimizers=optimizers,
            generators={
                "session": self.generator,
                "attack": self._attack_generator,
                "editor": self.editor.generator,
            },
            edits=self.editor.edits,
            batches=self._batches,
            selection=selection,
            kept=self._kept,
            midway=midway,
            device=self._device,
        )

    def recalibrate(self, *, batches: int = STATISTICS_BATCHES) -> None:
        """Re-estimate batch-norm statistics on clean training images: a cut leaves those of the layers behind it wrong.

        Args:
            batches: How many batches to average over.
        """
        if not self.replaying:
            estimate_statistics(self.model, self._batches, count=batches)

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

    def validate(self, network: nn.Module | None = None) -> tuple[float, float]:
        """Clean and robust accuracy on (at most `recipe.val_images`) validation images, by default of the average.

        Robust against PGD-10, or (of the run's own network) what `Objective.withstood` says.
        """
        images = self.goal.data.val.first(self.goal.recipe.val_images)
        batches = Batches(images, self.goal.recipe.batch_size, device=self._device)
        generator = torch.Generator(self._device).manual_seed(self.goal.seed)  # the same noise every time
        judged, view = (self.averaged, self.goal.objective) if network is None else (network, None)
        return accuracies(judged, batches, self.goal.threat, generator=generator, objective=view, world=self.world)
