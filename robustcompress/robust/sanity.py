"""What makes an evaluation impossible (said at once, before any work) and what makes it doubtful (said with
it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustcompress.errors import Problems, first_line
from robustcompress.robust.attacks import AttackSpec, input_gradient
from robustcompress.robust.report import AttackResult
from robustcompress.robust.statistics import paired_test
from robustcompress.robust.threat import ThreatModel

_MASKED_SHARE = 0.1  # of the images; some confident ones always have a gradient that underflows
_TOLERANCE = 1e-4  # of the largest logit; well above what reordered sums do
_SIGNIFICANCE = 0.01


def check_images(pixels: Tensor, labels: Tensor, threat: ThreatModel, problems: Problems) -> None:
    """Collect what is wrong with the images and labels themselves.

    Args:
        pixels: uint8, or float within the threat's bounds: [N, 3, H, W].
        labels: Integers, [N].
        threat: Its bounds are the range of the pixels; its radius has to make sense for the images' size.
        problems: Where the complaints go.
    """
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        problems.add(f"images of shape {tuple(pixels.shape)}: give [N, 3, H, W], channels second")
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        problems.add(f"labels are {labels.dtype} of shape {tuple(labels.shape)}: give integers of shape [N]")
    if len(pixels) != len(labels):
        problems.add(f"{len(pixels)} images but {len(labels)} labels: give one label for each image")
    if len(pixels) == 0:
        problems.add("there are no images: give at least one")
    elif pixels.dtype == torch.uint8:
        if threat.bounds != (0.0, 1.0):
            problems.add(f"bounds={threat.bounds} do not fit uint8 images, which are shown in [0, 1]: use (0, 1)")
    elif pixels.is_floating_point():
        _check_range(pixels, threat, problems)
    else:
        problems.add(f"images are {pixels.dtype}: give uint8 in 0..255 or float32 in [0, 1]")
    if labels.numel() and not labels.is_floating_point() and int(labels.min()) < 0:
        problems.add(f"label {int(labels.min())}: labels begin at 0")
    if pixels.dim() == 4 and threat.norm == "l2":
        low, high = threat.bounds
        reach = (high - low) * math.sqrt(pixels[0:1].shape[1:].numel())
        if threat.eps > reach:
            problems.add(
                f"eps={threat.eps:g} in l2 reaches every image of this size (none are more than {reach:.3g} "
                f"apart): you probably meant {threat.eps:g}/255"
            )


def check_model(model: nn.Module, x: Tensor, labels: Tensor, problems: Problems) -> int | None:
    """Collect why this model cannot be evaluated, by looking at it and at what it makes of two images.

    Args:
        model: In eval mode, on the device of `x`.
        x: A few images, float32 [n, 3, H, W].
        labels: All labels, int64 [N].
        problems: Where the complaints go.

    Returns:
        The number of logits, or None where the model gave none.
    """
    tensors = [*model.parameters(), *model.buffers()]
    other = {t.dtype for t in tensors if t.is_floating_point() and t.dtype != torch.float32}
    if other:
        names = ", ".join(sorted(str(dtype) for dtype in other))
        problems.add(f"the model holds {names}: evaluate it in single precision, with model.float()")
        return None
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        try:
            logits = model(x)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            problems.add(f"the model does not take images of shape {tuple(x.shape)}: {first_line(error)}")
            return None
        if not isinstance(logits, Tensor):
            problems.add(f"the model returns {type(logits).__name__}: wrap it so that it returns logits [N, K]")
            return None
        if logits.dim() != 2 or logits.shape[0] != len(x) or logits.shape[1] < 2:
            shape = tuple(logits.shape)
            problems.add(f"the model returns {shape} for {len(x)} images: give logits [N, K] of 2 or more classes")
            return None
        if not bool(logits.isfinite().all()):
            problems.add("the logits are not finite: the model diverged, or its weights were not loaded")
        if not logits.requires_grad or torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] is None:
            problems.add(
                "no gradient reaches the images (a detach, a no_grad, or a step that has none): gradient "
                "attacks cannot judge this model"
            )
    num_classes = logits.shape[1]
    if labels.numel() and int(labels.max()) >= num_classes:
        problems.add(
            f"label {int(labels.max())} but the model has {num_classes} logits: labels end at {num_classes - 1}"
        )
    return int(num_classes)


def flag_model(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Look for what fools gradient attacks: probabilities, gradients that vanish, randomness.

    Args:
        model: In eval mode, on the device of `x`.
        x: Some tens of images, [n, 3, H, W].
        y: Their labels, int64 [n].

    Returns:
        One sentence for each reason to doubt.
    """
    with torch.no_grad():
        first, second = model(x).float(), model(x).float()
    flags = []
    if bool((first >= 0).all() and (first <= 1).all() and ((first.sum(1) - 1).abs() < 1e-4).all()):
        flags.append(
            "the model returns probabilities where logits are expected, which weakens every gradient attack: "
            "remove the softmax"
        )
    difference = float((first - second).abs().max())
    if difference > _TOLERANCE * (1 + float(first.abs().max())):
        flags.append(
            f"the model is random (two passes over the same images differ by {difference:.2g}): attacks "
            "would need to average over it, and these numbers are too high"
        )
    gradient = input_gradient(model, x, y)
    dead = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    if dead > _MASKED_SHARE * len(x):
        flags.append(
            f"the gradient is exactly zero on {dead} of {len(x)} images (masked, or the loss saturates): "
            "trust no gradient attack here, and look at what Square alone finds"
        )
    return flags


