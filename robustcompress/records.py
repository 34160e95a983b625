"""Parts of a saved record, which anybody may have written, checked before they are believed."""

from __future__ import annotations

import math
from typing import Any

from robustcompress.budget import Cost

MAX_PIXELS = 1 << 22
"""An image read from a file may not be larger: a damaged record must not exhaust the memory."""


def checked_cost(record: Any) -> Cost:
    """What a network costs: counts and times that can be.

    Raises:
        ValueError: They cannot. Other errors where the record is of another shape.
    """
    cost = Cost(**record)
    counts = [cost.macs, cost.params, cost.size]
    counts += [n for n in (cost.weights, cost.nonzeros, cost.compressed) if n is not None]
    times = [ms for ms in (cost.latency_ms, cost.onnx_ms) if ms is not None]
    timed = all(type(ms) in (int, float) and ms >= 0 for ms in times)
    if not all(type(n) is int and n > 0 for n in counts) or not timed or not isinstance(cost.note, str):
        raise ValueError(f"not a cost: {str(record)[:200]}")
    return cost


def checked_strategy(record: Any) -> dict[str, Any]:
    """A strategy with its name.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise ValueError(f"not a strategy: {str(record)[:200]}")
    return dict(record)


def checked_data(record: Any) -> dict[str, Any]:
    """Data with names, classes and the shape of an image.

    Raises:
        ValueError: They are no text, or no shape of an image. Other errors where the record is of another shape.
    """
    texts = [record["name"], record["sha256"], *record["classes"]]
    shape = record["image_shape"]
    if not all(isinstance(text, str) for text in texts) or not isinstance(record["classes"], list):
        raise ValueError("data names and classes must be text")
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"image_shape {shape!r} is not [channels, height, width]")
    if math.prod(shape) > MAX_PIXELS:
        raise ValueError(f"image_shape {shape} is larger than any image this package trains on")
    return dict(record)
