"""What objectives are made of: the mode they attack in, noise, and checks of their options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from robustcompress.errors import Problems, nearest
from robustcompress.robust.attacks import eval_mode, kept_buffers

AttackMode = Literal["eval", "train"]


@contextmanager
def attacking(model: nn.Module, mode: AttackMode) -> Iterator[None]:
    """Put a model in the mode that attacks see; running statistics and flags are as before afterwards."""
    if mode == "eval":
        with eval_mode(model):
            yield
        return
    with kept_buffers(model):
        yield


def gaussian(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of the shape and device of images, [N, C, H, W]."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)


def _one_of(*allowed: str) -> Callable[[Any], str]:
    return lambda value: "" if value in allowed else f"is unknown{nearest(str(value), allowed)}"


def _count(value: Any) -> str:
    fine = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return "" if fine else "give a whole number, at least 1"


def _number(value: Any, within: Callable[[float], bool], what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "give a number"
    return "" if within(value) else f"must {what}"


def _positive(value: Any) -> str:
    return _number(value, lambda v: 0 < v < float("inf"), "be positive and finite")


def _share(value: Any) -> str:
    return _number(value, lambda v: 0 <= v < 1, "lie in [0, 1)")


def _class_weights(value: Any) -> str:
    if not isinstance(value, tuple):
        return _one_of("none", "balanced")(value)
    fine = len(value) > 0 and not any(_positive(weight) for weight in value)
    return "" if fine else "give a positive number for each class"


def _weight(value: Any) -> str:
    return _number(value, lambda v: 0 <= v < float("inf"), "be at least 0, and finite")


def _part(value: Any) -> str:
    return _number(value, lambda v: 0 < v <= 1, "lie in (0, 1]")


RULES: dict[str, Callable[[Any], str]] = {
    "attack_mode": _one_of(*get_args(AttackMode)),
    "steps": _count,
    "replays": _count,
    "step_size": lambda value: "" if value is None else _positive(value),
    "label_smoothing": _share,
    "class_weights": _class_weights,
    "inner": _one_of("ce", "kl-clean", "kl-attacked"),
    "target": _one_of("clean", "attacked"),
    "adversarial": _weight,
    "natural": _weight,
    "labels": _weight,
    "teacher_temperature": lambda value: "" if value is None else _positive(value),
    "trust": lambda value: "" if value is None else _positive(value),
    "kappa": _share,
    "warm_up": _share,
    "ramp": _share,
    "steady": _weight,
    "share": _part,
    "reach": _part,
    "projections": _count,
    "hierarchy": lambda value: "",  # read, and complained about, by `hierarchy_from`
}
"""By an option's name, what is wrong with a value (empty for nothing); options not named here are positive numbers."""


def check_options(objective: Any, what: str = "objective") -> None:
    """Raise one InputError about all options that make no sense.

    Args:
        objective: A dataclass of options with a name.
        what: What it is, for the message.
    """
    problems = Problems(f"{what} {objective.name!r} cannot be used")
    for field in fields(objective):
        value = getattr(objective, field.name)
        if wrong := RULES.get(field.name, _positive)(value):
            problems.add(f"{field.name}={value!r}{' ' if wrong.startswith('is ') else ': '}{wrong}")
    problems.raise_if_any()
