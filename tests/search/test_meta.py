"""Meta-training: deterministic, per-task baselines, and worth it where tasks are alike."""

from __future__ import annotations

import statistics

import pytest
import torch

from robustcompress.errors import InputError
from robustcompress.search.domain import Config, Domain
from robustcompress.search.meta import meta_train
from robustcompress.search.policy import Policy
from robustcompress.search.reinforce import Reinforce
from tests.search.domains import staged, task

ATTACKS = ("clean", "pgd", "autoattack")
DOMAINS: dict[str, Domain] = {attack: staged(about=task(attack=attack)) for attack in ATTACKS}


def reward(name: str, config: Config) -> float:
    """The stronger the attack, the narrower and shallower the last stage; levels and scales differ by task."""
    last = {"clean": 7, "pgd": 4, "autoattack": 1}[name]
    goal = (7, 7, 7, 7, last, last)
    away = statistics.fmean((a - b) ** 2 for a, b in zip(config, goal, strict=True)) / 64
    return {"clean": 9.0, "pgd": 0.5, "autoattack": -3.0}[name] - {"clean": 0.1, "pgd": 1.0, "autoattack": 5.0}[
        name
    ] * away


def sample(generator: torch.Generator) -> tuple[str, Domain]:
    name = ATTACKS[int(torch.randint(len(ATTACKS), (), generator=generator))]
    return name, DOMAINS[name]


def trained(rounds: int, seed: int = 0) -> Policy:
    policy = Policy(seed=seed)
    records = meta_train(policy, sample, reward, rounds, seed=seed)
    assert len(records) == rounds and {record["task"] for record in records} <= set(ATTACKS)
    return policy


def test_the_same_seed_trains_the_same() -> None:
    before = torch.get_rng_state()
    first, again, other = trained(10), trained(10), trained(10, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.depth.bias, other.depth.bias)
    assert torch.equal(before, torch.get_rng_state())


def test_a_trained_policy_tells_tasks_apart_and_starts_ahead() -> None:
    policy = trained(400)
    with torch.no_grad():
        last = {name: float(policy(domain)[5].exp() @ torch.arange(9.0)) for name, domain in DOMAINS.items()}
    assert last["clean"] > last["pgd"] > last["autoattack"]

    def mean(name: str, seed: int, start: Policy | None) -> float:
        """Of the rewards of the first 25 proposals."""
        searcher = Reinforce(DOMAINS[name], seed, policy=start)
        found = []
        for _ in range(25):
            config = searcher.ask()
            found.append(reward(name, config))
            searcher.tell(config, found[-1])
        return statistics.fmean(found)

    for name in ATTACKS:
        for seed in range(3):
            assert mean(name, seed, policy) > mean(name, seed, None)


def test_nonsense_is_refused() -> None:
    with pytest.raises(InputError, match="choices=0: must be at least 1"):
        meta_train(Policy(), sample, reward, 1, choices=0)
