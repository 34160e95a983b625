"""Practice for RC-NAS's policy: real tasks to train one on before it is to search in another.

The upper of RC-NAS's two levels, on networks and images. A task is a teacher and what is wanted of it; `train_policy`
runs `search.meta.meta_train` over several, and evaluates what the policy proposes as `RCNAS` does itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.api import open_session
from robustcompress.budget import Budget
from robustcompress.errors import InputError, Problems
from robustcompress.models import ModelSpec
from robustcompress.resolve import resolve
from robustcompress.robust import ThreatModel
from robustcompress.robust.objectives import Objective
from robustcompress.search.domain import Config, Domain
from robustcompress.search.evaluate import Job, Outcome
from robustcompress.search.hunt import FIRST_LOOK
from robustcompress.search.meta import meta_train
from robustcompress.search.policy import Policy
from robustcompress.session import Session
from robustcompress.strategies import RCNAS
from robustcompress.train import Progress, Recipe


class SearchTask:
    """A teacher within which compact networks can be looked at; `search_task` makes one.

    Args:
        session: The network under compression.
        strategy: How its candidates are evaluated.

    Attributes:
        domain: What there is to choose, and what a policy may know of it.
        outcomes: What was looked at so far, by network.
    """

    def __init__(self, session: Session, strategy: RCNAS) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._session, self._strategy = session, strategy
        self._space = strategy.lay_out(session)
        self.domain: Domain = self._space.domain
        if not self.domain.coordinates:
            raise InputError("there is nothing to choose in this network: the budget alone decides; give another model")
        self._evaluator = strategy.evaluator(session)

    def reward(self, config: Config) -> float:
        """What `RCNAS` would reward a choice with: it is evaluated, unless the same network was before.

        Args:
            config: One option for each coordinate of `domain`.
        """
        architecture = self._space.project(config)
        if architecture.key not in self.outcomes:
            seed = (self._session.goal.seed * 10_000_019 + len(self.outcomes)) % 2**63
            job = Job(architecture, self._strategy.recovery_steps, FIRST_LOOK, seed)
            self.outcomes[architecture.key] = self._evaluator.evaluate(job)
        outcome = self.outcomes[architecture.key]
        return self._strategy.reward(self._space, outcome, architecture, self.domain.task, 0.0)


def search_task(
    model: nn.Module | ModelSpec | str,
    strategy: RCNAS | None = None,
    *,
    data: Any = None,
    budget: Budget | float = Budget(macs=0.5),
    threat: ThreatModel | float = ThreatModel("linf", 8 / 255),
    objective: Objective | str | None = None,
    epochs: float | None = None,
    pretrained: bool = False,
    recipe: Recipe | None = None,
    round_to: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> SearchTask:
    """Train a teacher, unless it is robust already, and lay out what there is to find within it.

    The arguments are those of `compress()`. Of the epochs only the teacher's share is trained.

    Args:
        model: The reference.
        strategy: How candidates are evaluated; who searches in it, and its evaluations, do not matter here.
        data: Images.
        budget: What a candidate may cost; multiply-adds and parameters can be limited here.
        threat: What it must withstand.
        objective: Loss that the teacher is trained with.
        epochs: As `compress()` has them.
        pretrained: The reference is robust already.
        recipe: Training settings.
        round_to: Widths become multiples of this.
        seed: Seeds everything.
        device: "auto", "cpu", "cuda", ...
        progress: Show progress.

    Raises:
        InputError: Something cannot work; all that was noticed is listed, before any training.
        UnsupportedModelError: The network holds layers that cannot be edited.
        BudgetError: No widths meet the budget, or the model already does.
    """
    strategy = strategy or RCNAS()
    problems = Problems("search_task() cannot start")
    if not isinstance(strategy, RCNAS):
        problems.add(f"strategy={strategy!r}: give an RCNAS, such as RCNAS(recovery_steps=20)")
    elif strategy.feasibility != "project":
        problems.add("feasibility='penalty': penalties change while a search goes on; practise with 'project'")
    if isinstance(budget, Budget) and budget.demand is not None:
        problems.add(f"{budget}: names no size, and a task has one; give macs or params")
    elif isinstance(budget, Budget) and budget.limits_latency:
        problems.add(f"{budget}: latency cannot be limited here; limit macs or params")
    problems.raise_if_any()
    request = resolve(
        model=model,
        strategy=strategy,
        data=data,
        budget=budget,
        threat=threat,
        objective=objective,
        epochs=epochs,
        recipe=recipe,
        round_to=round_to,
        attacks=(),
        test_images=None,
        seed=seed,
        device=device,
        out=None,
        pretrained=pretrained,
    )
    session, _, _ = open_session(request, Progress(progress, title="search task"), time.monotonic())
    with torch.random.fork_rng():  # dropout and the like draw from the global generator, which is the caller's
        torch.manual_seed(seed)
        return SearchTask(session, strategy)


def train_policy(
    tasks: Mapping[str, SearchTask],
    *,
    rounds: int = 200,
    choices: int = 5,
    start: Policy | str | Path | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> Policy:
    """Meta-train a policy on tasks, for `RCNAS(policy=...)` to begin a search in another one with.

    Each round draws a task and proposes `choices` networks there; a network is evaluated once, so that at most
    `rounds * choices` are, and at most all there are.

    Args:
        tasks: By name; the more they differ as the tasks to come do, the better.
        rounds: How many steps.
        choices: Networks to a step.
        start: A policy to go on from; a new one by default.
        seed: Of the first weights, the tasks and the choices drawn.
        out: File to write the policy to, such as "policy.safetensors".

    Returns:
        The policy.

    Raises:
        InputError: Something cannot work; all that was noticed is listed, before any evaluation.
        ResultError: `start` names a file that holds no policy.
    """
    problems = Problems("train_policy() cannot start")
    if not tasks:
        problems.add("tasks is empty: give at least one search_task(...), by name")
    for name, task in tasks.items():
        if not isinstance(task, SearchTask):
            problems.add(f"tasks[{name!r}] is a {type(task).__name__}: give what search_task(...) returns")
    for name, value in (("rounds", rounds), ("choices", choices)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.add(f"{name}={value!r}: must be a positive whole number")
    if out is not None and Path(out).is_dir():
        problems.add(f"out={str(out)!r} is a directory: name a file, such as policy.safetensors")
    elif out is not None and not Path(out).resolve().parent.is_dir():
        problems.add(f"out={str(out)!r}: there is no directory {str(Path(out).resolve().parent)!r}")
    problems.raise_if_any()
    policy = Policy(seed=seed) if start is None else start if isinstance(start, Policy) else Policy.load(start)
    names = sorted(tasks)

    def sample(generator: torch.Generator) -> tuple[str, Domain]:
        name = names[int(torch.randint(len(names), (), generator=generator))]
        return name, tasks[name].domain

    meta_train(policy, sample, lambda name, config: tasks[name].reward(config), rounds, choices=choices, seed=seed)
    if out is not None:
        policy.save(out)
    return policy
