"""What a training step minimises: natural, adversarial (PGD, FGSM-RS) and TRADES losses.

Two habits of the field are kept, and both can matter more than the loss itself:

* the attack sees the model in eval mode (running statistics of batch normalisation), the loss in the
  caller's mode, which is train mode during training;
* the running statistics move once for each forward pass of the loss, never for the passes of the attack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.errors import InputError, Problems, nearest
from robustcompress.robust.attacks import eval_mode, kept_buffers, pgd
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.threat import ThreatModel

__all__ = [
    "FGSMRS",
    "PGDAT",
    "TRADES",
    "AttackMode",
    "Natural",
    "Objective",
    "ObjectiveStep",
    "objective_from_json",
    "objective_from_name",
]

AttackMode = Literal["eval", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Natural(Objective):
    """Cross-entropy on the clean images; one forward pass.

    Attributes:
        label_smoothing: Share of each label given to all classes alike, in [0, 1).
    """

    name: ClassVar[str] = "natural"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`; the threat is not used, and the images come back as they are."""
        return x

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        logits = model(x_adv)
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        return ObjectiveStep(loss, logits.detach(), x_adv, logits.detach())

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PGDAT(Objective):
    """Adversarial training (Madry et al. 2018, eq. 2.1): cross-entropy at the end of a PGD attack on it.

    Costs `steps` passes for the attack and one for the loss; running statistics move once, by the attacked batch.

    Attributes:
        steps: PGD steps, from a uniform random start.
        step_size: Length of a step; None means eps/4, the field's 2/255 at 8/255.
        label_smoothing: Share of each label given to all classes alike (in the loss, not in the attack).
        attack_mode: "eval", the field's habit, or "train": batch statistics in the attack, running ones kept.
    """

    name: ClassVar[str] = "pgd-at"
    steps: int = 10
    step_size: float | None = None
    label_smoothing: float = 0.0
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        _check(self)

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
        with _attacking(model, self.attack_mode):
            return pgd(model, x, y, threat, steps=self.steps, step_size=self.step_size, generator=generator)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        return _adversarial_step(model, x_adv, y, self.label_smoothing)

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class FGSMRS(Objective):
    """Fast adversarial training (Wong et al. 2020, algorithm 3): one step of 1.25 eps from a uniform start.

    Cheap (one pass for the attack, one for the loss) and prone to catastrophic overfitting: PGD accuracy
    can fall to zero within an epoch while FGSM accuracy rises, so watch PGD.

    Attributes:
        step_scale: Length of the step in units of eps; the paper's 1.25.
        label_smoothing: Share of each label given to all classes alike (in the loss, not in the attack).
        attack_mode: "eval", as for all objectives here (the paper's code attacks in train mode), or "train".
    """

    name: ClassVar[str] = "fgsm-rs"
    step_scale: float = 1.25
    label_smoothing: float = 0.0
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        _check(self)

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
        step_size = self.step_scale * threat.eps
        with _attacking(model, self.attack_mode):
            return pgd(model, x, y, threat, steps=1, step_size=step_size, generator=generator)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        return _adversarial_step(model, x_adv, y, self.label_smoothing)

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TRADES(Objective):
    """Cross-entropy on clean images plus beta times KL(clean || attacked) (Zhang et al. 2019, eq. 5).

    The attack climbs that KL from Gaussian noise of 0.001 around the images, as in the paper's code; its
    target, the clean logits in the attack's mode, is computed once. The loss makes two forward passes,
    clean then attacked, with gradients through both, so running statistics move twice; the paper's code
    makes three (the clean one twice). For l2 the same normalised-gradient attack is used, where the paper's
    code has an SGD on the noise. Costs 1 + `steps` + 2 passes.

    Attributes:
        beta: Weight of the KL (1/lambda of the paper); 6 is the paper's for CIFAR-10.
        steps: Steps of the attack.
        step_size: Length of a step; None means eps/4 (the paper's code: 0.007 at 0.031).
        attack_mode: "eval", the field's habit, or "train": batch statistics in the attack, running ones kept.
    """

    name: ClassVar[str] = "trades"
    beta: float = 6.0
    steps: int = 10
    step_size: float | None = None
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        _check(self)

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
        with _attacking(model, self.attack_mode):
            return pgd(
                model,
                x,
                y,
                threat,
                steps=self.steps,
                step_size=self.step_size,
                loss="kl",
                start=x.detach() + 0.001 * _gaussian(x, generator),
            )

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`."""
        clean = model(x)
        attacked = model(x_adv)
        divergence = F.kl_div(attacked.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
        loss = F.cross_entropy(clean, y) + self.beta * divergence
        return ObjectiveStep(loss, attacked.detach(), x_adv, clean.detach())

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`."""
        return {"name": self.name, **asdict(self)}


_OBJECTIVES: dict[str, type[Natural] | type[PGDAT] | type[FGSMRS] | type[TRADES]] = {
    kind.name: kind for kind in (Natural, PGDAT, FGSMRS, TRADES)
}


def objective_from_name(name: str, **options: Any) -> Objective:
    """Build "natural", "pgd-at", "fgsm-rs" or "trades" with `options`; None stands for an option's default.

    Raises:
        InputError: No such objective, or an option that it does not have (the nearest is offered), or a bad value.

    Example:
        >>> objective_from_name("trades", steps=5).steps
        5
    """
    kind = _OBJECTIVES.get(str(name).strip().lower())
    if kind is None:
        raise InputError(f"objective {name!r} is unknown{nearest(str(name), _OBJECTIVES)}")
    given = {key: value for key, value in options.items() if value is not None}
    known = [field.name for field in fields(kind)]
    problems = Problems(f"objective {kind.name!r} cannot be built")
    for key in given:
        if key not in known:
            problems.add(f"it has no option {key!r}{nearest(key, known)}")
    problems.raise_if_any()
    return kind(**given)


def objective_from_json(data: Mapping[str, Any]) -> Objective:
    """Read what `to_json` of an objective wrote.

    Raises:
        InputError: See `objective_from_name`; or the name is missing.
    """
    if "name" not in data:
        raise InputError(f"this is not an objective: key 'name' is missing from {dict(data)!r}")
    return objective_from_name(data["name"], **{key: value for key, value in data.items() if key != "name"})


def _adversarial_step(model: nn.Module, x_adv: Tensor, y: Tensor, label_smoothing: float) -> ObjectiveStep:
    logits = model(x_adv)
    return ObjectiveStep(F.cross_entropy(logits, y, label_smoothing=label_smoothing), logits.detach(), x_adv)


def _gaussian(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)


@contextmanager
def _attacking(model: nn.Module, mode: AttackMode) -> Iterator[None]:
    if mode == "eval":
        with eval_mode(model):
            yield
        return
    with kept_buffers(model):
        yield


def _check(objective: Natural | PGDAT | FGSMRS | TRADES) -> None:
    problems = Problems(f"objective {objective.name!r} cannot be used")
    for field in fields(objective):
        key, value = field.name, getattr(objective, field.name)
        if key == "attack_mode":
            if value not in get_args(AttackMode):
                problems.add(f"attack_mode={value!r} is unknown{nearest(str(value), get_args(AttackMode))}")
        elif key == "steps":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.add(f"steps={value!r}: give a whole number, at least 1")
        elif value is None and key == "step_size":
            continue
        elif isinstance(value, bool) or not isinstance(value, int | float):
            problems.add(f"{key}={value!r}: give a number")
        elif key == "label_smoothing":
            if not 0 <= value < 1:
                problems.add(f"label_smoothing={value!r}: must lie in [0, 1)")
        elif not 0 < value < float("inf"):
            problems.add(f"{key}={value!r}: must be positive and finite")
    problems.raise_if_any()
