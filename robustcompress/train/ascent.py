"""One step up in parameter space, the descent from there, and exactly back: what AWP, SAM and S2AP share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustcompress.distributed import ALONE
from robustcompress.errors import InputError
from robustcompress.robust.attacks import kept_buffers
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.threat import ThreatModel
from robustcompress.train.recipe import Recipe

_TINY = 1e-20

LARGEST_RHO = 10.0
"""Of `SharpnessAscent`: papers go up to 2."""


class Ascent:
    """Climbs the loss by one normalised step in some parameters: `max L(p + v)` with `||v|| <= gamma ||p||` for each.

    Adversarial weight perturbation (Wu et al., NeurIPS 2020, with its one ascent step), here over any tensors.
    Each tensor is a ball of its own. The gradient is that of the caller's loss at the parameters themselves, in the
    mode of the model; running statistics, `.grad` and random generators of attacks are not touched by it. Ours: no
    proxy network (so a structural edit needs nothing), and the parameters come back from a copy, bit for bit, before
    the optimizer steps (the paper's code steps first and then subtracts, so its weight decay sees the moved weights).

    Args:
        parameters: Leaf tensors to move.
        gamma: Radius relative to each tensor's norm, in (0, 1].
        begins: Share of the phase's steps that pass before the first ascent, clipped to [0, 1].

    Attributes:
        label: The key under which `read` gives the radius.
        world: The processes that share the batch, which the training loop says; each climbs on its own parts.

    Raises:
        InputError: The radius is out of range.
    """

    label: ClassVar[str] = "awp"
    _summed: ClassVar[tuple[str, ...]] = ("_before", "_after", "_count")

    def __init__(self, parameters: Sequence[nn.Parameter], gamma: float, *, begins: float = 0.0) -> None:
        check_gamma(gamma)
        self.parameters = list(parameters)
        self.gamma = gamma
        self.begins = min(1.0, max(0.0, begins))
        self._before: Tensor | float = 0.0
        self._after: Tensor | float = 0.0
        self._count = 0
        self.world = ALONE

    @contextmanager
    def raised(self, model: nn.Module, loss: Callable[[], Tensor]) -> Iterator[None]:
        """Move the parameters up; on exit give them the bits they had, also after an error.

        Args:
            model: Its buffers keep their values through the pass of `loss` here.
            loss: Computes the scalar loss at the parameters as they are when it is called; called once.
        """
        with kept_buffers(model), torch.enable_grad():
            value = loss()
            gradients = torch.autograd.grad(value, self.parameters, materialize_grads=True)
        kept = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                steps = self.directions(kept, gradients)
                radius = self.radius(steps)
                for parameter, step in zip(self.parameters, steps, strict=True):
                    parameter.add_(step, alpha=radius)
            torch.clear_autocast_cache()  # an autocast around all this would go on with weights cast before the move
            yield
        finally:
            with torch.no_grad():
                for parameter, bits in zip(self.parameters, kept, strict=True):
                    parameter.copy_(bits)
            torch.clear_autocast_cache()
        self._before = self._before + value.detach()
        self._count = self._count + 1  # not in place: the sum over processes may be a tensor that others hold

    def directions(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Where each parameter goes, at radius one: up its own gradient, as far as it is long."""
        return [g * (p.norm() / (g.norm() + _TINY)) for p, g in zip(parameters, gradients, strict=True)]

    def radius(self, steps: Sequence[Tensor]) -> float:
        """How far to go along `steps`, as `directions` gave them."""
        return self.gamma

    def note(self, loss: Tensor) -> None:
        """Add the loss found above, for `read`."""
        self._after = self._after + loss.detach()

    def sums(self) -> list[Tensor | float]:
        """What `read` makes its means of; processes add up theirs behind every step."""
        return [getattr(self, name) for name in self._summed]

    def take_sums(self, values: Sequence[Tensor | float]) -> None:
        """Take others in the place of `sums`."""
        for name, value in zip(self._summed, values, strict=True):
            setattr(self, name, value)

    def state_dict(self) -> dict[str, Any]:
        """What `read` will tell, so far."""
        return {"before": self._before, "after": self._after, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._before, self._after, self._count = state["before"], state["after"], int(state["count"])

    def read(self) -> dict[str, Any]:
        """What was done since the last call: the radius, and the mean loss before and after the ascent.

        Returns:
            Empty where no ascent was made.
        """
        count, before, after = int(self._count), float(self._before), float(self._after)
        self._count, self._before, self._after = 0, 0.0, 0.0
        return {self.label: self.gamma, "loss_before": before / count, "loss_after": after / count} if count else {}


class SharpnessAscent(Ascent):
    """Sharpness-aware minimisation (Foret et al., ICLR 2021, eq. 2): one ball around all parameters together.

    All parameters move by `rho g / ||g||`, the norm being that of the whole gradient. Adaptive (ASAM, Kwon et al., ICML
    2021, eq. 5, elementwise): by `rho T^2 g / ||T g||` with T the absolute values of the parameters, so that scaling
    layers against each other changes nothing. Beside `Ascent`: no ball is relative to its tensor, and batch norms and
    biases move too. Ours: running statistics are those of the descent, above.

    Args:
        parameters: Leaf tensors to move.
        rho: Euclidean radius, in (0, 10].
        adaptive: Whether it is ASAM.
    """

    label: ClassVar[str] = "sam"

    def __init__(self, parameters: Sequence[nn.Parameter], rho: float, *, adaptive: bool = False) -> None:
        super().__init__(parameters, 1.0)
        check_gamma(rho, "rho", most=LARGEST_RHO, usual="sharpness-aware minimisation uses 0.05, its adaptive form 0.5")
        self.gamma = rho
        self._adaptive = adaptive

    def directions(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Where each parameter goes, at radius one: up the gradient of all of them, to the edge of the one ball."""
        scaled = list(gradients)
        if self._adaptive:
            scaled = [p.abs() * g for p, g in zip(parameters, gradients, strict=True)]
        norm = torch.stack([s.norm() for s in scaled]).norm() + _TINY
        if self._adaptive:
            scaled = [p.abs() * s for p, s in zip(parameters, scaled, strict=True)]
        return [s / norm for s in scaled]


def check_gamma(
    gamma: object,
    name: str = "gamma",
    *,
    most: float = 1.0,
    usual: str = "adversarial weight perturbation uses 0.005",
) -> None:
    """Raise InputError unless `gamma` is a radius: a number in (0, most]."""
    number = isinstance(gamma, int | float) and not isinstance(gamma, bool) and math.isfinite(gamma)
    if not number or not 0 < gamma <= most:  # type: ignore[operator]
        raise InputError(f"{name}={gamma!r}: must be a number in (0, {most:g}]; {usual}")


def weight_ascent(optimizer: torch.optim.Optimizer, gamma: float, *, begins: float = 0.0) -> Ascent | None:
    """Adversarial weight perturbation of every weight of more than one dimension that the optimizer trains.

    Args:
        optimizer: Holds the weights.
        gamma: Radius, as in `Ascent`; 0 switches it off.
        begins: As in `Ascent`.

    Returns:
        None where there is nothing to do.

    Raises:
        InputError: The radius is out of range.
    """
    if gamma == 0 and not isinstance(gamma, bool):
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    made = Ascent([p for p in parameters if p.dim() > 1 and p.requires_grad], gamma, begins=begins)
    return made if made.parameters else None


def sharpness_ascent(optimizer: torch.optim.Optimizer, rho: float, *, adaptive: bool = False) -> Ascent | None:
    """Sharpness-aware minimisation over everything that the optimizer trains.

    Args:
        optimizer: Holds the parameters.
        rho: Radius, as in `SharpnessAscent`; 0 switches it off.
        adaptive: Whether it is ASAM.

    Returns:
        None where there is nothing to do.

    Raises:
        InputError: The radius is out of range.
    """
    if rho == 0 and not isinstance(rho, bool):
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return SharpnessAscent(parameters, rho, adaptive=adaptive) if parameters else None


def recipe_ascent(
    optimizer: torch.optim.Optimizer, recipe: Recipe, awp: float | None, *, begins: float = 0.0
) -> Ascent | None:
    """The ascent that a recipe asks for, if any: adversarial weight perturbation, or sharpness-aware minimisation.

    Args:
        optimizer: Holds the weights.
        recipe: Says which.
        awp: Radius of adversarial weight perturbation; None for the recipe's.
        begins: As in `Ascent`.

    Raises:
        InputError: A radius is out of range, or both are asked for.
    """
    if awp and recipe.sam:
        raise InputError(f"awp={awp!r} and the recipe's sam={recipe.sam!r} would each move the weights: choose one")
    perturbation = weight_ascent(optimizer, recipe.awp if awp is None else awp, begins=begins)
    return perturbation or sharpness_ascent(optimizer, recipe.sam, adaptive=recipe.sam_adaptive)


def forward_backward(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    threat: ThreatModel,
    *,
    generator: torch.Generator,
    precision: AbstractContextManager[Any],
    ascent: Ascent | None,
    share: float = 1.0,
    backward: Callable[[Tensor], None] = torch.autograd.backward,
) -> ObjectiveStep:
    """Leave the gradient of the objective in `.grad`: at the weights, or above them where there is an ascent.

    The images are attacked once, at the weights themselves; the ascent and the descent see the same images.

    Args:
        model: The network, in training mode.
        x: Images, [N, C, H, W].
        y: Labels, int64 [N].
        objective: The loss; with an ascent it needs `attack` and `loss_on`.
        threat: What the adversary may do.
        generator: The attack's randomness.
        precision: Context of each forward pass; entered up to three times, one after the other.
        ascent: Where to compute the gradient; None for where the weights are.
        share: Factor of the gradient: which part of a batch these images are.
        backward: Takes the loss times the share, and leaves the gradient.

    Returns:
        The objective's step, from above where there is an ascent.
    """
    if ascent is None:
        with precision:
            step = objective.loss(model, x, y, threat, generator=generator)
        backward(step.loss if share == 1 else step.loss * share)
        return step
    with precision:
        x_adv = objective.attack(model, x, y, threat, generator=generator)

    def evaluate() -> ObjectiveStep:
        with precision:
            return objective.loss_on(model, x, x_adv, y)

    with ascent.raised(model, lambda: evaluate().loss):
        step = evaluate()
        backward(step.loss if share == 1 else step.loss * share)
    ascent.note(step.loss)
    return step
