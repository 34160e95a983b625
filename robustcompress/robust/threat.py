"""What the adversary may do: a norm, a radius and the range that pixels live in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robustcompress.errors import Problems, nearest

Norm = Literal["linf", "l2"]

_TINY = 1e-12  # keeps a zero gradient, or a zero perturbation, from dividing by zero


@dataclass(frozen=True, slots=True)
class ThreatModel:
    """All perturbations of at most `eps` in `norm` that keep each pixel within `bounds`.

    Attributes:
        norm: "linf" (largest change of one value) or "l2" (Euclidean, over one whole image).
        eps: Radius, in the unit of the pixels: 8/255 and not 8 for images in [0, 1].
        bounds: Lowest and highest value that a pixel can have.

    Raises:
        InputError: The norm is unknown, `eps` is not a positive finite number or exceeds the range of the
            pixels (then it was probably given in 0-255 units), or the bounds are not in order.

    Example:
        >>> ThreatModel("linf", 8 / 255).label()
        'linf 8/255'
    """

    norm: Norm = "linf"
    eps: float = 8 / 255
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        problems = Problems("this threat model cannot be used")
        if self.norm not in get_args(Norm):
            problems.add(f"norm={self.norm!r} is unknown{nearest(str(self.norm), get_args(Norm))}")
        span = _span(self.bounds)
        if span is None:
            problems.add(f"bounds={self.bounds!r}: give two finite numbers, lowest first, such as (0.0, 1.0)")
        if isinstance(self.eps, bool) or not isinstance(self.eps, int | float) or not math.isfinite(self.eps):
            problems.add(f"eps={self.eps!r}: give a finite number such as 8/255")
        elif self.eps <= 0:
            problems.add(f"eps={self.eps!r}: must be positive, such as 8/255")
        elif self.norm == "linf" and span is not None and self.eps > span:
            problems.add(
                f"eps={self.eps:g} is wider than the range of the pixels ({span:g}): "
                f"you probably meant {self.eps:g}/255"
            )
        problems.raise_if_any()
        object.__setattr__(self, "eps", float(self.eps))
        object.__setattr__(self, "bounds", (float(self.bounds[0]), float(self.bounds[1])))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Bring `x_adv` back into the ball around `x` and into the bounds.

        For l2 the ball comes first and the bounds after it: clipping moves a point towards `x`, which lies
        within the bounds, so that the result is in both sets. All common PGD code does so; the nearest
        point of the intersection it is not.

        Args:
            x_adv: Perturbed images, [N, ...].
            x: The originals, same shape, within the bounds.

        Returns:
            New tensor, shape and memory format of `x_adv`.
        """
        low, high = self.bounds
        if self.norm == "linf":
            return torch.clamp(x_adv, x - self.eps, x + self.eps).clamp_(low, high)
        delta = x_adv - x
        return delta.mul_((self.eps / norms(delta, "l2").clamp_min(_TINY)).clamp_max(1.0)).add_(x).clamp_(low, high)

    def random_start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one point uniformly from the ball around each image, then clip it to the bounds.

        The numbers are drawn on the generator's device, in the order of the indices, whatever the memory
        format of `x`: one seed means the same start wherever the draws are made on the same device.

        Args:
            x: Images, [N, ...], within the bounds.
            generator: Source of the randomness; torch's global one where None.

        Returns:
            New tensor, shape and memory format of `x`.
        """
        device = x.device if generator is None else generator.device
        noise = torch.empty(x.shape, dtype=x.dtype, device=device)
        if self.norm == "linf":
            noise.uniform_(-self.eps, self.eps, generator=generator)
        else:
            noise.normal_(generator=generator)
            size = max(x[:1].numel(), 1)
            radius = torch.empty(len(x), dtype=x.dtype, device=device).uniform_(generator=generator)
            radius = radius.pow_(1.0 / size).mul_(self.eps).view(-1, *[1] * (x.dim() - 1))
            noise.mul_(radius / norms(noise, "l2").clamp_min(_TINY))
        return self.project(x + noise.to(x.device), x)

    def ascend(self, x_adv: Tensor, grad: Tensor, step_size: float) -> Tensor:
        """Take one steepest-ascent step of length `step_size` in this norm; the caller projects afterwards.

        Args:
            x_adv: Present point, [N, ...].
            grad: Gradient of the loss there, same shape. Where it is zero the point stays.
            step_size: Length in this norm, in the unit of the pixels.

        Returns:
            New tensor, shape and memory format of `x_adv`.
        """
        if self.norm == "linf":
            return torch.add(x_adv, grad.sign(), alpha=step_size)
        return torch.add(x_adv, grad / norms(grad, "l2").clamp_min(_TINY), alpha=step_size)

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return how far each `x_adv` lies from its `x` in this norm, in pixel units: float64 [N]."""
        return norms(x_adv.double() - x.double(), self.norm).flatten()

    @property
    def limit(self) -> float:
        """The largest `size` that rounding may give a point of the ball: eps and what float32 cannot tell."""
        resolution = torch.finfo(torch.float32).eps * max(abs(self.bounds[0]), abs(self.bounds[1]))
        return self.eps * (1 + 1e-5) + resolution

    def label(self) -> str:
        """Name the threat as papers do: "linf 8/255", "l2 0.5"."""
        steps = self.eps * 255
        if abs(self.eps * 100 - round(self.eps * 100)) < 1e-9:  # 0.5 or 0.3, the habit of l2 and of MNIST
            return f"{self.norm} {self.eps:g}"
        if round(steps) >= 1 and abs(steps - round(steps)) < 1e-6:
            return f"{self.norm} {round(steps)}/255"
        return f"{self.norm} {self.eps:.4g}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data from which `from_json` makes an equal threat."""
        return {"norm": self.norm, "eps": self.eps, "bounds": list(self.bounds)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ThreatModel:
        """Read what `to_json` wrote.

        Raises:
            InputError: A key is missing, unknown, or holds a value that no threat can have.
        """
        problems = Problems("this is not a threat model")
        keys = ("norm", "eps", "bounds")
        for key in data:
            if key not in keys:
                problems.add(f"key {key!r} is unknown{nearest(str(key), keys)}")
        for key in keys:
            if key not in data:
                problems.add(f"key {key!r} is missing")
        problems.raise_if_any()
        bounds = data["bounds"]
        return cls(data["norm"], data["eps"], tuple(bounds) if isinstance(bounds, list | tuple) else bounds)


def norms(delta: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each sample of `delta` [N, ...], shaped [N, 1, ...] so that it broadcasts."""
    order = math.inf if norm == "linf" else 2
    dims = tuple(range(1, delta.dim()))
    sizes: Tensor = torch.linalg.vector_norm(delta, ord=order, dim=dims, keepdim=True)
    return sizes


def _span(bounds: object) -> float | None:
    if not isinstance(bounds, tuple) or len(bounds) != 2:
        return None
    low, high = bounds
    if any(isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end) for end in bounds):
        return None
    return float(high - low) if low < high else None
