"""Several compressions in one directory: what is finished stays, what was interrupted goes on."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from robustcompress.checkpoint import AUTOATTACK, fingerprint, remove
from robustcompress.errors import InputError, Interrupted, OutOfTime, ResultError
from robustcompress.interrupt import stop_if_asked
from robustcompress.resolve import Request
from robustcompress.result import RESULT, CompressResult, load
from robustcompress.structure import StructuralEditor
from robustcompress.train import HOW
from robustcompress.untrusted import read_json as read_plain_json

__all__ = [
    "AUTOATTACK",
    "CHECKPOINT",
    "REQUEST",
    "CarryOut",
    "compress_in",
    "digest_of",
    "identity_of",
    "read_json",
    "reference_editor",
    "stop_in_time",
]

CHECKPOINT = ".checkpoint"
"""Suffix of the directory in which one of the compressions is recorded while it lasts."""

REQUEST = "request"
"""Key of a result's settings: what it was asked for, as a hash (see `digest_of`)."""


class CarryOut(Protocol):
    """What carries a request out: `api.carry_out`."""

    def __call__(self, request: Request, *, progress: bool, started: float) -> CompressResult:
        """Compress."""
        ...


def compress_in(
    directory: Path, name: str, request: Request, carry_out: CarryOut, *, progress: bool, started: float
) -> CompressResult:
    """Compress into `directory/name`, or read what an earlier call left there; the report is for later.

    Args:
        directory: Exists.
        name: Of this compression.
        request: What to do; its model is left as it is.
        carry_out: Does it.
        progress: Show progress.
        started: When the call came, on the clock of `time.monotonic`.

    Returns:
        The result as it was read back, so that an interrupted series ends as one that was not.

    Raises:
        InputError: Something else is in the place.
        OutOfTime: The deadline was reached; the same call goes on.
    """
    place, checkpoint = directory / name, directory / f"{name}{CHECKPOINT}"
    if place.exists() and not (place / RESULT).is_file():
        raise InputError(f"{place} holds no result: move it away, or choose another directory")
    if not place.exists():
        asked = replace(request, model=copy.deepcopy(request.model), attacks=(), out=place, checkpoint=checkpoint)
        try:
            carry_out(asked, progress=progress, started=started)
        except OutOfTime as error:  # it names a checkpoint that is ours alone
            said = f"{name}: {str(error).partition('; the same call')[0]}; the same call goes on from there"
            raise (Interrupted(said, error.signal) if isinstance(error, Interrupted) else OutOfTime(said)) from error
    remove(checkpoint)  # a kill between saving and removing left it
    return load(place, model=request.model)


def stop_in_time(request: Request, started: float) -> None:
    """Raise OutOfTime before more is begun once the deadline has passed, or a signal has asked to stop."""
    stop_if_asked("stopped between two compressions; the same call goes on from there")
    if request.deadline is not None and time.monotonic() > started + request.deadline:
        raise OutOfTime("the deadline was reached between two compressions; the same call goes on from there")


def reference_editor(request: Request) -> tuple[StructuralEditor, torch.Tensor]:
    """An editor of a copy of the reference, with a classifier for the data's classes; and an image batch for it."""
    example = torch.zeros(2, *request.data.image_shape, device=request.device)
    editor = StructuralEditor(copy.deepcopy(request.model), example, seed=request.seed)
    outputs = editor.widths.get(editor.layout.output)
    if outputs not in (None, request.data.num_classes) and not request.pretrained:
        editor.resize_output(request.data.num_classes)
    return editor, example


def identity_of(request: Request) -> dict[str, Any]:
    """What every compression of a series depends on: strategy and budget are each one's own."""
    recipe = {key: value for key, value in request.recipe.to_json().items() if key not in HOW}
    identity = {
        **fingerprint(request.model),
        "data": request.data.sha256,
        "threat": request.threat.to_json(),
        "objective": request.objective.to_json(),
        "recipe": recipe,
        "epochs": request.epochs,
        "pretrained": request.pretrained,
        "round_to": request.round_to,
        "seed": request.seed,
    }
    parsed: dict[str, Any] = json.loads(json.dumps(identity | request.companions))
    return parsed


def digest_of(request: Request) -> str:
    """Hash of all that a saved result depends on: another call of the same is recognised by it."""
    asked = identity_of(request) | {
        "strategy": request.strategy.identity(),
        "budget": request.budget.to_json(),
        "attacks": [spec.name for spec in request.attacks],
        "test_images": request.test_images,
    }
    if request.latency_table is not None:
        asked["latency_table"] = request.latency_table.sha256
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """What `durable.write_json` wrote; None where there is nothing.

    Raises:
        ResultError: It is no JSON object.
    """
    if not path.is_file():
        return None
    try:
        value = read_plain_json(path)
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read: {error}; remove it to begin anew") from error
    if not isinstance(value, dict):
        raise ResultError(f"{path} is no record of ours; remove it to begin anew")
    return value
