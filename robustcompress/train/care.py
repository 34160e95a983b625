"""Steps that go wrong: what is not finite is noticed before it reaches the weights, and memory may run out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.errors import RobustCompressError
from robustcompress.robust.memory import is_out_of_memory, release
from robustcompress.robust.objective import ObjectiveStep
from robustcompress.train.ascent import Ascent
from robustcompress.train.engine import Engine
from robustcompress.train.recipe import Recipe

LOOK_EVERY = 50
"""On a GPU, where looking waits for the device, so many steps pass between two looks of a run that stops."""

IN_A_ROW = 10
"""So many steps are left out in a row; then it is given up."""

LEAST, RECOVERY = 2.0**-10, 2.0**0.01
"""Of the learning rate: its smallest factor, and what a good step multiplies the factor by, until it is 1 again."""


class TrainingError(RobustCompressError):
    """Training cannot go on: loss, gradient or weights are not finite, or one image is too much for the memory."""


class Care:
    """Carries out the steps of a run, and is told what to do about bad ones.

    Where loss or gradient are not finite, "stop" raises, before the optimizer has seen them (on a GPU within 50 steps,
    and no checkpoint is written then); "skip" leaves the step out: weights, averages, optimizer and running statistics
    stay, the images and the attack's noise go on. After each, the learning rate is halved, down to a 1024th; each good
    step brings it back by a factor of 2^(1/100). After ten in a row it is given up.

    Where memory runs out, the batch is attacked and passed in twice as many parts from then on (`step_in_parts`), and
    the same step is made again with the same noise.

    Args:
        recipe: Says which.
        parts: Into how many a batch is cut to begin with; as many as the recipe's `accumulate` where None.
        say: Tells the person who waits.
        record: Adds an event to the history.

    Attributes:
        optional: Checkpoints of before it was known hold nothing of it.
        parts: Into how many parts a batch is cut now.
        factor: Of the learning rate.
    """

    optional = True

    def __init__(
        self,
        recipe: Recipe,
        *,
        parts: int | None = None,
        say: Callable[[str], None] = lambda line: None,
        record: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self._skips, self._say, self._record = recipe.nonfinite == "skip", say, record
        self.parts, self.factor = recipe.accumulate if parts is None else parts, 1.0
        self._row = self._left_out = 0
        self._bad: Tensor | None = None  # on a GPU: whether anything since the last look was not finite

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"parts": self.parts, "factor": self.factor, "row": self._row, "left_out": self._left_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.parts, self.factor = max(self.parts, int(state["parts"])), float(state["factor"])
        self._row, self._left_out = int(state["row"]), int(state["left_out"])

    def read(self) -> dict[str, Any]:
        """How many steps were left out since the last call; empty for none."""
        count, self._left_out = self._left_out, 0
        return {"left_out": count} if count else {}

    def step(
        self,
        act: Callable[[int], ObjectiveStep],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        ascent: Ascent | None,
        *,
        engine: Engine,
        size: int,
        whole: bool,
        where: Mapping[str, Any],
    ) -> tuple[ObjectiveStep, Undo]:
        """Make a step's gradients, in more parts where memory runs out.

        Args:
            act: Leaves them in `.grad`, given the number of parts.
            model: The network.
            optimizer: Holds the parameters.
            generator: The attack's randomness.
            ascent: What counts its steps; None where there is none.
            engine: Has all processes make the step again where one of them cannot.
            size: Images in the batch.
            whole: Whether the objective needs the batch as a whole.
            where: Phase and steps, for the history.

        Returns:
            What the objective found, and what puts back all that the step has moved but images and noise.

        Raises:
            TrainingError: Memory ran out with a part of one image, or where the batch cannot be cut.
        """
        while True:
            undo = Undo(model, generator, ascent)
            try:
                with engine.attempt():
                    return act(self.parts), undo
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).splitlines()[0]
            # Here and not above: the error's frames held what the step had computed.
            if whole or self.parts >= size:
                what = "one image" if not whole else f"a batch of {size}, which this objective needs as a whole,"
                raise TrainingError(f"memory ran out on {what} of phase {where['phase']!r} ({said}): give less to do")
            self.parts = min(size, 2 * self.parts)
            optimizer.zero_grad(set_to_none=True)
            undo(noise=True)
            release()
            self._say(f"memory ran out: batches of {size} images are passed in {self.parts} parts from here on")
            self._record({**where, "event": "out of memory", "accumulate": self.parts})

    def accepts(self, loss: Tensor, parameters: Sequence[nn.Parameter], norm: Tensor | None, told: str) -> bool:
        """Whether a step may reach the weights.

        Args:
            loss: Of the step.
            parameters: Which move; their `.grad` is looked at.
            norm: Of all gradients together, where it is known.
            told: Which step it is, for messages.

        Raises:
            TrainingError: It may not, and the recipe says to stop; or it is one too many.
        """
        if norm is None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else loss.detach()
        bad = ~(loss.detach().isfinite() & norm.isfinite())
        if bad.is_cuda and not self._skips:
            self._bad = bad if self._bad is None else self._bad | bad
            return True
        if not bool(bad):
            self.factor, self._row = min(1.0, self.factor * RECOVERY), 0
            return True
        found = f"the loss is {float(loss.detach()):g}, the norm of its gradient {float(norm):g}"
        if not self._skips:
            raise TrainingError(f"{told}: {found}; {_REMEDY}")
        self._row, self._left_out = self._row + 1, self._left_out + 1
        if self._row > IN_A_ROW:
            raise TrainingError(f"{told}: {found}, after {IN_A_ROW} steps in a row that were left out; {_REMEDY}")
        self.factor = max(LEAST, self.factor / 2)
        if self._row == 1:
            self._say(f"{told}: {found}; the step is left out, and the learning rate halved for a while")
        return False

    def look(self, told: str) -> None:
        """Raise a TrainingError where a step on a GPU was not finite since the last look."""
        bad, self._bad = self._bad, None
        if bad is not None and bool(bad):
            raise TrainingError(f"{told}, or up to {LOOK_EVERY} before: loss or gradient are not finite; {_REMEDY}")


_REMEDY = "lower the learning rate, set clip_norm=1.0, or leave such steps out with nonfinite='skip'"


class Undo:
    """What a step moves beside the weights: running statistics, random generators, an ascent's counters.

    Args:
        model: The network, before the step.
        generator: The attack's randomness.
        ascent: What counts its steps.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator, ascent: Ascent | None) -> None:
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._generator, self._noise = generator, generator.get_state()
        self._global = torch.get_rng_state()
        self._device = torch.cuda.get_rng_state(generator.device) if generator.device.type == "cuda" else None
        self._ascent, self._counted = ascent, {} if ascent is None else dict(ascent.state_dict())

    @torch.no_grad()
    def __call__(self, *, noise: bool = False) -> None:
        """Put it back; also the random numbers drawn, if `noise`."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        if self._ascent is not None:
            self._ascent.load_state_dict(self._counted)
        if noise:
            self._generator.set_state(self._noise)
            torch.set_rng_state(self._global)
            if self._device is not None:
                torch.cuda.set_rng_state(self._device, self._generator.device)
