"""What a training step minimises, and how an objective is named and written down.

Two habits of the field are kept, and both can matter more than the loss itself:

* the attack sees the model in eval mode (running statistics of batch normalisation), the loss in the
  caller's mode, which is train mode during training;
* the running statistics move once for each forward pass of the loss, never for the passes of the attack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from robustcompress.errors import InputError, Problems, nearest
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives.distil import ARD, IAD, LTD, RSLAD, AdaAD, RobustDistillation
from robustcompress.robust.objectives.free import FreeAT
from robustcompress.robust.objectives.interval import IBP, CrownIBP
from robustcompress.robust.objectives.labels import ClassWeights, LabelLoss
from robustcompress.robust.objectives.mart import MART
from robustcompress.robust.objectives.parts import AttackMode
from robustcompress.robust.objectives.regularised import (
    PLUS,
    REGULARISERS,
    Regularised,
    options_of,
    regularisers_from,
)
from robustcompress.robust.objectives.regularisers import JacobianNorm, LatentBoundary, Regulariser, Separability
from robustcompress.robust.objectives.semantic import SemanticAT
from robustcompress.robust.objectives.smoothing import Smoothing
from robustcompress.robust.objectives.standard import FGSMRS, PGDAT, TRADES, Natural

__all__ = [
    "ARD",
    "FGSMRS",
    "IAD",
    "IBP",
    "LTD",
    "MART",
    "OBJECTIVES",
    "PGDAT",
    "PLUS",
    "REGULARISERS",
    "RSLAD",
    "TRADES",
    "AdaAD",
    "AttackMode",
    "ClassWeights",
    "CrownIBP",
    "FreeAT",
    "JacobianNorm",
    "LabelLoss",
    "LatentBoundary",
    "Natural",
    "Objective",
    "ObjectiveStep",
    "Regularised",
    "Regulariser",
    "RobustDistillation",
    "SemanticAT",
    "Separability",
    "Smoothing",
    "objective_from_json",
    "objective_from_name",
    "required_options",
]

KINDS: tuple[type[Objective], ...] = (
    *(Natural, PGDAT, FGSMRS, FreeAT, TRADES, MART, SemanticAT),
    *(RSLAD, AdaAD, ARD, IAD, LTD, RobustDistillation),
    *(Smoothing, IBP, CrownIBP),
)
OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in KINDS}
"""By name; each is a frozen dataclass of its options."""


def objective_from_name(name: str, **options: Any) -> Objective:
    """Build an objective of `OBJECTIVES` with `options`; None stands for an option's default.

    Names of `REGULARISERS` may follow, each after a plus; their options begin with their names.

    Raises:
        InputError: No such objective, or an option that it does not have (the nearest is offered), or a bad value.

    Example:
        >>> objective_from_name("trades", steps=5).steps
        5
        >>> objective_from_name("pgd-at+jacobian", jacobian_weight=0.1).regularisers
        (JacobianNorm(weight=0.1, projections=1),)
    """
    asked, *added = str(name).strip().lower().split(PLUS)
    kind = OBJECTIVES.get(asked)
    if kind is None:
        raise InputError(f"objective {name!r} is unknown{nearest(asked, OBJECTIVES)}")
    given = {key: value for key, value in options.items() if value is not None}
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # all are dataclasses
    theirs = [option for extra in added if extra in REGULARISERS for option in options_of(REGULARISERS[extra])]
    problems = Problems(f"objective {name!r} cannot be built")
    for key in given:
        if key not in known + theirs:
            problems.add(f"it has no option {key!r}{nearest(key, known + theirs)}")
    for option in required_options(kind):
        if option not in given:
            problems.add(f"it needs the option {option!r}")
    regularisers = problems.attempt(lambda: regularisers_from(added, given))
    problems.raise_if_any()
    inner = kind(**{key: value for key, value in given.items() if key in known})
    return Regularised(inner, regularisers) if added else inner


def required_options(kind: type[Objective]) -> tuple[str, ...]:
    """The options of an objective that have no default."""
    found = fields(kind)  # type: ignore[arg-type]  # all are dataclasses
    return tuple(f.name for f in found if f.default is MISSING and f.default_factory is MISSING)


def objective_from_json(data: Mapping[str, Any]) -> Objective:
    """Read what `to_json` of an objective wrote.

    Raises:
        InputError: See `objective_from_name`; or the name is missing.
    """
    if "name" not in data:
        raise InputError(f"this is not an objective: key 'name' is missing from {dict(data)!r}")
    return objective_from_name(data["name"], **{key: value for key, value in data.items() if key != "name"})
