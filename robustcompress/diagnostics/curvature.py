"""The largest eigenvalue of the Hessian of a loss with respect to gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustcompress.errors import Problems
from robustcompress.robust.attacks import kept_buffers
from robustcompress.structure.masks import ScoreMasks

Vector = list[Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Eigenvalue:
    """An eigenvalue as far as it was found.

    Attributes:
        value: The estimate; it approaches the largest eigenvalue from below.
        residual: Length of `H v - value * v` for the unit vector v that it belongs to: so far away, at most, lies an
            eigenvalue of H.
        steps: Hessian-vector products that were made.
    """

    value: float
    residual: float
    steps: int


def top_eigenvalue(
    gates: ScoreMasks,
    loss: Callable[[], Tensor],
    *,
    steps: int = 20,
    tolerance: float = 0.01,
    generator: torch.Generator,
) -> Eigenvalue:
    """Largest eigenvalue of the Hessian of a loss with respect to the gate values, at the present mask.

    The variable is the *soft gate* m of every unit, open or closed, at the 0/1 mask that the scores stand for:
    L(w * m). With respect to the scores themselves there is no such Hessian: the mask is constant between flips, and
    what a straight-through rule puts in place of its derivative has no second one that means anything. S2AP (Piras et
    al. 2025) reports this eigenvalue for its scores; which variable it takes could not be read, so this is ours.

    Products with the Hessian are second derivatives (double backward). They are combined by the Lanczos process: power
    iteration that keeps a tridiagonal summary of all it has seen. Plain power iteration finds the eigenvalue of
    largest *magnitude*, and the Hessian of a network at a mask is indefinite, so that it may take a negative one or
    hover between two signs. Two vectors are kept, whatever the number of steps.

    Args:
        gates: Open gates on channels or on weights; the rule's values are where the Hessian is taken. They, their
            scores, and the network with its buffers and gradients are left as they were.
        loss: Computes a scalar loss through the network whose gates these are; called once. The images should be
            attacked beforehand (`attacked_loss`). In the mode of the network.
        steps: Products with the Hessian at most; each costs about three forward passes.
        tolerance: Stop where the residual is at most this share of the value.
        generator: Draws the first vector.

    Returns:
        The eigenvalue, and how sure it is. Zero with zero residual where the loss is linear in the gates.

    Raises:
        InputError: No steps, or a negative tolerance.
    """
    problems = Problems("this eigenvalue cannot be looked for")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        problems.add(f"steps={steps!r}: give a whole number, at least 1")
    if not isinstance(tolerance, int | float) or not tolerance >= 0:
        problems.add(f"tolerance={tolerance!r}: must be 0 or more; 0.01 stops at two digits")
    problems.raise_if_any()
    kind = next(gates.model.parameters()).dtype
    values = {name: m.detach().to(kind, copy=True).requires_grad_() for name, m in gates.masks().items()}
    # Fused attention has no second derivative; the plain form has.
    with gates.at(values), kept_buffers(gates.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        points = list(values.values())
        slopes = torch.autograd.grad(loss(), points, create_graph=True, materialize_grads=True)
        first = [torch.randn(m.shape, generator=generator, device=generator.device).to(m) for m in points]
        return _lanczos(lambda v: _product(slopes, points, v), first, steps, tolerance)


def _product(slopes: Sequence[Tensor], points: Sequence[Tensor], vector: Vector) -> Vector:
    """The Hessian times a vector."""
    parts = [(g * v).sum() for g, v in zip(slopes, vector, strict=True) if g.requires_grad]
    if not parts:
        return [torch.zeros_like(m) for m in points]
    total = torch.stack(parts).sum()
    return list(torch.autograd.grad(total, points, retain_graph=True, materialize_grads=True))


def _lanczos(product: Callable[[Vector], Vector], first: Vector, steps: int, tolerance: float) -> Eigenvalue:
    """Lanczos without reorthogonalisation: rounding repeats eigenvalues that were found, and invents none (Paige)."""
    now = _scaled(first, 1 / _dot(first, first) ** 0.5)
    before, beyond = [torch.zeros_like(v) for v in now], 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    found = Eigenvalue(value=0.0, residual=0.0, steps=0)
    for step in range(1, steps + 1):
        image = product(now)
        diagonal.append(_dot(image, now))
        image = [h - diagonal[-1] * v - beyond * u for h, v, u in zip(image, now, before, strict=True)]
        beyond = _dot(image, image) ** 0.5
        rows = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            sides = torch.tensor(beside, dtype=torch.float64)
            rows = rows + torch.diag(sides, 1) + torch.diag(sides, -1)
        if not bool(rows.isfinite().all()):
            return Eigenvalue(value=float("nan"), residual=float("inf"), steps=step)
        eigenvalues, vectors = torch.linalg.eigh(rows)
        found = Eigenvalue(value=float(eigenvalues[-1]), residual=beyond * abs(float(vectors[-1, -1])), steps=step)
        exhausted = beyond <= 10 * torch.finfo(now[0].dtype).eps * float(eigenvalues.abs().max())
        if exhausted or (step > 1 and found.residual <= tolerance * abs(found.value)):
            break
        beside.append(beyond)
        before, now = now, _scaled(image, 1 / beyond)
    return found


def _dot(a: Vector, b: Vector) -> float:
    return float(torch.stack([(u.double() * v.double()).sum() for u, v in zip(a, b, strict=True)]).sum())


def _scaled(vector: Vector, factor: float) -> Vector:
    return [v * factor for v in vector]
