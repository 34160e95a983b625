"""What an objective is: an attack on a batch, then a loss on what it found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustcompress.errors import InputError
from robustcompress.robust.threat import ThreatModel


@dataclass(frozen=True, slots=True)
class ObjectiveStep:
    """What one evaluation of an objective gives.

    Attributes:
        loss: Scalar with its graph; call `backward()` on it.
        logits: Detached logits on the attacked images, [N, K], from the pass that the loss is made of.
        x_adv: The attacked images, detached, [N, C, H, W].
        clean_logits: Detached logits on the clean images, where the objective computes them anyway; else
            None.
    """

    loss: Tensor
    logits: Tensor
    x_adv: Tensor
    clean_logits: Tensor | None = None


_WHOLE = "objective {0!r} cannot be split: define attack() and loss_on() for it, or leave out {1}"
_WHO = "AWP, SAM, S2AP and diagnose"


class Objective(ABC):
    """A loss over one batch. Abstract: the concrete ones are final, frozen dataclasses of their options.

    An objective defines `attack` and `loss_on`.
    """

    name: ClassVar[str]
    compiles: ClassVar[bool] = True
    """Whether its passes through a network can be compiled."""

    def at(self, progress: float) -> Objective:
        """Return the objective as it is at some point of a run; this one, where nothing changes on the way.

        Whatever changes is a function of `progress` alone, so that a run that goes on from a checkpoint needs nothing
        more. An objective that nobody asked this of is as at the end.

        Args:
            progress: Share of the run's epochs that is done, in [0, 1].
        """
        return self

    def check(self, threat: ThreatModel) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise InputError where it cannot be used against a threat: to be told before any training."""

    @property
    def replays(self) -> int:
        """How many steps in a row are taken on one batch; an epoch has as many steps in all, and so fewer batches."""
        return 1

    @property
    def single_step(self) -> float | None:
        """Length of the step in units of eps, where images are attacked by one gradient step alone; else None.

        Training on such attacks can overfit to them catastrophically, and is watched for it.
        """
        return None

    def begin(self) -> Objective:
        """What the steps of one epoch minimise: this, or for an objective with a memory a new one whose is empty.

        The training loop asks for it at the beginning of every epoch, so that what an objective remembers from step to
        step has to be stored within an epoch alone, and only where it is `memory` that tells it.
        """
        return self

    @property
    def remembers(self) -> bool:
        """Whether `begin` gives something that remembers, from one step to the next."""
        return self.begin() is not self

    def memory(self) -> dict[str, Tensor] | None:
        """What an epoch's objective remembers just now, for a checkpoint within the epoch.

        What an objective only counts for its records belongs here too, also where `begin` gives the objective itself.

        Returns:
            Tensors by name. None, as here, where it does not tell: runs are then kept at the ends of epochs alone,
            unless there is nothing to remember (see `remembers`).
        """
        return None

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Take what `memory` told, in place of having seen the epoch's steps so far; nothing to forget all."""
        if memory:
            raise InputError(f"objective {self.name!r} tells what it remembers: define remember() too")

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Find the images that the loss is computed on.

        Args:
            model: Maps images to logits. Its mode and its running statistics are as before afterwards; `.grad` is not
                touched.
            x: Images within `threat.bounds`, [N, C, H, W].
            y: Labels, int64 [N].
            threat: What the adversary may do.
            generator: Source of the attack's randomness; torch's global one where None.

        Returns:
            Attacked images, detached, [N, C, H, W].

        Raises:
            InputError: This objective defines `loss` as a whole, so that its parts cannot be had.
        """
        raise InputError(_WHOLE.format(self.name, _WHO))

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """Compute the loss on images that were attacked before, in the mode the model is in.

        Running statistics move as they do in `loss`. May be called several times for one attack, with other weights.

        Args:
            model: Maps images to logits.
            x: The clean images, [N, C, H, W].
            x_adv: What `attack` returned for them.
            y: Labels, int64 [N].

        Raises:
            InputError: As `attack`.
        """
        raise InputError(_WHOLE.format(self.name, _WHO))

    def loss(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> ObjectiveStep:
        """Attack the batch, then compute the loss in the mode the model is in: `loss_on` after `attack`.

        An objective that overrides this alone trains as well, but not with an ascent (AWP, SAM, S2AP): that needs the
        parts.

        Args:
            model: Maps images to logits. Its mode is as before afterwards; `.grad` is not touched.
            x: Images within `threat.bounds`, [N, C, H, W].
            y: Labels, int64 [N].
            threat: What the adversary may do.
            generator: Source of the attack's randomness; torch's global one where None.
        """
        return self.loss_on(model, x, self.attack(model, x, y, threat, generator=generator), y)

    def withstood(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor | None:
        """Say which images count as withstood where the best epoch of a phase is chosen.

        Args:
            model: Maps images to logits, in eval mode.
            x: Images within `threat.bounds`, [N, C, H, W].
            y: Labels, int64 [N].
            threat: What the adversary may do.
            generator: Source of randomness; torch's global one where None.

        Returns:
            Bool [N]; or None, as here, for those that PGD leaves right.
        """
        return None

    def require_parts(self, who: str = _WHO) -> None:
        """Raise InputError unless `attack` and `loss_on` are defined: to be told before any training.

        Args:
            who: What needs them, for the message.
        """
        kind = type(self)
        if kind.attack is Objective.attack or kind.loss_on is Objective.loss_on:
            raise InputError(_WHOLE.format(self.name, who))

    def for_labels(self, labels: Tensor, num_classes: int) -> Objective:
        """This objective with all that depends on the training labels in numbers; itself where nothing does.

        Args:
            labels: Of the training images, int64 [N].
            num_classes: How many classes there are.

        Raises:
            InputError: An option does not fit so many classes.
        """
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether it can train only after `taught_by`."""
        return False

    def taught_by(self, teacher: nn.Module) -> Objective:
        """The same objective with a teacher to learn from; itself where it needs none.

        Args:
            teacher: Maps images to logits of the same classes, on the device of the images; it is asked in eval mode,
                and its weights never get gradients.
        """
        return self

    def check_classes(self, classes: Sequence[str]) -> None:  # noqa: B027 - most objectives take any classes
        """Raise InputError where the objective cannot be used with these classes: to be told before any training.

        Args:
            classes: Their names, in the order of their labels.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the name and the options as plain data, for `objective_from_json`."""
