"""Training for bounds that hold under any attack: IBP and CROWN-IBP."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.errors import InputError
from robustcompress.robust.attacks import eval_mode
from robustcompress.robust.bounds import Interval, box, imbalance, margins, widening
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives.parts import check_options
from robustcompress.robust.threat import ThreatModel


@dataclass(frozen=True, slots=True)
class Moment:
    """How far the ramp is.

    Attributes:
        eps: Share of the threat's radius.
        clean: Weight of the clean cross-entropy; the bounds' has the rest.
        crown: Weight of the CROWN-IBP bound against the interval bound.
        steady: Weight of `widening` and of `imbalance`.
    """

    eps: float
    clean: float
    crown: float
    steady: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundObjective(Objective):
    """What `ibp` and `crown-ibp` share. Abstract.

    Attributes:
        kappa: Weight of the clean cross-entropy after the ramp; 0.5 in both papers.
        warm_up: Share of the run's epochs before the radius grows.
        ramp: Share of the run's epochs at which the radius is whole.
        steady: Weight of what keeps bounds from widening and units from dying (`bounds/warm_up.py`; lambda_0 of Shi et
            al. 2021, section 4.3) until the radius grows, along with which it falls to 0; by default it is 0. With it
            the radius is a thousandth, and not 0, before it grows.
    """

    compiles: ClassVar[bool] = False
    begins_with_crown: ClassVar[bool]
    kappa: float = 0.5
    warm_up: float = 0.05
    ramp: float = 0.35
    steady: float = 0.0

    def __post_init__(self) -> None:
        check_options(self)
        if self.warm_up > self.ramp:
            raise InputError(
                f"objective {self.name!r} cannot be used: warm_up={self.warm_up} lies behind ramp={self.ramp}; "
                "make it smaller"
            )

    def at(self, progress: float) -> Objective:
        """See `Objective.at`."""
        done = ramped(progress, self.warm_up, self.ramp)
        return self if done == 1 else Ramping(self, self.moment(done))

    def moment(self, done: float) -> Moment:
        """How the ramp is when this share of it is done."""
        crown = 1 - done if self.begins_with_crown else 0.0
        steady = (1 - done) * self.steady
        # Bounds that shall not widen have to be there: before the radius grows, it is a thousandth.
        eps = max(done, 1e-3) if steady > 0 else done
        return Moment(eps=eps, clean=1 - (1 - self.kappa) * done, crown=crown, steady=steady)

    def check(self, threat: ThreatModel) -> None:
        """See `Objective.check`: the threat must be linf."""
        if threat.norm != "linf":
            raise InputError(
                f"objective {self.name!r} bounds linf boxes, and the threat is {threat.label()}: use norm='linf'"
            )

    def box(self, x: Tensor, threat: ThreatModel, share: float = 1.0) -> Interval:
        """All that the threat allows, at this share of its radius."""
        self.check(threat)
        return box(x, share * threat.eps, threat.bounds)

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`: no images, but the box of all that the threat allows (an `Interval`)."""
        return self.box(x, threat)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`; `logits` are the worst of each class, so that they are right where that is proven.

        As after the ramp.
        """
        return _step(model, x_adv, y, self.moment(1.0))

    def withstood(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.withstood`: the images that are proven right, by interval bounds."""
        with torch.no_grad(), eval_mode(model):
            leads = margins(model, self.box(x, threat), y).ibp
        return (leads.scatter(1, y[:, None], torch.inf) > 0).all(1)

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class IBP(BoundObjective):
    """Cross-entropy of the worst logits that interval bounds allow (Gowal et al. 2018): for `certify(method="ibp")`.

    kappa * CE(logits) + (1 - kappa) * CE(worst logits), against linf. The radius grows linearly from 0 to the
    threat's while kappa falls from 1 to its value, over the epochs of the *run* from `warm_up` to `ramp`: in a
    strategy that pretrains, searches and fine-tunes, what comes after the ramp is trained at the whole radius. What
    begins with certified weights wants `warm_up=0, ramp=0`. Batch statistics, and what running statistics learn,
    are those of the clean images, and `steady` adds the regularisers of the warm-up (as in Shi et al. 2021, whose
    initialisation for networks without batch norms is not here). About three forward and three backward passes.
    Training this way costs much clean accuracy; nothing is attacked.

    The options are those of `BoundObjective`.
    """

    name: ClassVar[str] = "ibp"
    begins_with_crown: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CrownIBP(BoundObjective):
    """As `ibp`, with a linear bound backwards from the logits while the radius grows (Zhang et al. 2020).

    The margins that are trained are beta * CROWN-IBP + (1 - beta) * IBP; beta falls from 1 to 0 along the ramp, and
    after it this is `ibp`. The linear bound steadies the beginning and costs one more pass for each class. It needs a
    network that is linear but for ReLUs.

    The options are those of `BoundObjective`.
    """

    name: ClassVar[str] = "crown-ibp"
    begins_with_crown: ClassVar[bool] = True


class Ramping(Objective):
    """One of these objectives on its ramp.

    Args:
        whole: The objective itself.
        moment: How far the ramp is.
    """

    name: ClassVar[str] = "ramping"
    compiles: ClassVar[bool] = False

    def __init__(self, whole: BoundObjective, moment: Moment) -> None:
        self.whole, self.moment = whole, moment

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The box of the moment's radius."""
        return self.whole.box(x, threat, self.moment.eps)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """With the moment's weights."""
        return _step(model, x_adv, y, self.moment)

    def to_json(self) -> dict[str, Any]:
        """The objective's."""
        return self.whole.to_json()


def ramped(progress: float, warm_up: float, ramp: float) -> float:
    """How far a linear ramp from `warm_up` to `ramp` is at `progress`: 0 before it, 1 after it."""
    if progress >= ramp:
        return 1.0
    return max(0.0, (progress - warm_up) / (ramp - warm_up))


def _step(model: nn.Module, images: Tensor, y: Tensor, moment: Moment) -> ObjectiveStep:
    assert isinstance(images, Interval)
    crown = moment.crown > 0
    trail: list[tuple[Tensor, Tensor]] | None = [] if moment.steady > 0 else None
    found = margins(model, images, y, crown=crown, trains=torch.is_grad_enabled(), trail=trail)
    leads = found.ibp
    if found.crown is not None:
        leads = moment.crown * found.crown + (1 - moment.crown) * found.ibp
    worst = F.cross_entropy(-leads, y)  # the margin of y over itself is 0
    loss = moment.clean * F.cross_entropy(found.clean, y) + (1 - moment.clean) * worst
    if trail:
        loss = loss + moment.steady * (widening(images, trail) + imbalance(trail))
    # A tie is no proof: the class itself lies a hair below 0.
    shown = (-leads.detach()).scatter(1, y[:, None], -torch.finfo(leads.dtype).tiny)
    return ObjectiveStep(loss, shown, images, found.clean.detach())
