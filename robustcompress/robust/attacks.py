"""FGSM and PGD as functions of a threat, and the names by which an evaluation asks for attacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.errors import InputError, Problems, nearest
from robustcompress.robust.apgd import PASSES, apgd_fast
from robustcompress.robust.threat import ThreatModel

Model = Callable[[Tensor], Tensor]
AttackLoss = Literal["ce", "margin", "kl"]
AttackKind = Literal["clean", "fgsm", "pgd", "apgd-fast", "autoattack"]

_EXAMPLES = ("autoattack", "clean", "fgsm", "apgd-fast", "pgd-20", "pgd-10x5", "pgd-20-margin")
_FAST_NAME = re.compile(r"apgd-fast(?:-(?P<passes>[1-9]\d*))?")
_PGD_NAME = re.compile(r"pgd-(?P<steps>[1-9]\d*)(?:x(?P<restarts>[1-9]\d*))?(?:-(?P<loss>ce|margin|kl))?")


def fgsm(model: Model, x: Tensor, y: Tensor, threat: ThreatModel, *, loss: AttackLoss = "ce") -> Tensor:
    """Take one step of length eps from the images themselves (Goodfellow et al. 2015, section 4).

    Args:
        model: Maps images [N, C, H, W] to logits [N, K]. Neither its mode nor its `.grad` is touched.
        x: Images within `threat.bounds`.
        y: True labels, int64 [N].
        threat: What the adversary may do. For l2 the step follows the normalised gradient.
        loss: "ce" or "margin"; see `pgd`. ("kl" has no gradient at the images themselves.)

    Returns:
        Attacked images, detached, in the ball and the bounds, memory format of `x`. One forward pass.

    Raises:
        InputError: The loss is unknown, or "kl".
    """
    if loss == "kl":
        raise InputError("loss='kl' is flat at the clean image, where FGSM starts: take 'ce' or 'margin'")
    return pgd(model, x, y, threat, steps=1, step_size=threat.eps, loss=loss, random_start=False)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    loss: AttackLoss = "ce",
    random_start: bool = True,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    clean_logits: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent on the loss (Madry et al. 2018, section 2.1), best over restarts for each image.

    With one restart this is the training attack: exactly `steps` forward passes, each with one backward
    pass to the images and none to the weights, whether or not those are frozen. Only further restarts cost
    one more forward pass each, to judge which result to keep. The model's mode is the caller's business (so
    is autocast); it works inside `torch.no_grad()` and `torch.inference_mode()` too.

    Args:
        model: Maps images [N, C, H, W] to logits [N, K].
        x: Images within `threat.bounds`.
        y: True labels, int64 [N]; not used by the "kl" loss, except to judge restarts.
        threat: What the adversary may do.
        steps: Gradient steps of each restart.
        step_size: Length of a step in the threat's norm. None means eps/4: the field's 2/255 at 8/255.
        restarts: Independent starts. For each image a misclassified result is kept before a classified one,
            and among equals the one of highest loss.
        loss: What is climbed. "ce": cross-entropy. "margin": largest wrong logit minus the true one
            (Carlini and Wagner 2017, f6 without its floor). "kl": KL(softmax(clean) || softmax(attacked)),
            as TRADES does.
        random_start: Begin at a uniform point of the ball; False begins at the images, and then restarts repeat.
        start: Begin at these images (brought into the ball) in place of a random point, in the first restart.
        generator: Source of the starts; torch's global one where None.
        clean_logits: For "kl": the logits on `x`, [N, K]. None costs one more forward pass.

    Returns:
        Attacked images, detached, in the ball and the bounds, memory format of `x`.

    Raises:
        InputError: A count below one, a step size that is not positive, an unknown loss, or restarts that
            would all begin at the same point.
    """
    _check(steps=steps, step_size=step_size, restarts=restarts, loss=loss, random_start=random_start)
    step = threat.eps / 4 if step_size is None else step_size
    with torch.inference_mode(False), torch.no_grad():
        x, y = _ordinary(x), _ordinary(y)
        if loss == "kl":
            clean_logits = model(x) if clean_logits is None else _ordinary(clean_logits)
        best: Tensor | None = None
        best_wrong = best_score = x.new_empty(0)
        for restart in range(restarts):
            if start is not None and restart == 0:
                x_adv = threat.project(start.detach(), x)
            else:
                x_adv = threat.random_start(x, generator) if random_start else x
            for _ in range(steps):
                grad = input_gradient(model, x_adv, y, loss=loss, clean_logits=clean_logits)
                x_adv = threat.project(threat.ascend(x_adv, grad, step), x)
            if restarts == 1:
                return x_adv
            logits = model(x_adv)
            wrong = logits.argmax(1) != y
            score = losses(logits.float(), y, loss=loss, clean_logits=clean_logits)
            if best is None:
                best, best_wrong, best_score = x_adv, wrong, score
            else:
                better = (wrong & ~best_wrong) | ((wrong == best_wrong) & (score > best_score))
                best = torch.where(better.view(-1, *[1] * (x.dim() - 1)), x_adv, best)
                best_wrong = torch.where(better, wrong, best_wrong)
                best_score = torch.where(better, score, best_score)
        assert best is not None
        return best


