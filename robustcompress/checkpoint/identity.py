"""What tells one reference network from another, and one run from another."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from robustcompress.errors import InputError, Problems


def fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 of a network's structure (layers, settings, names, shapes) and of its weights and buffers."""
    structure, weights = hashlib.sha256(), hashlib.sha256()
    printed = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # an address is no setting
    structure.update(printed.encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        structure.update(f"{name} {list(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        weights.update(values.view(torch.uint8).numpy().data if values.numel() else b"")
    return {"model structure": structure.hexdigest(), "initial weights": weights.hexdigest()}


def same_run(where: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise an InputError that names every difference between the run that was recorded and the one asked for.

    Args:
        where: The argument that names the directory, for example "checkpoint=runs/a".
        then: What made it the same run, as plain JSON by name.
        now: The same of this one.
    """
    directory = where.partition("=")[2]
    problems = Problems(
        f"{where} is of another run; give the same arguments, or another directory, or remove {directory} to begin anew"
    )
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            old, new = _differing(then.get(name), now.get(name))
            problems.add(f"{name}: {_short(old)} there, {_short(new)} here")
    problems.raise_if_any(InputError)


def _differing(then: Any, now: Any) -> tuple[Any, Any]:
    """Of two mappings only what differs: the rest would hide it."""
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return then, now
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return {key: then.get(key) for key in keys}, {key: now.get(key) for key in keys}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:150]}..."
