"""The teacher of a robust distillation: how robust it is, and how the reference of a run becomes one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from robustcompress.data import DataSplits
from robustcompress.errors import InputError
from robustcompress.robust.statistics import wilson
from robustcompress.train import Progress

if TYPE_CHECKING:
    from robustcompress.session import Session

LEAST = 0.25
"""Of what a teacher has above chance on clean images, so much should stay under PGD-10; below it is no robust one."""

REFERENCE = "reference"
"""The source of a teacher that is the run's own uncompressed reference."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Teacher:
    """A network that others learn from.

    Attributes:
        model: In eval mode, without gradients, on the run's device: it stays there beside the network that learns.
        told: Where it is from, as plain JSON without places of this machine, for results.
        identity: What makes it the same teacher, for checkpoints.
    """

    model: nn.Module
    told: Mapping[str, Any]
    identity: Mapping[str, str] = field(default_factory=dict)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that is only asked: eval mode, and no gradients to its weights."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def doubt(clean: float, robust: float, images: int, classes: int) -> str:
    """What speaks against learning robustness from a network of these accuracies (in [0, 1]); empty for nothing.

    Args:
        clean: Accuracy without an attack.
        robust: Accuracy under PGD-10.
        images: How many it was measured on.
        classes: How many there are to guess among.
    """
    chance = 1 / classes
    said = f"its PGD-10 accuracy on validation images is {100 * robust:.1f} % ({100 * clean:.1f} % clean"
    if robust <= chance:
        return f"{said}; guessing gives {100 * chance:.1f} %): it has no robustness to pass on"
    if wilson(round(robust * images), images)[0] <= chance:
        return f"{said}): on {images} images that is not shown to be better than guessing"
    if robust - chance < LEAST * (clean - chance):
        return f"{said}): most of what it knows is lost under attack, and networks that learn from such are not robust"
    return ""


def with_labels(data: DataSplits, teacher: Teacher | None, progress: Progress) -> DataSplits:
    """The same data, with the teacher's answers as the labels of extra images that have none."""
    if data.extra is None or data.extra.labels is not None or teacher is None:
        return data
    model = teacher.model
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def answer(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels.to(device, torch.float32).div_(255)).argmax(1)  # type: ignore[no-any-return]

    progress.say(f"labelling {len(data.extra):,} extra images")
    return replace(data, extra=data.extra.labelled(answer))


def introduce(session: Session, teacher: Teacher) -> None:
    """Measure a teacher that the caller gave, and write down what was found.

    Raises:
        InputError: Under PGD-10 it is no better than guessing.
    """
    _look(session, teacher.model, teacher.told, given=True)


def appoint(session: Session) -> None:
    """Have the network, as it is now, teach its own fine-tuning, where that wants a teacher and the caller gave none.

    To be called when the uncompressed reference is trained, before anything is cut. Checkpoints hold the teacher. One
    that is no better than guessing is warned of: it is too late to refuse it.
    """
    if session.tuning is None or not session.tuning.needs_teacher:
        return
    teacher = frozen_copy(session.model)
    session.keep("teacher", teacher)
    session.tuning = session.tuning.taught_by(teacher)
    _look(session, teacher, {"source": REFERENCE}, given=False)


def _look(session: Session, teacher: nn.Module, told: Mapping[str, Any], *, given: bool) -> None:
    record: dict[str, Any] = {"phase": "teacher", "event": "teacher", **told}
    images = min(len(session.goal.data.val), session.goal.recipe.val_images)
    if images:
        clean, robust = session.decide("accuracy of the teacher", lambda: session.validate(teacher))
        record |= {"val_clean": clean, "val_robust": robust, "images": images}
    session.record(record)
    if not images:
        session.say("warning: nothing is known of the teacher's robustness: there are no validation images to attack")
        return
    session.say(f"the teacher has {100 * clean:.1f} % clean and {100 * robust:.1f} % PGD-10 accuracy (validation)")
    doubted = doubt(clean, robust, images, session.goal.data.num_classes)
    if not doubted:
        return
    if given and robust <= 1 / session.goal.data.num_classes:
        raise InputError(f"this teacher cannot teach robustness: {doubted}; give one that was trained adversarially")
    session.say(f"warning: the teacher is hardly robust: {doubted}")
