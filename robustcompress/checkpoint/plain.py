"""Decisions as plain JSON, tensors among them."""

from __future__ import annotations

import json
from typing import Any

import torch

from robustcompress.errors import InputError

_TENSOR = "__tensor__"


def to_plain(name: str, value: Any) -> Any:
    """Turn mappings (of string keys), sequences, numbers, strings and tensors into plain JSON.

    Raises:
        InputError: The decision `name` holds anything else.
    """

    def encode(thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            dtype = str(thing.dtype).removeprefix("torch.")
            return {_TENSOR: thing.detach().cpu().tolist(), "dtype": dtype}
        raise TypeError(f"a {type(thing).__name__}")

    try:
        return json.loads(json.dumps(value, default=encode))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the decision {name!r} holds what JSON cannot ({error}): give numbers, text, lists"
        ) from error


def from_plain(value: Any) -> Any:
    """Undo `to_plain`; tuples come back as lists, tensors on the CPU."""
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return torch.tensor(value[_TENSOR], dtype=getattr(torch, value["dtype"]))
    return {key: from_plain(item) for key, item in value.items()}
