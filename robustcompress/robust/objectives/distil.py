"""Robust distillation: a robust teacher says what the network is to answer, on clean and on attacked images.

One loss, of which the published ones are presets. With T the teacher, S the network, x an image, x' the attacked one,
a either of the two, p the softmax, and t temperatures,

    adversarial * t^2 KL(T(a) || S(x')) + natural * t^2 KL(T(x) || S(x)) + labels * CE(S(x), y)
        + (1 - p_T(y | x')^trust) KL(S(x) || S(x'))          the last where there is a trust

KL(P || Q) is the sum over classes of P (log P - log Q), the mean over images ("batchmean"): it does not shrink with the
number of classes. Some released codes average over classes too (RSLAD's, ARD's), so that their loss is a K-th of this.
P is what their codes hold fixed, and what their papers write second.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.errors import InputError
from robustcompress.robust.attacks import eval_mode, pgd
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives.parts import AttackMode, attacking, check_options, gaussian
from robustcompress.robust.threat import ThreatModel

Inner = Literal["ce", "kl-clean", "kl-attacked"]
Target = Literal["clean", "attacked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustDistillation(Objective):
    """A robust teacher's answers in place of labels; every option, with RSLAD's as defaults.

    Plain options: it can be written down, and cannot train. `taught_by` gives what trains, and `compress()` calls that.

    Attributes:
        inner: What the attack climbs: "ce" on the labels, from a uniform start; "kl-clean", KL(T(x) || S(x')), or
            "kl-attacked", KL(T(x') || S(x')), both from Gaussian noise of 0.001 around the images. The last asks the
            teacher at every step, for an answer and a gradient.
        target: Which of the teacher's answers the attacked images are to get: to "clean" or to "attacked" ones.
        adversarial: Weight of the attacked images' KL.
        natural: Weight of the clean images' KL.
        labels: Weight of the cross-entropy of clean images.
        temperature: Divides the logits of both before the softmax.
        teacher_temperature: Divides the teacher's logits in place of it; None for the same.
        trust: Exponent of the teacher's own confidence in the label under attack; None leaves that term out.
        steps: Steps of the attack.
        step_size: Length of a step; None means eps/4.
        attack_mode: "eval", the field's habit, or "train": batch statistics in the attack, running ones kept.
    """

    name: ClassVar[str] = "distil"
    inner: Inner = "kl-clean"
    target: Target = "clean"
    adversarial: float = 5 / 6
    natural: float = 1 / 6
    labels: float = 0.0
    temperature: float = 1.0
    teacher_temperature: float | None = None
    trust: float | None = None
    steps: int = 10
    step_size: float | None = None
    attack_mode: AttackMode = "eval"

    def __post_init__(self) -> None:
        check_options(self)
        if not (self.adversarial or self.natural or self.trust is not None):
            raise InputError(
                f"objective {self.name!r} cannot be used: with adversarial=0, natural=0 and no trust the teacher says "
                "nothing; give one of them a weight, or take 'pgd-at'"
            )

    @property
    def needs_teacher(self) -> bool:
        """Always."""
        return True

    def taught_by(self, teacher: nn.Module) -> Objective:
        """See `Objective.taught_by`."""
        return _Taught(self, teacher)

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Raise InputError: there is nobody to ask."""
        raise InputError(self._alone)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """Raise InputError: there is nobody to ask."""
        raise InputError(self._alone)

    @property
    def _alone(self) -> str:
        return f"objective {self.name!r} needs a teacher: give compress() one, or call taught_by(teacher)"

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ARD(RobustDistillation):
    """Adversarially robust distillation (Goldblum et al. 2020): KL to the teacher's clean answers at temperature 30.

    The attack climbs the labels' cross-entropy; the temperature and no weight for labels are the released code's
    defaults. Options are those of `distil`.
    """

    name: ClassVar[str] = "ard"
    inner: Inner = "ce"
    adversarial: float = 1.0
    natural: float = 0.0
    temperature: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class IAD(RobustDistillation):
    """Introspective distillation (Zhu et al. 2022): where the teacher is unsure under attack, one's own clean answer.

    As the released IAD-I computes it: the teacher's term keeps its whole weight, and the network's own term has one
    less the teacher's probability of the label on the attacked image, to the power of 0.1; gradients go through both
    its sides. Ours: from the first step, where that code begins after 60 of 200 epochs. Options are those of `distil`.
    """

    name: ClassVar[str] = "iad"
    inner: Inner = "ce"
    adversarial: float = 1.0
    natural: float = 0.0
    trust: float | None = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RSLAD(RobustDistillation):
    """Robust soft labels everywhere (Zi et al. 2021): the teacher's clean answers in the attack and in both terms.

    Weights of 5/6 and 1/6 are the paper's. Ours: the clean pass comes before the attacked one, as in TRADES. Options
    are those of `distil`.
    """

    name: ClassVar[str] = "rslad"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaAD(RobustDistillation):
    """Adaptive distillation (Huang et al. 2023): the attack seeks where the two differ, and agreement is learnt there.

    The attacked images get the teacher's answers to themselves. Costs a pass and a gradient of the teacher more at
    every step of the attack. Options are those of `distil`.
    """

    name: ClassVar[str] = "adaad"
    inner: Inner = "kl-attacked"
    target: Target = "attacked"
    adversarial: float = 1.0
    natural: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LTD(RobustDistillation):
    """Low-temperature distillation (Chen and Lee 2021): sharper answers of the teacher, the network at temperature 1.

    Of the paper, that the teacher's temperature is low and the network's fixed. Reconstructed: the value of 0.5, and
    the loss around it, which the paper combines with others. Options are those of `distil`.
    """

    name: ClassVar[str] = "ltd"
    inner: Inner = "ce"
    adversarial: float = 1.0
    natural: float = 0.0
    teacher_temperature: float | None = 0.5


class _Taught(Objective):
    """Options with a teacher: what trains.

    The teacher is asked in eval mode and without gradients to its weights, once for each batch of images, also where
    the attack and several losses at moved weights (AWP) want the same answer. It lies where the images do.

    Args:
        options: What the loss is.
        teacher: Maps images to logits; its modes, weights and gradients are left as they are.
    """

    name: ClassVar[str] = "taught"

    def __init__(self, options: RobustDistillation, teacher: nn.Module) -> None:
        self._options, self._teacher = options, teacher
        self._heard: tuple[weakref.ref[Tensor], int, Tensor] | None = None  # to the last clean images
        self._heard_attacked: tuple[weakref.ref[Tensor], int, Tensor] | None = None

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
        options = self._options
        steps, step_size = options.steps, options.step_size
        with attacking(model, options.attack_mode):
            if options.inner == "ce":
                return pgd(model, x, y, threat, steps=steps, step_size=step_size, generator=generator)
            start = x.detach() + 0.001 * gaussian(x, generator)
            if options.inner == "kl-attacked":
                with eval_mode(self._teacher):
                    return self._disagreement(model, x, start, threat)
            said = self._clean(x)
            return pgd(model, x, y, threat, steps=steps, step_size=step_size, loss="kl", start=start, clean_logits=said)

    def _disagreement(self, model: nn.Module, x: Tensor, start: Tensor, threat: ThreatModel) -> Tensor:
        """Climb KL(T(x') || S(x')), through both."""
        step = threat.eps / 4 if self._options.step_size is None else self._options.step_size
        x_adv = threat.project(start, x)
        for _ in range(self._options.steps):
            with torch.enable_grad():
                moving = x_adv.detach().requires_grad_()
                apart = kl(self._teacher(moving), model(moving)).sum()
                gradient = torch.autograd.grad(apart, moving)[0]
            x_adv = threat.project(threat.ascend(x_adv, gradient, step), x)
        return x_adv.detach()

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`; the clean images are passed first, where any term wants them."""
        options = self._options
        t, theirs = options.temperature, options.teacher_temperature or options.temperature
        wants_clean = options.natural > 0 or options.labels > 0 or options.trust is not None
        clean = model(x) if wants_clean else None
        attacked = model(x_adv)
        terms = []
        if options.adversarial:
            said = self._clean(x) if options.target == "clean" else self._attacked(x_adv)
            terms.append(options.adversarial * t * t * kl(said / theirs, attacked / t).mean())
        if clean is not None and options.natural:
            terms.append(options.natural * t * t * kl(self._clean(x) / theirs, clean / t).mean())
        if clean is not None and options.labels:
            terms.append(options.labels * F.cross_entropy(clean, y))
        if clean is not None and options.trust is not None:
            sure = self._attacked(x_adv).softmax(1).gather(1, y[:, None]).squeeze(1) ** options.trust
            terms.append(((1 - sure) * kl(clean, attacked)).mean())
        loss = torch.stack(terms).sum()
        return ObjectiveStep(loss, attacked.detach(), x_adv, None if clean is None else clean.detach())

    def _clean(self, x: Tensor) -> Tensor:
        self._heard = heard = self._listen(x, self._heard)
        return heard[2]

    def _attacked(self, x_adv: Tensor) -> Tensor:
        self._heard_attacked = heard = self._listen(x_adv, self._heard_attacked)
        return heard[2]

    def _listen(
        self, images: Tensor, heard: tuple[weakref.ref[Tensor], int, Tensor] | None
    ) -> tuple[weakref.ref[Tensor], int, Tensor]:
        """The teacher's logits, float32 `[N, K]`: those heard before if these are the very images, unchanged."""
        version = -1 if images.is_inference() else images._version
        if heard is not None and heard[0]() is images and heard[1] == version != -1:
            return heard
        with eval_mode(self._teacher), torch.no_grad():
            logits = self._teacher(images).float()
        return weakref.ref(images), version, logits

    def to_json(self) -> dict[str, Any]:
        """The options; the teacher is not among them."""
        return self._options.to_json()


def kl(reference: Tensor, said: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(said)) of each image, `[N]`, from logits `[N, K]`; in float32."""
    log_p, log_q = reference.float().log_softmax(1), said.float().log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
