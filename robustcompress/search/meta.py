"""The upper of RC-NAS's two levels: one policy trained on many tasks, to be fine-tuned on one.

The paper (see `policy`) names meta-training on tasks drawn at random (attack, data, teacher) and fine-tuning on the
target. That the upper level is plain training over tasks, with no inner loop, is how we read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from robustcompress.search.choices import at_least, seeded
from robustcompress.search.domain import Config, Domain
from robustcompress.search.gradient import Baseline, loss
from robustcompress.search.policy import Policy

Sample = Callable[[torch.Generator], tuple[str, Domain]]
"""Draws a task: its name, and what there is to choose."""

Evaluate = Callable[[str, Config], float]
"""The reward of a choice in the task of that name."""


def meta_train(
    policy: Policy,
    sample_task: Sample,
    evaluate: Evaluate,
    rounds: int,
    *,
    choices: int = 5,
    lr: float = 3e-3,
    entropy: float = 0.3,
    baseline: float = 0.9,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Train a policy in place: each round draws a task and makes one step of REINFORCE on a few choices there.

    Rewards differ in level and spread from task to task, so that each task has its own moving average, by its name, and
    advantages are over the spread of their round. The same seed gives the same weights.

    Args:
        policy: Trained in place.
        sample_task: Draws a task.
        evaluate: Tells the reward of a choice in a task.
        rounds: How many steps.
        choices: How many to a step.
        lr: Of Adam.
        entropy: Weight of the entropy bonus.
        baseline: Weight of the past in the moving averages.
        seed: Of the tasks and choices drawn.

    Returns:
        For each round the "task" and the mean "reward" of its choices.
    """
    at_least("meta_train() cannot start", 1, choices=choices)
    at_least("meta_train() cannot start", 0, rounds=rounds, lr=lr, entropy=entropy)
    generator = seeded(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    baselines: dict[str, Baseline] = {}
    records: list[dict[str, Any]] = []
    for _ in range(rounds):
        name, domain = sample_task(generator)
        configs = _choices(policy, domain, choices, generator)
        rewards = [evaluate(name, config) for config in configs]
        advantages = baselines.setdefault(name, Baseline(baseline)).advantages(rewards)
        optimizer.zero_grad()
        torch.autograd.backward(loss(policy, domain, configs, advantages, entropy))
        optimizer.step()
        records.append({"task": name, "reward": sum(rewards) / choices})
    return records


@torch.no_grad()
def _choices(policy: Policy, domain: Domain, count: int, generator: torch.Generator) -> list[Config]:
    columns = [torch.multinomial(log.exp(), count, True, generator=generator).tolist() for log in policy(domain)]
    return list(zip(*columns, strict=True))
