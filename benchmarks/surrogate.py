"""A stand-in for training robust networks, to judge searchers by: what a shape is worth, in microseconds.

Networks are wide residual networks on 32x32 images: depths D1..D3 and widths W1..W3, multiples of 16/32/64 channels.
A configuration is a *shape*: depths, and widths up to one factor. The factor is chosen so that the network just meets
the budget, never above it, with no width over the teacher's; widths are multiples of 1/4. Shapes that come to the same
network are one evaluation.

Fitted to published points (`published`): the 16 rows of basic blocks that the RobustResNet repository tells (Huang et
al. 2022, arXiv 2212.11005; zhichao-lu/robust-residual-network), PGD-20 accuracy after TRADES on CIFAR-10, by least
squares, with a residual of 0.18 points:
    56.50 + 0.674 ln(GMACs) - 1.08 (ln(D3/D1) - ln .5)^2 - 2.51 (ln(W3/W1) - ln .5)^2
          - 0.09 (ln(sum D/sum W) - ln 7/3)^2
The rule of thumb has its optimum by construction: that it does well here proves nothing.

Invented, for lack of anything better: all else, the *family* of tasks (`draw_task`) above all. There the optimum moves
  visibly    with the attack and its radius (the last stage of clean networks at about 0.8 of the others, under
             AutoAttack at about 0.4, as RC-NAS's figure of topologies has them, arXiv 2406.06792), the teacher's depth,
             the budget and the teacher's Lipschitz constant: a policy can know all of these from the task
  invisibly  by an offset of each place, and by a rough surface of a few waves: nobody can know them before searching
and depends on the middle stage as well. The noise of an evaluation is normal, 0.25 points: about what seeds are apart.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robustcompress.search.domain import Config, Coordinate, Domain, Task, Token

DEPTH_SHARES = tuple(i / 8 for i in range(9))
WIDTH_SHARES = tuple((2 + i) / 10 for i in range(9))
NOISE = 0.25
"""Standard deviation of one evaluation, in points."""

STRENGTHS = {"clean": 0.0, "fgsm": 0.35, "pgd": 0.7, "cw": 0.85, "autoattack": 1.0}
LEVELS = {"clean": 85.0, "fgsm": 62.0, "pgd": 56.5, "cw": 53.9, "autoattack": 52.0}
DEPTHS = (4, 5, 7, 9, 11)
WIDTHS = (8, 10, 12, 14, 16)
_WAVES = 6
_QUARTERS = 4
_HALVINGS = 14

Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Where the optimum is, and how much is lost off it: squares of logarithms of ratios, in points.

    Attributes:
        places: Of ln(D3/D1), ln(W3/W1), ln(sum D/sum W), ln(D2/D1), ln(W2/W1).
        weights: What a distance of 1 from them costs.
        level: Points at 1 GMAC, at the optimum.
        slope: Points for every factor e of multiply-adds.
        waves: Rows of amplitude, phase, and 6 frequencies over the logarithms of depths and widths.
    """

    places: tuple[float, ...]
    weights: tuple[float, ...]
    level: float
    slope: float = 0.674
    waves: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateTask:
    """One thing to search for.

    Attributes:
        name: Tells it from others.
        depths: The teacher's blocks in its three stages.
        widths: Its widths.
        task: What a searcher may know.
        terms: What it may not.
    """

    name: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    task: Task
    terms: Terms

    @property
    def max_macs(self) -> float:
        """Multiply-adds that a network may have."""
        return self.task.budget * self.task.macs

    @property
    def domain(self) -> Domain:
        """What there is to choose."""
        coordinates = [
            Coordinate(stage, kind, DEPTH_SHARES if kind == "depth" else WIDTH_SHARES)
            for stage in range(3)
            for kind in ("depth", "width")
        ]
        tokens = [
            Token(1.0 if stage == 0 else 2.0, float(d), 16.0 * 2**stage * w)
            for stage, (d, w) in enumerate(zip(self.depths, self.widths, strict=True))
        ]
        return Domain(tuple(coordinates), tuple(tokens), self.task)

    def project(self, configs: Sequence[Config] | np.ndarray[Any, Any]) -> Numbers:
        """The networks of N configurations: depths and widths, `[N, 6]`; NaN where none meets the budget."""
        chosen = np.asarray(configs).reshape(-1, 6)
        teacher = np.array(self.widths, dtype=np.float64)
        depths = 1 + np.rint(np.array(DEPTH_SHARES)[chosen[:, 0::2]] * (np.array(self.depths) - 1))
        shape = np.array(WIDTH_SHARES)[chosen[:, 1::2]] * teacher
        low, high = np.zeros(len(chosen)), (teacher / shape).max(1)
        widths = _whole(high[:, None] * shape, teacher)
        over = macs(depths, widths, self.task.classes) > self.max_macs
        for _ in range(_HALVINGS):
            middle = np.where(over, (low + high) / 2, high)
            fits = macs(depths, _whole(middle[:, None] * shape, teacher), self.task.classes) <= self.max_macs
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        widths = _whole(low[:, None] * shape, teacher)
        found = np.concatenate([depths, widths], 1)
        found[macs(depths, widths, self.task.classes) > self.max_macs] = np.nan
        return found

    def project_one(self, config: Config) -> tuple[float, ...] | None:
        """As `project`, of one configuration, without arrays: an order of magnitude faster for it; None for NaN."""
        depths = [1 + round(DEPTH_SHARES[o] * (d - 1)) for o, d in zip(config[0::2], self.depths, strict=True)]
        shape = [WIDTH_SHARES[o] * w for o, w in zip(config[1::2], self.widths, strict=True)]
        limit, classes = self.max_macs, self.task.classes

        def widths(factor: float) -> list[float]:
            floors = (math.floor(factor * s * _QUARTERS + 1e-9) / _QUARTERS for s in shape)
            return [min(max(f, 1 / _QUARTERS), float(w)) for f, w in zip(floors, self.widths, strict=True)]

        low, high = 0.0, max(w / s for w, s in zip(self.widths, shape, strict=True))
        if macs_one(depths, widths(high), classes) <= limit:
            low = high
        else:
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                if macs_one(depths, widths(middle), classes) <= limit:
                    low = middle
                else:
                    high = middle
        found = widths(low)
        return (*map(float, depths), *found) if macs_one(depths, found, classes) <= limit else None

    def worth(self, networks: Numbers) -> Numbers:
        """True values of networks `[N, 6]`, in points, `[N]`."""
        depths, widths = networks[:, :3], networks[:, 3:]
        terms = self.terms
        d, w = np.log(depths), np.log(widths)
        ratios = np.stack(
            [
                d[:, 2] - d[:, 0],
                w[:, 2] - w[:, 0],
                np.log(depths.sum(1) / widths.sum(1)),
                d[:, 1] - d[:, 0],
                w[:, 1] - w[:, 0],
            ],
            1,
        )
        value = terms.level + terms.slope * np.log(macs(depths, widths, self.task.classes) / 1e9)
        value -= ((ratios - np.array(terms.places)) ** 2 * np.array(terms.weights)).sum(1)
        for amplitude, phase, *frequencies in terms.waves:
            value += amplitude * np.cos(phase + np.concatenate([d, w], 1) @ np.array(frequencies))
        return np.asarray(value)

    def optimum(self) -> float:
        """The best true value there is: all 9^6 configurations."""
        grid = np.array(list(itertools.product(range(9), repeat=6)), dtype=np.int64)
        return max(float(np.nanmax(self.worth(self.project(part)))) for part in np.array_split(grid, 16))


