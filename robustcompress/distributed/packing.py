"""Plain JSON with tensors in it as bytes, and back: what processes send each other (nothing is pickled)."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

_TENSOR = "__sent_tensor__"


def flatten(value: Any) -> tuple[bytes, list[Tensor]]:
    """Take the tensors out of a value of mappings (with text as keys), sequences, numbers, text and tensors.

    Returns:
        JSON that names shapes and types, and the tensors as flat bytes on the CPU, in the order of their numbers.

    Raises:
        TypeError: There is anything else in it.
    """
    found: list[Tensor] = []

    def encode(thing: Any) -> Any:
        if not isinstance(thing, Tensor):
            raise TypeError(f"a {type(thing).__name__} cannot be sent to other processes")
        here = thing.detach().cpu()
        described: dict[str, Any] = {_TENSOR: len(found), "shape": list(here.shape)}
        described["dtype"] = str(here.dtype).removeprefix("torch.")
        if here.dim() == 4 and not here.is_contiguous() and here.is_contiguous(memory_format=torch.channels_last):
            described["channels_last"] = True
        found.append(here.contiguous().reshape(-1).view(torch.uint8))
        return described

    return json.dumps(value, default=encode).encode(), found


def sizes(text: bytes) -> list[int]:
    """How many bytes each of the tensors has that `flatten` took out, in their order."""
    found: dict[int, int] = {}

    def look(item: dict[str, Any]) -> dict[str, Any]:
        if _TENSOR in item:
            found[item[_TENSOR]] = torch.Size(item["shape"]).numel() * getattr(torch, item["dtype"]).itemsize
        return item

    json.loads(text, object_hook=look)
    return [found[number] for number in sorted(found)]


def restore(text: bytes, tensors: list[Tensor]) -> Any:
    """Undo `flatten`; tuples come back as lists, tensors on the CPU."""

    def decode(item: dict[str, Any]) -> Any:
        if _TENSOR not in item:
            return item
        values = tensors[item[_TENSOR]].view(getattr(torch, item["dtype"])).view(item["shape"])
        return values.contiguous(memory_format=torch.channels_last) if "channels_last" in item else values

    return json.loads(text, object_hook=decode)


def pack(value: Any) -> Tensor:
    """One value as one row of bytes, uint8 `[n]`."""
    text, tensors = flatten(value)
    head = torch.frombuffer(bytearray(len(text).to_bytes(8, "big") + text), dtype=torch.uint8)
    return torch.cat([head, *tensors])


def unpack(row: Tensor) -> Any:
    """Undo `pack`; bytes behind the value are not looked at."""
    length = int.from_bytes(bytes(row[:8].tolist()), "big")
    text = row[8 : 8 + length].numpy().tobytes()
    at, tensors = 8 + length, []
    for size in sizes(text):
        tensors.append(row[at : at + size].clone())  # aligned for its type, which a slice need not be
        at += size
    return restore(text, tensors)
