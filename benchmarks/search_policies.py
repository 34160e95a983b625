"""Policies meta-trained on measured tasks, and the reconstructed pre-training of their encoders."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.search_table import Task, standard
from robustcompress.search import domain as parts
from robustcompress.search.choices import uniform
from robustcompress.search.domain import Config, Domain
from robustcompress.search.meta import meta_train
from robustcompress.search.policy import Policy, _scaled, task_vector

CHILDREN = 200
"""Random networks that the encoder is pre-trained on."""

STEPS, CHOSEN, LR = 150, 16, 3e-3
"""Of pre-training: updates, children to each, Adam's rate."""


def trained(tasks: Sequence[Task], seed: int, rounds: int, *, blind: bool = False, pretrain: bool = False) -> Policy:
    """A policy meta-trained on tasks; a blind one is shown the same domain for all of them."""
    by_name = {task.name: task for task in tasks}
    domains = {task.name: unseen(task.domain) if blind else task.domain for task in tasks}
    names = sorted(by_name)

    def sample(generator: torch.Generator) -> tuple[str, Domain]:
        name = names[int(torch.randint(len(names), (), generator=generator))]
        return name, domains[name]

    policy = Policy(seed=seed)
    if pretrain:
        taught(policy, tasks, seed)
    meta_train(policy, sample, lambda name, config: by_name[name].reward(config), rounds, seed=seed)
    return policy


@torch.no_grad()
def proposed(policy: Policy, task: Task, *, blind: bool = False) -> float:
    """What a policy proposes is worth on average, over the mean of all networks, in their standard deviations."""
    logs = policy(unseen(task.domain) if blind else task.domain)
    chances = functools.reduce(
        lambda all, log: (all[:, None] * log.double().exp()).flatten(), logs, torch.ones(1).double()
    )
    return float(chances @ torch.tensor(standard(task), dtype=torch.float64))


def unseen(domain: Domain) -> Domain:
    """The domain with tokens and task that are the same for all."""
    tokens = tuple(parts.Token(1.0, 2.0, 16.0) for _ in domain.tokens)
    task = parts.Task(0.5, 1e6, 10, "pgd", 8 / 255, 0.5, 0.5, 50.0)
    return dataclasses.replace(domain, tokens=tokens, task=task)


def taught(policy: Policy, tasks: Sequence[Task], seed: int) -> None:
    """Train encoder and LSTM to tell a child's reward, over the spread of its task, from its tokens; in place.

    The paper's figures name no pre-training. This is a reconstruction: 200 random children, squared error, and then
    nothing is frozen. Multiply-adds and parameters are not told: projected, all children of a task cost the same.
    """
    generator = torch.Generator().manual_seed(seed)
    ordered = sorted(tasks, key=lambda task: task.name)
    rows = []
    for number in range(CHILDREN):
        task = ordered[number % len(ordered)]
        config = uniform(task.domain, generator)
        mean, spread = statistics.fmean(task.first), statistics.pstdev(task.first)
        rows.append((child(task.domain, config), (task.reward(config) - mean) / (spread + 1e-8)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(2 * policy.hidden, 1)
    learned = [*policy.encode.parameters(), *policy.lstm.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(learned, lr=LR)
    for _ in range(STEPS):
        losses = []
        for place in torch.randint(len(rows), (CHOSEN,), generator=generator).tolist():
            domain, wanted = rows[place]
            tokens = torch.tensor([_scaled(t.stride, t.depth, t.width, t.robust_block) for t in domain.tokens])
            about = task_vector(domain.task).expand(len(tokens), -1)
            states, _ = policy.lstm(torch.tanh(policy.encode(torch.cat([tokens, about], 1))))
            losses.append((head(states.mean(0))[0] - wanted) ** 2)
        optimizer.zero_grad()
        torch.autograd.backward(torch.stack(losses).mean())
        optimizer.step()


def child(domain: Domain, config: Config) -> Domain:
    """The domain whose tokens are those of a network in it: shares of the depths and widths."""
    tokens = list(domain.tokens)
    for (stage, kind), share in domain.shares(config).items():
        token = tokens[stage]
        if kind == "depth":
            tokens[stage] = dataclasses.replace(token, depth=1 + share * (token.depth - 1))
        else:
            tokens[stage] = dataclasses.replace(token, width=share * token.width)
    return dataclasses.replace(domain, tokens=tuple(tokens))