class Evaluator:
    """Evaluates configurations of one task with noise; the same network always gets the same score.

    Args:
        task: What is searched for.
        seed: Of the noise, which depends on it and the network alone, not on the order of evaluations.
    """

    def __init__(self, task: SurrogateTask, seed: int) -> None:
        self.task = task
        self.seed = seed
        self.scores: dict[tuple[float, ...], float] = {}
        self._known: dict[Config, tuple[tuple[float, ...], float]] = {}

    def __call__(self, config: Config) -> float:
        """The noisy score as an accuracy in [0, 1]; -1 where no network meets the budget."""
        network, value = self.network(config)
        if math.isnan(value):
            return -1.0
        if network not in self.scores:
            self.scores[network] = (value + NOISE * self._normal(network, "search")) / 100
        return self.scores[network]

    @property
    def unique(self) -> int:
        """How many networks were evaluated."""
        return len(self.scores)

    def network(self, config: Config) -> tuple[tuple[float, ...], float]:
        """The network that a configuration stands for, and its true value in points."""
        if config not in self._known:
            network = self.task.project_one(config)
            self._known[config] = ((), math.nan) if network is None else (network, self.value(network))
        return self._known[config]

    def again(self, network: tuple[float, ...], draws: int) -> float:
        """Score a network anew: the mean of fresh evaluations, as an accuracy."""
        value = self.value(network)
        return (value + NOISE * math.fsum(self._normal(network, f"again {i}") for i in range(draws)) / draws) / 100

    def value(self, network: tuple[float, ...]) -> float:
        """The true value of a network, in points."""
        return float(self.task.worth(np.array([network]))[0])

    def _normal(self, network: tuple[float, ...], purpose: str) -> float:
        return random.Random(f"{self.task.name} {self.seed} {network} {purpose}").gauss(0, 1)


