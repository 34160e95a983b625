"""REINFORCE: its gradient, its batches, what it does when it stalls, and how it starts from a policy."""

from __future__ import annotations

import random
import statistics
from typing import get_args

import pytest
import torch

from robustcompress.search.domain import Config, Coordinate, Domain, Token
from robustcompress.search.gradient import Baseline, loss
from robustcompress.search.policy import Policy
from robustcompress.search.reinforce import Reinforce, Stall
from tests.search.domains import EIGHTHS, staged, task, typed
from tests.search.test_policy import stirred

GOAL = (7, 2, 6, 3, 1, 2)


def closeness(config: Config) -> float:
    return -statistics.fmean((a - b) ** 2 for a, b in zip(config, GOAL, strict=True)) / 64


def small() -> Domain:
    """Nine configurations."""
    return Domain((Coordinate(0, "width", EIGHTHS),), (Token(1, 1, 16),), task())


def test_advantages_are_against_the_past_and_over_the_spread() -> None:
    baseline = Baseline(0.9)
    first = baseline.advantages([0.1, 0.2, 0.3])
    assert first.tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5]) and baseline.value == pytest.approx(0.2)
    second = baseline.advantages([0.3, 0.5])
    assert second.tolist() == pytest.approx([1.0, 3.0]) and baseline.value == pytest.approx(0.9 * 0.2 + 0.1 * 0.4)
    assert baseline.advantages([0.9] * 5).tolist() == [3.0] * 5, "repeats do not blow up"
    assert Baseline(0.9).advantages([0.9] * 5).tolist() == [0.0] * 5


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """Over all choices, weighted as the policy draws them, it is the exact gradient, by autograd through the sum."""
    policy, domain = stirred(), small()
    values = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 0.0, 0.0, 0.3, 0.1])
    (log,) = policy_logs(policy, domain)
    expected = torch.autograd.grad((log.exp() * values).sum(), policy.width.bias)[0]
    weights = policy_logs(policy, domain)[0].exp().detach()
    ours = torch.zeros_like(expected)
    for option in range(9):
        value = loss(policy, domain, [(option,)], values[option : option + 1], 0.0)
        ours -= weights[option] * torch.autograd.grad(value, policy.width.bias)[0]
    assert torch.allclose(ours, expected, atol=1e-6)


def policy_logs(policy: Policy, domain: Domain) -> list[torch.Tensor]:
    logs: list[torch.Tensor] = policy(domain)
    return logs


def test_the_order_of_tells_within_a_batch_does_not_matter() -> None:
    left, right = Reinforce(staged(), 0), Reinforce(staged(), 0)
    for step in range(6):
        configs = [left.ask() for _ in range(5)]
        assert configs == [right.ask() for _ in range(5)]
        for config in configs:
            left.tell(config, closeness(config))
        for config in random.Random(step).sample(configs, 5):
            right.tell(config, closeness(config))
    for ours, theirs in zip(left.policy.parameters(), right.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_it_updates_by_its_own_proposals_alone_and_by_whole_batches() -> None:
    searcher = Reinforce(staged(), 0)
    first = searcher.policy.depth.bias.clone()
    for option in range(9):
        searcher.tell((option,) * 6, 0.1 * option)
    configs = [searcher.ask() for _ in range(5)]
    for config in configs[:4]:
        searcher.tell(config, closeness(config))
    assert torch.equal(searcher.policy.depth.bias, first)
    searcher.tell(configs[4], closeness(configs[4]))
    assert not torch.equal(searcher.policy.depth.bias, first)


@pytest.mark.parametrize("stall", get_args(Stall))
def test_an_easy_bandit_is_learned(stall: Stall) -> None:
    searcher = Reinforce(staged(), 0, stall=stall)
    rewards = []
    for _ in range(300):
        config = searcher.ask()
        rewards.append(closeness(config))
        searcher.tell(config, rewards[-1])
    dice = random.Random(0)
    chance = [closeness(tuple(dice.randrange(9) for _ in GOAL)) for _ in range(300)]
    assert statistics.fmean(rewards[150:]) > 0.6 * statistics.fmean(chance)
    assert stall != "mutate" or max(rewards) > max(chance)


def settled(stall: Stall) -> Reinforce:
    """A searcher whose policy is as good as certain of (0, 0, 0, 0, 0, 0)."""
    policy = Policy()
    with torch.no_grad():
        for head in policy.heads:
            head.bias[0] = 12.0
    return Reinforce(staged(), 0, policy=policy, stall=stall, lr=0.0)


def test_a_settled_policy_stalls_and_mutation_goes_on() -> None:
    def proposals(searcher: Reinforce) -> list[Config]:
        asked = []
        for _ in range(120):
            asked.append(searcher.ask())
            searcher.tell(asked[-1], closeness(asked[-1]))
        return asked

    stalled = proposals(settled("none"))
    assert len(set(stalled)) < 5
    going = proposals(settled("mutate"))
    assert len(set(going)) > 90
    assert statistics.fmean(map(closeness, going[-20:])) > closeness(stalled[0]) + 0.1
    restarted = settled("restart")
    assert len(set(proposals(restarted))) > 40 and restarted.stalls >= 1


def test_mutation_leaves_a_neighbourhood_that_is_used_up() -> None:
    """81 configurations, of which 34 are near the best two; equal rewards do not fill the elite either."""
    searcher = Reinforce(staged(1), 0, stall="mutate", lr=0.1)
    asked = set()
    for _ in range(250):
        config = searcher.ask()
        asked.add(config)
        searcher.tell(config, float(config[0] == 4))
    assert len(asked) > 75


def test_in_a_space_that_is_used_up_it_still_answers() -> None:
    for stall in get_args(Stall):
        searcher = Reinforce(small(), 0, stall=stall)
        for _ in range(200):
            config = searcher.ask()
            searcher.tell(config, float(config == (4,)))
        assert config in {(option,) for option in range(9)}


def test_it_starts_from_a_copy_of_a_policy_and_doubts_it_briefly() -> None:
    policy = stirred()
    before = [parameter.clone() for parameter in policy.parameters()]

    def entropy_after(**options: float) -> float:
        searcher = Reinforce(staged(), 0, policy=policy, **options)  # type: ignore[arg-type]
        for _ in range(40):
            searcher.tell(searcher.ask(), 0.5)  # nothing to learn but the entropy
        with torch.no_grad():
            return float(sum(-(log.exp() * log).sum() for log in searcher.policy(staged())))

    with torch.no_grad():
        first = float(sum(-(log.exp() * log).sum() for log in policy(staged())))
    assert entropy_after(lr=0.0) == pytest.approx(first)
    assert entropy_after(lr=1e-3, entropy=0.0, warm_entropy=1.0) > first + 0.1
    assert entropy_after(lr=1e-3, entropy=0.0, warm_entropy=0.0) == pytest.approx(first)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_it_learns_which_type_is_rewarded_and_goes_on_from_a_state_without_types() -> None:
    searcher = Reinforce(typed(), 0)
    for _ in range(240):
        config = searcher.ask()
        searcher.tell(config, float(config[2] == 1) + float(config[4] == 1))
    with torch.no_grad():
        logs = searcher.policy(typed())
    assert float(logs[2].exp()[1]) > 0.9 and float(logs[4].exp()[1]) > 0.9
    state = {key: value for key, value in Reinforce(staged(), 3).state_dict().items() if "policy/block" not in key}
    searcher = Reinforce(staged(), 4)
    searcher.load_state_dict(state)
    other = Reinforce(staged(), 3)
    assert [searcher.ask() for _ in range(9)] == [other.ask() for _ in range(9)]
