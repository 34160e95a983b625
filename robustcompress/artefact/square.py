"""The Square attack (Andriushchenko et al. 2020) on anything that gives scores: it needs no gradient and misses none.

Written for files: every query is an image that the file can be fed as it is, in the ball after rounding too; and each
image has random numbers of its own, so that results depend neither on the batch nor on where a stopped run went on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustcompress.robust import ThreatModel
from robustcompress.robust.attacks import losses

QUERIES = 1000
"""By default. The published attack has 5,000 in AutoAttack and 10,000 in its paper."""

FIRST = 0.8
"""Share of the image that the first squares cover (p of the paper; AutoAttack's value)."""

HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries of 10,000 after which that share is halved; in proportion for other budgets (section 5.1 of the paper)."""

_TINY = 1e-12

Scores = Callable[[Tensor], Tensor]
Within = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SquareOutcome:
    """What became of some images.

    Attributes:
        x_adv: The image of lowest margin found, [N, C, H, W]; it breaks the model where `correct` is false.
        correct: Whether no query broke it: bool [N].
        queries: Queries spent on each: int64 [N].
    """

    x_adv: Tensor
    correct: Tensor
    queries: Tensor


def square(
    scores: Scores,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    queries: int = QUERIES,
    seed: int = 0,
    indices: Tensor | None = None,
    within: Within | None = None,
) -> SquareOutcome:
    """Search for adversarial images by changing squares at random, keeping what lowers the margin.

    Algorithm 1 with the sampling of algorithm 2 (linf) or 3 (l2), on the margin loss, untargeted. An image leaves the
    batch once it is misclassified.

    Args:
        scores: Maps images [n, C, H, W] to scores [n, K] of which the largest is the answer.
        x: Images within `threat.bounds`, on the CPU.
        y: True labels, int64 [N].
        threat: What the adversary may do.
        queries: Most scores asked for one image.
        seed: Together with an image's index it decides all its random numbers.
        indices: A number for each image, int64 [N]; its place where None.
        within: Brings images [n, C, H, W] into the ball around originals [n, C, H, W], as they will be fed; the
            threat's own projection where None.
    """
    bring = within or threat.project
    indices = torch.arange(len(x)) if indices is None else indices
    begin = _stripes if threat.norm == "linf" else _tiles
    propose = _propose_linf if threat.norm == "linf" else _propose_l2
    channels = x.shape[1]
    starts, draws = [], []
    for index in indices.tolist():
        generator = generator_of(seed, index)
        starts.append(begin(x.shape[1:], generator))
        draws.append(torch.rand(max(0, queries - 1), 5 + channels, generator=generator))
    best = bring(x + threat.eps * torch.stack(starts), x) if len(x) else x.clone()
    right, margins = _judged(scores, best, y)
    spent = torch.ones(len(x), dtype=torch.int64)
    standing = right.nonzero().flatten()
    for query in range(1, queries):
        if not len(standing):
            break
        side = _side(query, queries, x.shape[-2:], threat)
        random = torch.stack([draws[i][query - 1] for i in standing.tolist()])
        origin = x[standing]
        trial = bring(propose(best[standing], origin, random, side, threat), origin)
        still, found = _judged(scores, trial, y[standing])
        better = (found < margins[standing]) | ~still
        best[standing[better]], margins[standing[better]] = trial[better], found[better]
        spent[standing] += 1
        right[standing] = still
        standing = standing[still]
    return SquareOutcome(best, right, spent)


def generator_of(seed: int, index: int) -> torch.Generator:
    """A generator for one image; torch's own takes the lower 32 bits of a seed, so that both are mixed first."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _judged(scores: Scores, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the answers are right, bool [n], and how far the true class leads, [n]."""
    if not len(x):
        return torch.ones(0, dtype=torch.bool), x.new_empty(0)
    found = scores(x).float()
    return found.argmax(1) == y, -losses(found, y, loss="margin")


def _side(query: int, queries: int, size: torch.Size, threat: ThreatModel) -> int:
    """Length of the square at this query."""
    when = int((query - 1) / queries * 10_000)  # the first square comes before the first halving
    share = FIRST / 2 ** sum(when > step for step in HALVED_AT)
    side = max(round(math.sqrt(share * size.numel())), 1)
    if threat.norm == "l2":  # its pattern has two halves around a middle line
        side = max(side, 3) + (max(side, 3) % 2 == 0)
    return int(min(side, *size))


def _stripes(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Vertical stripes of a random sign each: where linf begins (section 3.3)."""
    channels, height, width = shape
    return _signs(torch.rand(channels, 1, width, generator=generator)).expand(-1, height, -1)


def _propose_linf(best: Tensor, x: Tensor, random: Tensor, side: int, threat: ThreatModel) -> Tensor:
    """One square at the edge of the ball, one sign for each channel (algorithm 2)."""
    inside = _mask(best, random[:, 0], random[:, 1], side)
    return torch.where(inside, x + threat.eps * _signs(random[:, 5:, None, None]), best)


def _tiles(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The l2 pattern, tiled 5 by 5, of norm 1: where l2 begins."""
    channels, height, width = shape
    side = max(1, min(height, width) // 5)
    pattern = _pattern(side)
    rows, columns = height // side, width // side
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    delta = torch.zeros(shape)
    for row in range(rows):
        for column in range(columns):
            random = torch.rand(1 + channels, generator=generator)
            tile = pattern if random[0] > 0.5 else pattern.T
            at = (
                slice(top + row * side, top + (row + 1) * side),
                slice(left + column * side, left + (column + 1) * side),
            )
            delta[:, at[0], at[1]] = _signs(random[1:, None, None]) * tile
    return _unit(delta)


def _propose_l2(best: Tensor, x: Tensor, random: Tensor, side: int, threat: ThreatModel) -> Tensor:
    """Move the budget of one window, and what is left of it, into another (algorithm 3)."""
    delta = best - x
    first, second = (_mask(delta, random[:, at], random[:, at + 1], side) for at in (0, 2))
    rows, columns = _window(delta, random[:, 0], random[:, 1], side)
    batch = torch.arange(len(delta))[:, None, None, None]
    channel = torch.arange(delta.shape[1])[None, :, None, None]
    old = delta[batch, channel, rows, columns]
    freed = _norm(delta * (first | second))
    pattern = _pattern(side)
    turned = torch.where(random[:, 4, None, None, None] > 0.5, pattern, pattern.T)
    new = turned * _signs(random[:, 5:, None, None]) + old / _norm(old).clamp_min(_TINY)
    unused = (threat.eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / delta.shape[1]
    new = new / _norm(new).clamp_min(_TINY) * (unused + freed.square()).sqrt()
    delta = delta.masked_fill(second, 0.0)
    delta[batch, channel, rows, columns] = new
    whole = delta.square().sum((1, 2, 3), keepdim=True).sqrt()
    return x + delta / whole.clamp_min(_TINY) * threat.eps


def _pattern(side: int) -> Tensor:
    """Two hills of opposite sign, one above the other, of norm 1: [side, side] (eta of section 3.4)."""
    half = side // 2
    pattern = torch.cat([_hill(half, side), -_hill(side - half, side)])
    return _unit(pattern)


def _hill(height: int, width: int) -> Tensor:
    """Values that fall with the distance d from the middle, as the sum of 1 / k^2 over k > d; of norm 1."""
    if not height:
        return torch.zeros(0, width)
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    distance = torch.maximum(rows.abs()[:, None], columns.abs()[None, :])
    reach = max(height, width) // 2 + 1
    terms = 1 / torch.arange(1, reach + 1, dtype=torch.float32).square()
    hill = terms.flip(0).cumsum(0).flip(0)[distance]
    return _unit(hill)


def _unit(values: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(values)
    return values / size.clamp_min(_TINY)


def _window(images: Tensor, top: Tensor, left: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Rows [n, 1, side, 1] and columns [n, 1, 1, side] of a square for each image, from numbers in [0, 1)."""
    height, width = images.shape[-2:]
    along = torch.arange(side)
    rows = (top * (height - side + 1)).long().clamp_max(height - side)[:, None] + along
    columns = (left * (width - side + 1)).long().clamp_max(width - side)[:, None] + along
    return rows[:, None, :, None], columns[:, None, None, :]


def _mask(images: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    """Which pixels lie in the square: bool [n, 1, H, W]."""
    rows, columns = _window(images, top, left, side)
    height, width = (torch.arange(size) for size in images.shape[-2:])
    in_rows = (height[:, None] >= rows[:, :, :1]) & (height[:, None] <= rows[:, :, -1:])
    return in_rows & (width >= columns[..., :1]) & (width <= columns[..., -1:])


def _signs(random: Tensor) -> Tensor:
    return torch.where(random < 0.5, -1.0, 1.0)


def _norm(images: Tensor) -> Tensor:
    """The l2 norm of each channel, [n, C, 1, 1]."""
    return images.square().sum((2, 3), keepdim=True).sqrt()
