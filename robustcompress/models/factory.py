"""What all built-in factories share: checked arguments, widths, initial weights, a note of origin."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec

from torch import nn

from robustcompress.errors import Problems

P = ParamSpec("P")

MIN_CHANNELS = 4


def scaled(channels: int, width: float) -> int:
    """Return `channels` times the width multiplier, rounded, and at least 4."""
    return max(MIN_CHANNELS, round(channels * width))


def initialise(model: nn.Module) -> None:
    """Kaiming-normal convolutions (He et al. 2015: fan out, ReLU gain), and a linear layer of unit gain."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)


def factory(function: Callable[P, nn.Module]) -> Callable[P, nn.Module]:
    """Make `function` a built-in factory: bad arguments are refused, and the model remembers its arguments.

    The model gets `built_by = (factory name, all arguments)`, plain data from which `identify` makes a
    `ModelSpec`. It is only a hint: `identify` rebuilds the model from it and compares, since the model may
    have been edited since.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def build(*args: P.args, **kwargs: P.kwargs) -> nn.Module:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        # JSON turns tuples into lists, and one spelling is enough to compare.
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in bound.arguments.items()}
        _check(function.__name__, arguments)
        model = function(**arguments)  # type: ignore[call-arg, arg-type]
        initialise(model)
        model.built_by = (function.__name__, arguments)  # type: ignore[assignment]
        return model

    return build


def _check(name: str, arguments: dict[str, Any]) -> None:
    problems = Problems(f"cannot build {name}")
    num_classes, width, stem_stride = (arguments[k] for k in ("num_classes", "width", "stem_stride"))
    if not _is_int(num_classes) or num_classes < 2:
        problems.add(f"num_classes={num_classes!r}: must be an integer of at least 2")
    if not _is_number(width) or width <= 0:
        problems.add(f"width={width!r}: a positive multiplier of every layer's channels, such as 0.5")
    if not _is_int(stem_stride) or stem_stride < 1:
        problems.add(f"stem_stride={stem_stride!r}: must be 1 (32x32 images), 2 or more (larger ones)")
    for key in ("depth", "dim", "heads", "patch", "image_size"):
        if key in arguments and (not _is_int(arguments[key]) or arguments[key] < 1):
            problems.add(f"{key}={arguments[key]!r}: must be an integer of at least 1")
    if "mlp_ratio" in arguments and (not _is_number(arguments["mlp_ratio"]) or arguments["mlp_ratio"] <= 0):
        problems.add(f"mlp_ratio={arguments['mlp_ratio']!r}: a positive multiple of the embedding, such as 4")
    for key in ("mean", "std"):
        value = arguments[key]
        if not isinstance(value, tuple) or len(value) != 3 or not all(_is_number(v) for v in value):
            problems.add(f"{key}={value!r}: must be three numbers, one per colour channel, for images in [0, 1]")
        elif key == "std" and min(value) <= 0:
            problems.add(f"std={value!r}: must be positive")
    problems.raise_if_any()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
