"""Where a teacher comes from: a module, a saved result, or a model by name with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.checkpoint import fingerprint
from robustcompress.data import TEACHER, DataSplits, Extra
from robustcompress.errors import InputError, Problems, first_line
from robustcompress.hub import is_address
from robustcompress.models import ModelSpec
from robustcompress.result import RESULT, load
from robustcompress.robust.attacks import eval_mode
from robustcompress.robust.objective import Objective
from robustcompress.strategies import Strategy
from robustcompress.teacher import Teacher, frozen_copy
from robustcompress.untrusted import load_state, read_tensors

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar", ".bin")
"""Endings of files that would run code when they are read."""

TeacherLike = nn.Module | str | Path | tuple[ModelSpec | str, str | Path]
"""A network; the directory of a saved result (or "hf://owner/name"); or a model and a safetensors file for it."""


def check_teaching(
    problems: Problems,
    strategy: Strategy,
    objective: Objective | None,
    finetune: Objective | None,
    teacher: object,
    pretrained: bool,
    *,
    labels: bool,
) -> None:
    """Note losses that want a teacher who will not be there, and teachers whom nobody asks."""
    nobody = teacher is None and not pretrained
    if finetune is not None and not strategy.finetunes:
        problems.add(
            f"finetune={finetune.name!r}: {strategy.name} has no fine-tuning after a cut; give the loss of all its "
            "training as objective"
        )
    if nobody and objective is not None and objective.needs_teacher:
        own = f", or finetune={objective.name!r} to learn from the reference that is cut" if strategy.finetunes else ""
        problems.add(
            f"objective={objective.name!r} wants a teacher from the start: give one (teacher=), or a robust reference "
            f"(pretrained=True){own}"
        )
    if nobody and finetune is not None and finetune.needs_teacher and strategy.finetunes and not strategy.pretrains:
        problems.add(
            f"finetune={finetune.name!r} wants a teacher, and {strategy.name} is set up to train no reference before "
            "the cut: give one (teacher=), or a robust reference (pretrained=True)"
        )
    asked = any(loss is not None and loss.needs_teacher for loss in (objective, finetune))
    if teacher is not None and not asked and not labels:
        problems.add("a teacher is given, and no loss asks it: add finetune='rslad', or objective='rslad'")


def labeller_of(
    problems: Problems, data: DataSplits, extra: Extra, device: torch.device | None, *, batch_size: int, nobody: bool
) -> Teacher | None:
    """Who labels extra images, where a saved result is to; notes what stands against mixing them in.

    Args:
        problems: Where it is noted.
        data: The data set.
        extra: Its extra images.
        device: Where to compute; None where that is a problem already.
        batch_size: Images a step.
        nobody: Whether there is no teacher from the start.
    """
    problems.attempt(lambda: extra.shares(min(batch_size, len(data.train))))
    if extra.labels is not None or device is None:
        return None
    if extra.labelled_by != TEACHER:
        labeller: Teacher | None = problems.attempt(lambda: read_teacher(extra.labelled_by, data, device))
        return labeller
    if nobody:
        problems.add("pseudo_label='teacher' wants a teacher from the start: give one, or pretrained=True")
    return None


def read_teacher(teacher: object, data: DataSplits, device: torch.device) -> Teacher:
    """Make a teacher of what the caller gave; nothing of his is changed.

    Args:
        teacher: A `TeacherLike`.
        data: What it is to teach about.
        device: Where it is put.

    Raises:
        InputError: It cannot be read, or is about other classes or images of another size.
        ResultError: The result is damaged.
    """
    problems = Problems("this teacher cannot be used")
    if isinstance(teacher, nn.Module):
        model, told = teacher, {"source": type(teacher).__name__}
    elif isinstance(teacher, tuple | list) and len(teacher) == 2:
        model, told = _weighted(teacher)
    elif isinstance(teacher, str | Path):
        model, told = _saved(teacher, data, problems)
    else:
        raise InputError(
            f"teacher={teacher!r}: give an nn.Module, the directory of a saved result, or a pair "
            "(model, safetensors file)"
        )
    problems.raise_if_any()
    copied = frozen_copy(model).float().to(device)
    _check_logits(copied, data, device)
    return Teacher(model=copied, told=told, identity=fingerprint(copied))


def _saved(place: str | Path, data: DataSplits, problems: Problems) -> tuple[nn.Module, dict[str, Any]]:
    path = Path(place)
    if not is_address(place) and not (path / RESULT).is_file():
        if path.suffix.lower() in PICKLES:
            raise InputError(f"teacher={str(place)!r} {_pickle(path)}")
        if path.is_file():
            raise InputError(f"teacher={str(place)!r} is a file: weights alone; give a pair (model, file)")
        raise InputError(f"teacher={str(place)!r} is no saved result (what `compress --out` leaves)")
    result = load(place)
    if result.classes != data.classes:
        problems.add(f"it tells {_few(result.classes)} apart, and {data.name} has {_few(data.classes)}")
    if result.image_shape != data.image_shape:
        theirs, ours = result.image_shape[1:], data.image_shape[1:]
        problems.add(
            f"it was trained on {theirs[0]}x{theirs[1]} images, and these are {ours[0]}x{ours[1]}: load the data with "
            f"image_size={theirs[0]}"
        )
    told = {"source": "result", "strategy": result.strategy["name"], "data": result.data["name"]}
    if result.spec is not None:
        told["model"] = result.spec.name
    return result.model, told


def _weighted(pair: Sequence[Any]) -> tuple[nn.Module, dict[str, Any]]:
    named, file = pair
    spec = ModelSpec(named) if isinstance(named, str) else named
    if not isinstance(spec, ModelSpec) or not isinstance(file, str | Path):
        raise InputError(f"teacher={pair!r}: the pair is a model (a name or a ModelSpec) and a safetensors file")
    if Path(file).suffix.lower() in PICKLES:
        raise InputError(f"teacher's weights {str(file)!r}: {_pickle(Path(file))}")
    with torch.random.fork_rng(devices=[]):
        model = spec.build()
    try:
        load_state(model, read_tensors(Path(file)))
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(
            f"teacher's weights {str(file)!r} cannot be used ({said}); it must be a safetensors file of {spec.name}"
        ) from error
    return model, {"source": "weights", "model": spec.name}


def _pickle(path: Path) -> str:
    return (
        f"looks like a pickle ({path.suffix}), which runs code when it is read: save the state dict with "
        "safetensors.torch.save_file, and give a pair (model, file)"
    )


def _check_logits(model: nn.Module, data: DataSplits, device: torch.device) -> None:
    """Ask it once: it must give a finite logit for each class of such an image."""
    images = torch.zeros(2, *data.image_shape, device=device)
    try:
        with eval_mode(model), torch.no_grad():
            logits = model(images)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        height, width = data.image_shape[1:]
        raise InputError(
            f"this teacher cannot be used: it fails on {height}x{width} images ({first_line(error)})"
        ) from error
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != [2, data.num_classes]:
        raise InputError(
            f"this teacher cannot be used: for 2 images it gives {shape}, and {data.name} has {data.num_classes} "
            f"classes: [2, {data.num_classes}] logits are needed"
        )
    if not bool(logits.isfinite().all()):
        raise InputError("this teacher cannot be used: its logits are not finite")


def _few(classes: Sequence[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
