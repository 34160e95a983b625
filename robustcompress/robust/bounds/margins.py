"""By how much a class leads, at least, anywhere in a box of images."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustcompress.errors import UnsupportedModelError
from robustcompress.robust.bounds.interval import Interval, NoRuleError, Trail, box


@dataclass(frozen=True, slots=True)
class Margins:
    """Lower bounds of `logits[y] - logits[k]` over a box.

    Attributes:
        clean: Logits of the images themselves, [N, K].
        ibp: By intervals, [N, K]; 0 at k = y.
        crown: By CROWN-IBP; None where it was not asked for.
    """

    clean: Tensor
    ibp: Tensor
    crown: Tensor | None = None

    @property
    def best(self) -> Tensor:
        """The larger of the two bounds, [N, K]: both hold."""
        return self.ibp if self.crown is None else torch.maximum(self.ibp, self.crown)


def margins(
    model: nn.Module,
    images: Interval,
    y: Tensor,
    *,
    crown: bool = False,
    trains: bool = False,
    trail: list[tuple[Tensor, Tensor]] | None = None,
) -> Margins:
    """Bound how far the class `y` leads each other one, in the mode that the model is in.

    The last linear layer is bounded together with the difference of its outputs (Gowal et al. 2018, section 3), which
    is tighter than the difference of the bounds.

    Args:
        model: Maps images to logits. In train mode batch statistics are those of the images themselves, and running
            statistics move once.
        images: See `box`.
        y: The class that should lead, int64 [N].
        crown: Also bound the logits by linear functions of the images, backwards through the network, with intervals
            for what lies in between (CROWN-IBP, Zhang et al. 2020). Needs a network that is linear but for ReLUs.
        trains: Keep the graph of that linear bound, so that it can be trained.
        trail: Is given the bounds of what each activation is given, with their graph.

    Raises:
        UnsupportedModelError: A layer for which there is no rule; it is named.
    """
    point = slack = None
    if crown:
        point = images.value.detach().clone().requires_grad_()
        slack = images.value.new_zeros(len(y)).requires_grad_()
    seen = None if trail is None else Trail()
    start = Interval(images.value, images.lower, images.upper, point=point, slack=slack, trail=seen)
    # Half of the digits do not tell a narrow box from a point.
    full_precision = torch.autocast(images.device.type, enabled=False)
    with full_precision, torch.set_grad_enabled(crown or torch.is_grad_enabled()):
        logits = _bounded(model, start)
        if seen is not None and trail is not None:
            seen.closed = True
            trail.extend(seen.bounds)
        found = Margins(logits.value, _by_intervals(logits, y))
        return found if not crown else Margins(found.clean, found.ibp, _backwards(start, logits, y, trains=trains))


@torch.no_grad()
def certified_by_bounds(
    model: nn.Module, x: Tensor, eps: float, *, crown: bool = False, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Predict, and say for which images the prediction cannot change within linf `eps`.

    Args:
        model: Maps images to logits, in eval mode.
        x: Images, [N, C, H, W], of the model's own precision.
        eps: Radius.
        crown: As in `margins`.
        bounds: Range of the pixels.

    Returns:
        Classes, int64 [N], and whether they are proven, bool [N].

    Raises:
        UnsupportedModelError: See `margins`.
    """
    y: Tensor = model(x).argmax(1)
    found = margins(model, box(x, eps, bounds), y, crown=crown).best
    others = torch.ones_like(found, dtype=torch.bool).scatter_(1, y[:, None], False)
    return y, ((found > 0) | ~others).all(1)


def _bounded(model: nn.Module, images: Interval) -> Interval:
    try:
        logits = model(images)
    except NoRuleError as error:
        where = _where(model, error)
        raise UnsupportedModelError(
            f"this network cannot be bounded: {where}{error}; certify it by method 'smoothing', which takes any network"
        ) from error
    if not isinstance(logits, Interval) or logits.value.dim() != 2:
        raise UnsupportedModelError(
            "this network cannot be bounded: it must return logits [N, K] that depend on images"
        )
    return logits


def _where(model: nn.Module, error: BaseException) -> str:
    """The innermost layer that the error came through, to be put before what it says."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and names.get(id(owner)):
            found = f"layer {names[id(owner)]!r} ({type(owner).__name__}): "
    return found


def _by_intervals(logits: Interval, y: Tensor) -> Tensor:
    if logits.affine is None:
        found = logits.lower.gather(1, y[:, None]) - logits.upper
        return found.scatter(1, y[:, None], 0.0)
    last, weight, bias = logits.affine, logits.affine.weight, logits.affine.bias
    rows = weight[y][:, None, :] - weight  # [N, K, D]
    found = (rows @ last.centre[:, :, None] - rows.abs() @ last.radius[:, :, None]).squeeze(2)
    return found if bias is None else found + bias[y][:, None] - bias


def _backwards(images: Interval, logits: Interval, y: Tensor, *, trains: bool) -> Tensor:
    """See `BoundedReLU` for the formula; one backward pass for each of the K - 1 other classes."""
    assert logits.point is not None and images.point is not None and images.slack is not None
    below, above = images.lower - images.value, images.upper - images.value
    count = logits.point.shape[1]
    found = torch.zeros_like(logits.point)
    for shift in range(1, count):
        other = (y + shift) % count
        slope, gap = torch.autograd.grad(
            _lead(logits.point, y, other).sum(),
            (images.point, images.slack),
            retain_graph=trains or shift + 1 < count,
            create_graph=trains,
            materialize_grads=True,
        )
        worst = torch.where(slope >= 0, slope * below, slope * above).flatten(1).sum(1)
        found = found.scatter(1, other[:, None], (_lead(logits.value, y, other) - gap + worst)[:, None])
    return found if trains else found.detach()


def _lead(logits: Tensor, y: Tensor, other: Tensor) -> Tensor:
    return (logits.gather(1, y[:, None]) - logits.gather(1, other[:, None])).squeeze(1)