def input_gradient(
    model: Model, x: Tensor, y: Tensor, *, loss: AttackLoss = "ce", clean_logits: Tensor | None = None
) -> Tensor:
    """Return the gradient of the summed loss with respect to the images, and to nothing else: shape of
    `x`.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        total = losses(model(x), y, loss=loss, clean_logits=clean_logits).sum()
        return torch.autograd.grad(total, x)[0]


def losses(logits: Tensor, y: Tensor, *, loss: AttackLoss = "ce", clean_logits: Tensor | None = None) -> Tensor:
    """Return the attack loss of each sample, [N]; see `pgd` for the three of them.

    Args:
        logits: [N, K].
        y: True labels, int64 [N].
        loss: "ce", "margin" or "kl".
        clean_logits: Needed by "kl": the logits on the clean images, [N, K].
    """
    if loss == "ce":
        return F.cross_entropy(logits, y, reduction="none")
    if loss == "margin":
        true = logits.gather(1, y[:, None]).squeeze(1)
        return logits.scatter(1, y[:, None], -torch.inf).amax(1) - true
    if clean_logits is None:
        raise InputError("loss='kl' compares with the clean images: pass clean_logits")
    log_clean = clean_logits.detach().log_softmax(1)
    return F.kl_div(logits.log_softmax(1), log_clean, reduction="none", log_target=True).sum(1)


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give each module of a model its own training flag back afterwards, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode, and give each of its modules back its own flag afterwards."""
    with kept_modes(model):
        model.eval()
        yield


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Let passes in train mode use batch statistics, and give every buffer (running statistics) its value back."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackSpec:
    """One attack of an evaluation, as its name says it.

    Attributes:
        kind: "clean" (no attack), "fgsm", "pgd", "apgd-fast" or "autoattack".
        steps: Steps of PGD, or most gradient passes an image of "apgd-fast"; 0 where there are none to choose.
        restarts: Restarts of PGD.
        loss: Loss of PGD.
    """

    kind: AttackKind
    steps: int = 0
    restarts: int = 1
    loss: AttackLoss = "ce"

    @property
    def name(self) -> str:
        """The shortest name that `attack_by_name` reads back."""
        if self.kind == "apgd-fast":
            return self.kind if self.steps == PASSES else f"{self.kind}-{self.steps}"
        if self.kind != "pgd":
            return self.kind
        restarts = f"x{self.restarts}" if self.restarts > 1 else ""
        return f"pgd-{self.steps}{restarts}" + (f"-{self.loss}" if self.loss != "ce" else "")

    def perturb(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Attack `x`; "clean" returns it as it is.

        Args:
            model: Maps images to logits.
            x: Images.
            y: Labels.
            threat: What the adversary may do.
            generator: Source of random starts; of "apgd-fast" its first seed alone counts.
            batch_size: For "apgd-fast", which keeps its own batches full: images that the network sees at once.

        Raises:
            InputError: For "autoattack", which `evaluate` runs through its own adapter.
        """
        if self.kind == "clean":
            return x
        if self.kind == "fgsm":
            return fgsm(model, x, y, threat)
        if self.kind == "apgd-fast":
            seed = 0 if generator is None else generator.initial_seed()
            return apgd_fast(model, x, y, threat, passes=self.steps, seed=seed, batch_size=batch_size)
        if self.kind == "pgd":
            return pgd(
                model,
                x,
                y,
                threat,
                steps=self.steps,
                restarts=self.restarts,
                loss=self.loss,
                generator=generator,
            )
        raise InputError("autoattack is an evaluation of many attacks: run it through evaluate()")

    def draw(self, count: int, shape: Sequence[int], threat: ThreatModel, *, generator: torch.Generator | None) -> None:
        """Draw the random numbers that `perturb` draws for so many float32 images, which someone else attacks.

        Args:
            count: How many.
            shape: Of one image.
            threat: As for `perturb`.
            generator: As for `perturb`.
        """
        if self.kind == "pgd" and count:
            for _ in range(self.restarts):
                threat.random_start(torch.zeros(count, *shape), generator)


def attack_by_name(name: str) -> AttackSpec:
    """Read "clean", "fgsm", "autoattack", "pgd-20", "pgd-10x5" (5 restarts), "pgd-20-margin", "pgd-10x5-kl".

    "apgd-fast" is `apgd_fast`, and "apgd-fast-400" the same with at most 400 gradient passes an image.

    Raises:
        InputError: The name is none of these; the message offers the nearest.
    """
    text = str(name).strip().lower()
    if text == "clean":
        return AttackSpec(kind="clean")
    if text == "fgsm":
        return AttackSpec(kind="fgsm")
    if text == "autoattack":
        return AttackSpec(kind="autoattack")
    match = _FAST_NAME.fullmatch(text)
    if match is not None:
        return AttackSpec(kind="apgd-fast", steps=int(match["passes"] or PASSES))
    match = _PGD_NAME.fullmatch(text)
    if match is None:
        raise InputError(f"attack {name!r} is unknown{nearest(text, _EXAMPLES)}")
    by_name: dict[str | None, AttackLoss] = {None: "ce", "ce": "ce", "margin": "margin", "kl": "kl"}
    return AttackSpec(
        kind="pgd",
        steps=int(match["steps"]),
        restarts=int(match["restarts"] or 1),
        loss=by_name[match["loss"]],
    )


def _ordinary(tensor: Tensor) -> Tensor:
    """Detach; a tensor born in inference mode is copied, because autograd refuses to keep it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _check(*, steps: int, step_size: float | None, restarts: int, loss: str, random_start: bool) -> None:
    problems = Problems("this PGD cannot run")
    for key, count in (("steps", steps), ("restarts", restarts)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            problems.add(f"{key}={count!r}: give a whole number, at least 1")
    if step_size is not None and not step_size > 0:
        problems.add(f"step_size={step_size!r}: must be positive; None means eps/4")
    if loss not in get_args(AttackLoss):
        problems.add(f"loss={loss!r} is unknown{nearest(str(loss), get_args(AttackLoss))}")
    if not random_start and isinstance(restarts, int) and restarts > 1:
        problems.add(f"restarts={restarts} without random_start would all begin alike: leave one of the two")
    problems.raise_if_any()
