"""Runs of searchers on the surrogate, counted in unique evaluations, and intervals for what they found."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.surrogate import Evaluator, SurrogateTask, draw_task
from robustcompress.search.domain import Domain
from robustcompress.search.meta import meta_train
from robustcompress.search.policy import Policy
from robustcompress.search.searcher import Searcher

TOP = 5
"""How many of the best by their noisy scores are evaluated anew before one is chosen."""

DRAWS = 4
"""Fresh evaluations of each of these."""

PATIENCE = 500
"""Proposals of nothing new after which a search is over."""

TRAINING_TASKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one search found.

    Attributes:
        found: By number of unique evaluations, the true value in points of the one chosen then.
        best: After each unique evaluation, the true value of the best by its noisy score.
        unique: Unique evaluations made.
        asks: Configurations proposed.
    """

    found: dict[int, float]
    best: list[float]
    unique: int
    asks: int


def race(task: SurrogateTask, searcher: Searcher, seed: int, checkpoints: Sequence[int]) -> Run:
    """Search until the last checkpoint, or until nothing new is proposed; later ones then hold what was found by then.

    The same network gets the same score whoever proposes it, so that searchers with the same seed meet the same noise.
    """
    evaluate = Evaluator(task, seed)
    found: dict[int, float] = {}
    best: list[float] = []
    highest, idle, asks = -2.0, 0, 0
    while evaluate.unique < checkpoints[-1] and idle < PATIENCE:
        before = evaluate.unique
        config = searcher.ask()
        score = evaluate(config)
        searcher.tell(config, score)
        asks, idle = asks + 1, idle + 1
        if evaluate.unique > before:
            idle = 0
            if score > highest:
                highest, value = score, evaluate.network(config)[1]
            best.append(value)
            if evaluate.unique in checkpoints:
                found[evaluate.unique] = choose(evaluate)
    chosen = choose(evaluate)
    best += best[-1:] * (checkpoints[-1] - len(best))
    return Run(found={n: found.get(n, chosen) for n in checkpoints}, best=best, unique=evaluate.unique, asks=asks)


def choose(evaluate: Evaluator) -> float:
    """The true value of the best by fresh evaluations, among the `TOP` by the scores of the search."""
    top = sorted(evaluate.scores, key=lambda network: evaluate.scores[network], reverse=True)[:TOP]
    network = max(top, key=lambda network: evaluate.again(network, DRAWS))
    return evaluate.value(network)


def trained_policy(
    seed: int, rounds: int, *, blind: bool = False, tasks: int = TRAINING_TASKS, **options: Any
) -> Policy:
    """A policy meta-trained on training tasks; a blind one is shown the same domain for all of them."""
    drawn = {task.name: task for task in (draw_task(i, held_out=False) for i in range(tasks))}
    domains = {name: unseen(task.domain) if blind else task.domain for name, task in drawn.items()}
    evaluators = {name: Evaluator(task, seed) for name, task in drawn.items()}
    names = list(drawn)

    def sample(generator: torch.Generator) -> tuple[str, Domain]:
        name = names[int(torch.randint(len(names), (), generator=generator))]
        return name, domains[name]

    policy = Policy(seed=seed)
    meta_train(policy, sample, lambda name, config: evaluators[name](config), rounds, seed=seed, **options)
    return policy


def unseen(domain: Domain) -> Domain:
    """The domain with the task and the tokens of another one, the same for all."""
    shown = draw_task(0, held_out=False).domain
    return dataclasses.replace(domain, task=shown.task, tokens=shown.tokens)


def interval(values: Sequence[float], *, resamples: int = 2000) -> dict[str, float]:
    """Mean, and the 95 % interval of its bootstrap (percentiles)."""
    dice = random.Random(0)
    means = sorted(statistics.fmean(dice.choices(values, k=len(values))) for _ in range(resamples))
    low, high = means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]
    return {"mean": round(statistics.fmean(values), 4), "low": round(low, 4), "high": round(high, 4), "n": len(values)}


def shown(found: Mapping[str, float], *, signed: bool = False) -> str:
    """Such as `0.12 [0.05, 0.20]`."""
    form = "{:+.2f}" if signed else "{:.2f}"
    return f"{form.format(found['mean'])} [{form.format(found['low'])}, {form.format(found['high'])}]"
