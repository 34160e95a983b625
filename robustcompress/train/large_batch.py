"""Optimizers for large batches: each tensor's step is as large as the tensor says, not as its gradient happens to be.

Own ones, since torch has none and timm's (an optional dependency here) count LAMB's steps outside the state that
checkpoints and structural edits carry along; tests compare them with timm's. Their states have the shapes of the
parameters, so that edits migrate them as they do SGD's and Adam's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

TRUST = 0.001
"""LARS's trust coefficient, as in the paper's experiments."""

LARGEST_NORM = 10.0
"""LAMB counts weights of a larger norm as of this one (the paper's phi; the value is that of the DAT authors' code)."""


class _PerTensor(Optimizer):
    """The frame of both: which tensors move, and that a group may say `adapt=False` for those that move plainly."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move all parameters that have a gradient; return what `closure` returns, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _move(self, p: nn.Parameter, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lars(_PerTensor):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017, arXiv:1708.03888, algorithm 1).

    `v <- momentum v + trust |w| / (|g| + decay |w|) (g + decay w)` and `w <- w - lr v`. As in torch's SGD the learning
    rate multiplies the momentum rather than what enters it, which differs from the paper while the rate changes. Where
    a norm is zero, and in groups with `adapt=False`, the quotient is 1.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate. What is not scaled moves by it as under SGD: to move matrices by more, raise `trust`.
        momentum: Share of the step before that goes on.
        weight_decay: Added to the gradient.
        trust: The coefficient called eta in the paper.
        adapt: Scale each tensor's step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = TRUST,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": adapt}
        super().__init__(params, defaults)

    def _move(self, p: nn.Parameter, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        decay, step = group["weight_decay"], g.add(p, alpha=group["weight_decay"])
        if group["adapt"]:
            weight, gradient = torch.linalg.vector_norm(p), torch.linalg.vector_norm(g)
            step.mul_(_quotient(group["trust"] * weight, gradient + decay * weight, weight, gradient))
        if group["momentum"]:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            step = state["momentum_buffer"].mul_(group["momentum"]).add_(step)
        p.add_(step, alpha=-group["lr"])


class Lamb(_PerTensor):
    """Adam whose step is as long as the weights, tensor by tensor (You et al., ICLR 2020, algorithm 2).

    `u = m / (sqrt(v) + eps) + decay w`, both moments with their bias corrected, and
    `w <- w - lr min(|w|, 10) / |u| u`. Where a norm is zero, and in groups with `adapt=False`, the quotient is 1.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decay of the means of gradients and of their squares.
        eps: Keeps the quotient of the moments finite.
        weight_decay: Added to the step.
        adapt: Scale each tensor's step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})

    def _move(self, p: nn.Parameter, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        first, second = group["betas"]
        mean, square = state["exp_avg"].lerp_(g, 1 - first), state["exp_avg_sq"].mul_(second)
        square.addcmul_(g, g, value=1 - second)
        root = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        step = (mean / (1 - first ** state["step"])).div_(root).add_(p, alpha=group["weight_decay"])
        if group["adapt"]:
            weight, length = torch.linalg.vector_norm(p), torch.linalg.vector_norm(step)
            step.mul_(_quotient(weight.clamp(max=LARGEST_NORM), length, weight, length))
        p.add_(step, alpha=-group["lr"])


def _quotient(above: Tensor, below: Tensor, *norms: Tensor) -> Tensor:
    """`above / below`, or 1 where one of the norms is zero; on the device, which nobody waits for."""
    present = torch.stack([norm > 0 for norm in norms]).all()
    return torch.where(present, above / torch.where(present, below, 1.0), 1.0)