def flag_order(results: Sequence[AttackResult], specs: Sequence[AttackSpec]) -> list[str]:
    """Look for a stronger attack that does worse than a weaker one, which means that gradients mislead.

    FGSM, PGD and APGD are compared by an exact paired test at the 1 % level, since chance decides single images.
    AutoAttack is held to more: every image that a weaker attack breaks and AutoAttack does not is counted.

    Args:
        results: One for each of `specs`, same order.
        specs: Which attacks they are.

    Returns:
        One sentence for each pair out of order, and one if Square succeeds where gradients failed.
    """
    flags = []
    pairs = list(zip(specs, results, strict=True))
    for weak_spec, weak in pairs:
        for strong_spec, strong in pairs:
            n = min(weak.n, strong.n)
            if not _stronger(strong_spec, weak_spec) or n == 0:
                continue
            test = paired_test(strong.correct[:n], weak.correct[:n])
            if strong_spec.kind == "autoattack":
                if test.only_a:
                    flags.append(
                        f"{weak.name} breaks {test.only_a} of {n} images that AutoAttack does not: gradients mislead"
                    )
            elif test.difference > 0 and test.p_value < _SIGNIFICANCE:
                flags.append(
                    f"{strong.name} does worse than the weaker {weak.name} (it leaves "
                    f"{int(strong.correct[:n].sum())} against {int(weak.correct[:n].sum())} of {n} images "
                    "right): gradients mislead"
                )
    for spec, result in pairs:
        by_square = result.broken_by.get("square", 0)
        # The package's own threshold is 0.2 %; one image alone is chance.
        if spec.kind == "autoattack" and by_square > max(1.0, 0.002 * result.n):
            flags.append(
                f"Square, which sees no gradient, breaks {by_square} of {result.n} images that every gradient "
                "attack of AutoAttack missed: they mislead, and robust accuracy may be lower still"
            )
    return flags


def _stronger(strong: AttackSpec, weak: AttackSpec) -> bool:
    """Whether theory puts the one above the other."""
    if strong.kind == "autoattack":
        return weak.kind in ("fgsm", "pgd")
    if strong.kind == "apgd-fast":
        return weak.kind in ("fgsm", "pgd") or (weak.kind == strong.kind and strong.steps > weak.steps)
    if strong.kind != "pgd" or strong.loss == "kl":
        return False
    if weak.kind == "fgsm":
        return strong.steps >= 5
    return (
        weak.kind == "pgd"
        and strong.loss == weak.loss
        and (strong.steps, strong.restarts) != (weak.steps, weak.restarts)
        and strong.steps >= weak.steps
        and strong.restarts >= weak.restarts
    )


def _check_range(pixels: Tensor, threat: ThreatModel, problems: Problems) -> None:
    low, high = float(pixels.min()), float(pixels.max())
    if not bool(pixels.isfinite().all()):
        problems.add("images hold NaN or infinity: clean the data")
    elif low < threat.bounds[0] or high > threat.bounds[1]:
        hint = "divide by 255" if high > 2 and low >= 0 else "normalise inside the model, not before it"
        problems.add(f"images reach from {low:g} to {high:g}, outside {list(threat.bounds)}: {hint}")
