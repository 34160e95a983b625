"""A strong attack for a fraction of AutoAttack's passes: short targeted APGD runs on what still stands.

Each image runs on its own track: a short APGD run on the cross-entropy, then one after the other on targeted losses,
the nearest wrong class first. An image leaves as soon as it is broken, or as soon as its numbers say that it will not
be; the next one takes its place, so that the network always sees full batches.

From the papers: APGD's momentum and step sizes, and the targeted DLR loss (Croce and Hein 2020, algorithm 1 and
equation 3 of the supplement); starts that first push the logits in a drawn direction, which is told to lower the true
class and raise the target (output diversified sampling: Tashiro et al. 2020; told so: Liu et al. 2022, "Practical
Evaluation of Adversarial Robustness via Adaptive Auto Attack", arXiv 2203.05154: its adaptive direction
initialisation); giving up images that no restart would break (its online statistics-based discarding).
Reconstructed: that paper ranks the images of a batch by their loss and tells directions from what succeeded on others;
here each image is judged by its own numbers alone, so that what happens to it depends neither on which images are
beside it nor on their order, but for the rounding of the network's own batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from robustcompress.errors import Problems
from robustcompress.robust.threat import ThreatModel

PASSES = 150
"""Gradient passes that an image gets at most: where more of them found next to nothing, see benchmarks/README.md."""
_FIRST, _LATER = 20, 15  # steps of the run on the cross-entropy, and of each targeted one
_DIVERSE = 3  # steps along a drawn direction of the logits before a targeted run
_MOMENTUM, _RISES = 0.75, 0.75  # APGD's alpha and rho
_GIVE_UP = 1.0
"""An image is given up after a targeted run if more of its margin is left than this many times what was taken away.

Not after the first run: where the cross-entropy saturates, its gradient is zero and says nothing."""
_TINY = 1e-12


@dataclass(slots=True)
class _Tracks:
    """Where the images stand that are attacked together; row i of each tensor is one image.

    Attributes:
        index: Which image of the call it is.
        x: The image.
        y: Its label.
        adv: Where the network looks next.
        before: Where it looked last.
        top: Point of the highest loss of this run, where halving the step goes back to.
        top_grad: Gradient there.
        top_loss: Loss there.
        closest: Point of the smallest margin of all runs.
        margin: Smallest margin so far: the true logit minus the largest other one.
        clean: Margin of the image itself.
        near: Logits at `closest`, [N, K].
        tried: Classes that were a target in this round of targets, and the true one, [N, K].
        target: Class that this run aims at.
        direction: Weights of the logits while the start is made, [N, K].
        step: Present step length.
        last_loss: Loss one step ago.
        check_loss: `top_loss` at the last checkpoint.
        halved: Whether the step was halved there.
        rises: Steps since then at which the loss rose.
        since: Steps since then.
        period: Steps from there to the next checkpoint.
        at: Step of this run; negative while the start is made.
        run: Number of the run.
        left: Passes left.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    adv: Tensor
    before: Tensor
    top: Tensor
    top_grad: Tensor
    top_loss: Tensor
    closest: Tensor
    margin: Tensor
    clean: Tensor
    near: Tensor
    tried: Tensor
    target: Tensor
    direction: Tensor
    step: Tensor
    last_loss: Tensor
    check_loss: Tensor
    halved: Tensor
    rises: Tensor
    since: Tensor
    period: Tensor
    at: Tensor
    run: Tensor
    left: Tensor

    def rows(self, which: Tensor) -> Self:
        """Only these images."""
        return replace(self, **{field.name: getattr(self, field.name)[which] for field in fields(self)})

    def joined(self, other: Self) -> Self:
        """These images and those."""
        names = [field.name for field in fields(self)]
        return replace(self, **{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names})