def macs(depths: Numbers, widths: Numbers, classes: int = 10) -> Numbers:
    """Multiply-adds of wide residual networks on 32x32 images, convolutions and the classifier: `[N]`.

    Args:
        depths: Blocks of two convolutions in the three stages, `[N, 3]`.
        widths: Multiples of 16/32/64 channels, `[N, 3]`.
        classes: Of the classifier.
    """
    before: Any = 16.0
    total: Any = 3 * 16 * 9 * 1024.0
    for stage, pixels in enumerate((1024.0, 256.0, 64.0)):
        channels = widths[:, stage] * (16 * 2**stage)
        shortcut = (channels != before) | (stage > 0)
        total = total + pixels * before * channels * (9 + shortcut)
        total = total + pixels * 9 * channels**2 * (2 * depths[:, stage] - 1)
        before = channels
    return np.asarray(total + before * classes)


def macs_one(depths: Sequence[float], widths: Sequence[float], classes: int = 10) -> float:
    """As `macs`, of one network."""
    total, before = 3 * 16 * 9 * 1024.0, 16.0
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        channels, pixels = width * (16 << stage), 1024 >> 2 * stage
        shortcut = stage > 0 or channels != before
        total += pixels * channels * (before * (9 + shortcut) + 9 * channels * (2 * depth - 1))
        before = channels
    return total + before * classes


def published(budget_gmacs: float = 5.3, depth: int = 18, width: int = 16) -> SurrogateTask:
    """The task whose values are fitted to published points: a large teacher, cut to the cost of WRN-28-10."""
    places = (math.log(0.5), math.log(0.5), math.log(7 / 3), 0.0, 0.0)
    terms = Terms(places=places, weights=(1.08, 2.51, 0.09, 0.0, 0.0), level=56.50)
    depths, widths = (depth,) * 3, (width,) * 3
    total = _teacher_macs(depths, widths)
    task = Task(budget_gmacs * 1e9 / total, total, 10, "pgd", 8 / 255, 0.86, 0.57, 3.0)
    return SurrogateTask(name="published", depths=depths, widths=widths, task=task, terms=terms)


def draw_task(number: int, *, held_out: bool, rough: float = 0.1, hidden: float = 0.15) -> SurrogateTask:
    """A task of the invented family, by its number.

    Args:
        number: Which; each has an attack, a radius, a teacher, a budget and hidden parts of its own.
        held_out: Whether it is one to report on. A third of the teachers are seen in such tasks alone.
        rough: Amplitude of each of the waves, in points.
        hidden: Standard deviation of the hidden offsets of the optimum's place.
    """
    name = f"{'held-out' if held_out else 'training'} {number}"
    dice = random.Random(name)
    teachers = [
        (d, w)
        for (i, d), (j, w) in itertools.product(enumerate(DEPTHS), enumerate(WIDTHS))
        if held_out == ((i + j) % 3 == 0)
    ]
    depth, width = dice.choice(teachers)
    attack, eps = dice.choice(list(STRENGTHS)), dice.choice((4, 8))
    budget, lipschitz = math.exp(dice.uniform(math.log(0.1), math.log(0.6))), dice.uniform(2, 4)
    strength = STRENGTHS[attack] * (0.7 + 0.3 * eps / 8)
    deep = math.log(depth / 7)
    places = (
        math.log(0.8) - 0.9 * strength + 0.3 * deep,
        math.log(0.8) - 0.8 * strength - 0.15 * (lipschitz - 3),
        math.log(7 / 3) + 0.3 * math.log(budget / 0.25),
        0.1 - 0.2 * strength,
        math.log(1.25) * strength,
    )
    offsets = [dice.gauss(0, hidden) for _ in places]
    waves = [
        (dice.uniform(0, rough), dice.uniform(0, 2 * math.pi), *(dice.gauss(0, 3) for _ in range(6)))
        for _ in range(_WAVES)
    ]
    terms = Terms(
        places=tuple(place + offset for place, offset in zip(places, offsets, strict=True)),
        weights=(1.08, 2.51, 0.3, 0.5, 1.0),
        level=LEVELS[attack] + (8 - eps) * 2.0 * (attack != "clean"),
        waves=tuple(waves),
    )
    depths, widths = (depth,) * 3, (width,) * 3
    total = _teacher_macs(depths, widths)
    task = Task(budget, total, 10, attack, eps / 255, 0.86, terms.level / 100, lipschitz)
    return SurrogateTask(name=name, depths=depths, widths=widths, task=task, terms=terms)


def _teacher_macs(depths: Sequence[int], widths: Sequence[int]) -> float:
    return float(macs(np.array([depths], dtype=np.float64), np.array([widths], dtype=np.float64))[0])


def _whole(widths: Numbers, teacher: Numbers) -> Numbers:
    """Rounded down to quarters, at least one, at most the teacher's."""
    return np.clip(np.floor(widths * _QUARTERS + 1e-9) / _QUARTERS, 1 / _QUARTERS, teacher)
