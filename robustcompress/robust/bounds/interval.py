"""A tensor that stands for all tensors between two bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from robustcompress.errors import UnsupportedModelError


class NoRuleError(UnsupportedModelError):
    """There is no rule for how a function moves bounds."""


@dataclass(frozen=True, slots=True)
class Affine:
    """That vectors are exactly `weight @ inputs + bias`: what bounds differences of their entries more tightly.

    Attributes:
        centre: Of the inputs' bounds as they were then, [N, D].
        radius: Of the same.
        weight: [K, D].
        bias: [K].
    """

    centre: Tensor
    radius: Tensor
    weight: Tensor
    bias: Tensor | None


class Trail:
    """Lower and upper bounds of what activations are given, in their order, until it is closed.

    What is computed again on the way back (activation checkpointing) is not to be noted twice.
    """

    def __init__(self) -> None:
        self.bounds: list[tuple[Tensor, Tensor]] = []
        self.closed = False

    def note(self, lower: Tensor, upper: Tensor) -> None:
        """Take the bounds of one activation's input."""
        if not self.closed:
            self.bounds.append((lower, upper))


class Interval(Tensor):
    """All tensors between `lower` and `upper`, entry by entry, and what the images themselves lead to.

    It has the shape, type and device of its bounds and no values of its own: whatever torch function meets it goes
    through `__torch_function__`, to a rule of `rules.py` or to an error.

    Attributes:
        value: What the network computes of the images themselves; batch statistics are taken from it.
        lower: Lower bounds, of the shape of `value`.
        upper: Upper bounds.
        point: As `value`, with a graph from `root` in which each ReLU is replaced by linear bounds (CROWN); None where
            none is wanted.
        slack: Zeros [N], a leaf: its gradient is what those linear bounds lie below `point`.
        affine: Where it comes straight from a linear layer.
        shared: Whether other tensors may look at the same memory, as views do.
        trail: Takes what activations are given; None where nobody asks.
    """

    value: Tensor
    lower: Tensor
    upper: Tensor
    point: Tensor | None
    slack: Tensor | None
    affine: Affine | None
    shared: bool
    trail: Trail | None

    @staticmethod
    def __new__(
        cls,
        value: Tensor,
        lower: Tensor,
        upper: Tensor,
        *,
        point: Tensor | None = None,
        slack: Tensor | None = None,
        affine: Affine | None = None,
        shared: bool = False,
        trail: Trail | None = None,
    ) -> Self:
        """Make one; see the attributes."""
        assert value.shape == lower.shape == upper.shape
        made: Self = torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype, device=value.device)
        made.set(value, lower, upper, point)
        made.slack, made.affine, made.shared, made.trail = slack, affine, shared, trail
        return made

    def set(self, value: Tensor, lower: Tensor, upper: Tensor, point: Tensor | None) -> None:
        """Take other bounds, in place."""
        self.value, self.lower, self.upper, self.point = value, lower, upper, point

    @property
    def centre(self) -> Tensor:
        """The middle between the bounds."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half of what lies between the bounds; never negative."""
        return (self.upper - self.lower) / 2

    def map(self, apply: Callable[[Tensor], Tensor], *, shared: bool = False) -> Interval:
        """What a function that never decreases makes of it; for `point` it must be linear."""
        point = None if self.point is None else apply(self.point)
        return self.with_bounds(apply(self.value), apply(self.lower), apply(self.upper), point, shared=shared)

    def with_bounds(
        self, value: Tensor, lower: Tensor, upper: Tensor, point: Tensor | None, *, shared: bool = False
    ) -> Interval:
        """Other bounds for the same images."""
        if (
            point is not None and not point.requires_grad
        ):  # its graph was cut, and what lies before would count as fixed
            raise NoRuleError("crown-ibp needs gradients all the way to the images: no detach, no no_grad")
        return Interval(value, lower, upper, point=point, slack=self.slack, shared=shared, trail=self.trail)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer by a rule, or raise NoRuleError."""
        from robustcompress.robust.bounds.rules import RULES

        rule = RULES.get(func)
        if rule is None:
            raise NoRuleError(f"there is no rule for {name_of(func)}")
        return rule(func, *args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Never reached by a rule: what gets here went round them, and is an error too."""
        raise NoRuleError(f"there is no rule for {func}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Interval({list(self.value.shape)})"


def name_of(func: Callable[..., Any]) -> str:
    """A function's name as a person knows it."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    return f"{owner}.{name}" if name == "__get__" and owner else name


def box(x: Tensor, eps: float, bounds: tuple[float, float] = (0.0, 1.0)) -> Interval:
    """All images within linf `eps` of `x` that keep within the range of pixels.

    Args:
        x: Images, [N, C, H, W].
        eps: Radius; 0 for the images alone.
        bounds: Lowest and highest value of a pixel.
    """
    x = x.detach()
    lower, upper = (x - eps).clamp(*bounds), (x + eps).clamp(*bounds)
    return Interval(x, torch.minimum(lower, x), torch.maximum(upper, x))