def apgd_fast(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    passes: int = PASSES,
    seed: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Attack with short APGD runs, first on the cross-entropy, then towards one wrong class after the other.

    Not a replacement of AutoAttack: it uses gradients alone, so a network that masks them looks robust, and images that
    it gives up are not looked at again. More passes only add to what fewer do.

    Args:
        model: Maps images [N, C, H, W] to at least two logits [N, K], each image by itself (eval mode). Neither its
            mode nor its `.grad` is touched.
        x: Images within `threat.bounds`.
        y: True labels, int64 [N].
        threat: What the adversary may do.
        passes: Gradient passes that an image gets at most, beside one forward pass to begin with.
        seed: Seed of all random numbers. Those of an image depend on it and on the image's own values.
        batch_size: Images that the network sees at once; None for all.

    Returns:
        Attacked images, detached, in the ball and the bounds, memory format of `x`: of images that were broken the
        point that did it, of the others the one where the true class led by least.

    Raises:
        InputError: A count is not a whole number of at least one.
    """
    problems = Problems("this attack cannot run")
    for name, count in (("passes", passes), ("batch_size", batch_size)):
        if count is None and name == "batch_size":
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            problems.add(f"{name}={count!r}: give a whole number, at least 1")
    problems.raise_if_any()
    with torch.inference_mode(False), torch.no_grad():
        x, y = (tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in (x, y))
        return _run(model, x, y, threat, passes, seed, batch_size or max(len(x), 1))


def _run(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: ThreatModel, passes: int, seed: int, size: int
) -> Tensor:
    found = x.clone()
    tracks: _Tracks | None = None
    waiting = 0
    while waiting < len(x) or (tracks is not None and len(tracks.index)):
        free = size - (0 if tracks is None else len(tracks.index))
        # A quarter of a batch is waited for, so that beginners do not trickle in one by one.
        if waiting < len(x) and (free >= size / 4 or tracks is None):
            index = torch.arange(waiting, min(waiting + free, len(x)), device=x.device)
            waiting += len(index)
            beginners = _begin(model, index, x[index], y[index], threat, passes, seed)
            tracks = beginners if tracks is None else tracks.joined(beginners)
        assert tracks is not None
        done = _advance(model, tracks, threat, seed)
        found[tracks.index[done]] = tracks.closest[done]
        if bool(done.any()):
            tracks = tracks.rows(~done)
    return found


def _begin(
    model: Callable[[Tensor], Tensor],
    index: Tensor,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    passes: int,
    seed: int,
) -> _Tracks:
    logits = model(x).float()
    margin = _margins(logits, y)
    zero = torch.zeros_like(y)
    low = torch.full_like(margin, -torch.inf)
    tracks = _Tracks(
        index=index,
        x=x,
        y=y,
        adv=x,
        before=x,
        top=x,
        top_grad=torch.zeros_like(x),
        top_loss=low,
        closest=x,
        margin=margin,
        clean=margin,
        near=logits,
        tried=F.one_hot(y, logits.shape[1]).bool(),
        target=zero,
        direction=torch.zeros_like(logits),
        step=torch.zeros_like(margin),
        last_loss=low,
        check_loss=low,
        halved=zero.bool(),
        rises=zero,
        since=zero,
        period=zero,
        at=zero,
        run=zero - 1,
        left=zero + passes,
    )
    # Fresh tensors: several of the above are one and the same.
    tracks = tracks.rows(torch.arange(len(x), device=x.device))
    _next_run(tracks, torch.ones_like(tracks.halved), threat, seed)
    return tracks


def _advance(model: Callable[[Tensor], Tensor], t: _Tracks, threat: ThreatModel, seed: int) -> Tensor:
    """Look once at each image and move it on; tell which are done: broken, given up or out of passes."""
    with torch.enable_grad():
        point = t.adv.detach().requires_grad_()
        logits = model(point).float()
        loss = _losses(logits, t)
        grad = torch.autograd.grad(loss.sum(), point)[0]
    logits, loss, grad = logits.detach(), loss.detach(), torch.nan_to_num(grad, 0.0, 0.0, 0.0)
    t.left -= 1
    margin = _margins(logits, t.y)
    nearer = margin < t.margin
    t.closest = _where(nearer, t.adv, t.closest)
    t.near = _where(nearer, logits, t.near)
    t.margin = torch.where(nearer, margin, t.margin)

    running = t.at >= 0
    higher = running & (loss > t.top_loss)
    t.top, t.top_grad = _where(higher, t.adv, t.top), _where(higher, grad, t.top_grad)
    t.top_loss = torch.where(higher, loss, t.top_loss)
    moved = t.at > 0
    t.rises += (moved & (loss > t.last_loss)).long()
    t.since += moved.long()
    t.check_loss = torch.where(t.at == 0, loss, t.check_loss)
    t.last_loss = torch.where(running, loss, t.last_loss)

    here, grad = _checkpoint(t, grad)
    direction = threat.ascend(torch.zeros_like(grad), grad, 1.0)
    length = torch.where(running, t.step, torch.full_like(t.step, threat.eps))
    ahead = threat.project(here + _wide(length, here) * direction, t.x)
    share = _wide(torch.where(moved, _MOMENTUM, 1.0).to(here.dtype), here)
    onward = threat.project(here + share * (ahead - here) + (1 - share) * (here - t.before), t.x)
    t.before, t.adv = here, onward
    t.at += 1

    broken = margin < 0
    ended = t.at >= torch.where(t.run == 0, _FIRST, _LATER)
    hopeless = ended & (t.run > 0) & (t.margin > _GIVE_UP * (t.clean - t.margin))
    done = broken | hopeless | (t.left <= 0)
    _next_run(t, ended & ~done, threat, seed)
    return done


def _checkpoint(t: _Tracks, grad: Tensor) -> tuple[Tensor, Tensor]:
    """APGD's checkpoints: where the loss rose too seldom, halve the step and go on from the best point."""
    due = (t.since >= t.period) & (t.at > 0)
    stuck = ~t.halved & (t.top_loss <= t.check_loss)
    halve = due & ((t.rises <= _RISES * t.period) | stuck)
    t.halved = torch.where(due, halve, t.halved)
    t.check_loss = torch.where(due, t.top_loss, t.check_loss)
    t.step = torch.where(halve, t.step / 2, t.step)
    t.period = torch.where(due, (t.period - 1).clamp_min(2), t.period)
    t.since, t.rises = t.since.masked_fill(due, 0), t.rises.masked_fill(due, 0)
    return _where(halve, t.top, t.adv), _where(halve, t.top_grad, grad)


def _next_run(t: _Tracks, which: Tensor, threat: ThreatModel, seed: int) -> None:
    """Put these images at the start of their next run."""
    rows = which.nonzero().flatten()
    if not len(rows):
        return
    t.run[rows] += 1
    later = t.run[rows] > 0
    classes = t.near.shape[1]
    fresh = t.tried[rows].all(1)
    # All wrong classes had their turn: another round of them.
    t.tried[rows[fresh]] = F.one_hot(t.y[rows[fresh]], classes).bool()
    target = t.near[rows].masked_fill(t.tried[rows], -torch.inf).argmax(1)
    t.target[rows] = target
    t.tried[rows[later], target[later]] = True
    start, direction = _drawn(t.x[rows], t.run[rows], threat, classes, seed)
    direction.scatter_(1, t.y[rows, None], -1.0).scatter_(1, target[:, None], 1.0)
    t.adv[rows] = t.before[rows] = start
    t.direction[rows] = direction.to(t.direction)
    t.top_loss[rows] = t.last_loss[rows] = t.check_loss[rows] = -torch.inf
    t.step[rows] = 2 * threat.eps
    t.halved[rows] = True  # as APGD begins: the first checkpoint looks at the rises alone
    t.rises[rows] = t.since[rows] = 0
    t.period[rows] = torch.where(later, round(0.22 * _LATER) + 1, round(0.22 * _FIRST) + 1)
    t.at[rows] = torch.where(later, -_DIVERSE, 0)


def _drawn(x: Tensor, runs: Tensor, threat: ThreatModel, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """A point of each image's ball and a direction of its logits, from random numbers of its own."""
    starts, directions = [], []
    for image, run in zip(x, runs.tolist(), strict=True):
        # Bytes in the order of the indices, whatever the memory format.
        values = image.detach().cpu().contiguous().numpy().tobytes()
        digest = hashlib.blake2b(values + f"{seed} {run}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        starts.append(threat.random_start(image[None], generator))
        directions.append(torch.empty(classes).uniform_(-1, 1, generator=generator))
    return torch.cat(starts), torch.stack(directions).to(x.device)


def _losses(logits: Tensor, t: _Tracks) -> Tensor:
    """What each image climbs at present, [N]."""
    true = logits.gather(1, t.y[:, None]).squeeze(1)
    aimed = logits.gather(1, t.target[:, None]).squeeze(1) - true
    if logits.shape[1] >= 4:  # with fewer classes the DLR loss is not defined, and the margin itself is climbed
        ranked = logits.topk(4, dim=1).values
        aimed = aimed / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + _TINY)
    found = torch.where(t.run == 0, F.cross_entropy(logits, t.y, reduction="none"), aimed)
    return torch.where(t.at < 0, (t.direction * logits).sum(1), found)


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    """The true logit minus the largest other one: negative where the network is wrong."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return true - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def _where(which: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(_wide(which, yes), yes, no)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
