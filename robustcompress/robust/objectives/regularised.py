"""An objective with regularisers: their composition, and how it is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustcompress.errors import Problems, nearest
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives.interval import BoundObjective
from robustcompress.robust.objectives.regularisers import JacobianNorm, LatentBoundary, Regulariser, Separability
from robustcompress.robust.threat import ThreatModel

PLUS = "+"
"""Between the names of an objective and its regularisers: "pgd-at+jacobian"."""

REGULARISERS: dict[str, type[Regulariser]] = {kind.name: kind for kind in (JacobianNorm, Separability, LatentBoundary)}
"""By name; each is a frozen dataclass of its options."""


@dataclass(frozen=True, slots=True)
class Regularised(Objective):
    """An objective and the weighted penalties that are added to its loss; the attack is the objective's own.

    Attributes:
        inner: The objective; it has the parts `attack` and `loss_on`.
        regularisers: The penalties, each at most once.

    Raises:
        InputError: No regularisers, one of them twice, or `inner` has some already, or no parts.

    Example:
        >>> from robustcompress.robust import PGDAT
        >>> Regularised(PGDAT(steps=3), (JacobianNorm(weight=0.1),)).to_json()["name"]
        'pgd-at+jacobian'
    """

    name: ClassVar[str] = "regularised"
    inner: Objective
    regularisers: tuple[Regulariser, ...]

    def __post_init__(self) -> None:
        problems = Problems("this objective cannot be used")
        given = [regulariser.name for regulariser in self.regularisers]
        if not given:
            problems.add(f"there are no regularisers: give one of {', '.join(REGULARISERS)}, or the objective alone")
        for name in sorted({name for name in given if given.count(name) > 1}):
            problems.add(f"regulariser {name!r} is there twice")
        if isinstance(self.inner, Regularised):
            problems.add("the objective has regularisers already: name all of them at once")
        if isinstance(self.inner, BoundObjective):
            problems.add(f"objective {self.inner.name!r} has boxes in place of images, which no regulariser knows")
        problems.attempt(lambda: self.inner.require_parts("the regularisers"))
        problems.raise_if_any()

    @property
    def label_smoothing(self) -> float:
        """The objective's, for what else is trained with its loss."""
        return float(getattr(self.inner, "label_smoothing", 0.0))

    @property
    def single_step(self) -> float | None:
        """See `Objective.single_step`."""
        return self.inner.single_step

    @property
    def needs_teacher(self) -> bool:
        """See `Objective.needs_teacher`."""
        return self.inner.needs_teacher

    def taught_by(self, teacher: nn.Module) -> Objective:
        """See `Objective.taught_by`."""
        return replace(self, inner=self.inner.taught_by(teacher))

    def for_labels(self, labels: Tensor, num_classes: int) -> Objective:
        """See `Objective.for_labels`."""
        return replace(self, inner=self.inner.for_labels(labels, num_classes))

    def check(self, threat: ThreatModel) -> None:
        """See `Objective.check`."""
        self.inner.check(threat)

    def withstood(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor | None:
        """See `Objective.withstood`."""
        return self.inner.withstood(model, x, y, threat, generator=generator)

    def check_classes(self, classes: Sequence[str]) -> None:
        """See `Objective.check_classes`."""
        self.inner.check_classes(classes)

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`."""
        return self.inner.attack(model, x, y, threat, generator=generator)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        step = self.inner.loss_on(model, x, x_adv, y)
        penalties = [r.weight * r.penalty(model, x, x_adv, y) for r in self.regularisers]
        return replace(step, loss=step.loss + torch.stack(penalties).sum())

    def to_json(self) -> dict[str, Any]:
        """The objective's own, with the regularisers' names and options: "jacobian_weight" and the like."""
        data = self.inner.to_json()
        name = PLUS.join([str(data["name"]), *(regulariser.name for regulariser in self.regularisers)])
        flat = {f"{r.name}_{key}": value for r in self.regularisers for key, value in r.options().items()}
        return data | {"name": name} | flat


def options_of(kind: type[Regulariser]) -> tuple[str, ...]:
    """The names under which an objective takes the options of a regulariser: "jacobian_weight" and the like."""
    return tuple(f"{kind.name}_{field.name}" for field in fields(kind))  # type: ignore[arg-type]  # all are dataclasses


def regularisers_from(names: Sequence[str], options: Mapping[str, Any]) -> tuple[Regulariser, ...]:
    """Build regularisers by name.

    Args:
        names: Keys of `REGULARISERS`.
        options: By the names of `options_of`; others are left alone.

    Raises:
        InputError: No such regulariser, or a value that makes no sense.
    """
    problems = Problems("the regularisers cannot be built")
    made = []
    for name in names:
        kind = REGULARISERS.get(name)
        if kind is None:
            problems.add(f"regulariser {name!r} is unknown{nearest(name, REGULARISERS)}")
            continue
        mine = {key.removeprefix(f"{name}_"): options[key] for key in options_of(kind) if key in options}
        made.append(problems.attempt(lambda kind=kind, mine=mine: kind(**mine)))  # type: ignore[misc]
    problems.raise_if_any()
    return tuple(made)
