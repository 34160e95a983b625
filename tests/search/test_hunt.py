"""The ladder: nobody is looked at twice, everybody is told, the best few are looked at again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import robustcompress as rc
from robustcompress.search import hunt
from robustcompress.search.domain import Config
from robustcompress.search.evaluate import Job, Outcome
from robustcompress.search.hunt import Hunt, Ledger
from robustcompress.search.space import Space
from robustcompress.search.stages import discover
from robustcompress.session import Session
from tests.search.domains import task
from tests.strategies.nets import make_session


class Scripted:
    """Proposes a list over and over."""

    def __init__(self, configs: Sequence[Config]) -> None:
        self.configs, self.asked = list(configs), 0
        self.told: list[tuple[Config, float]] = []

    def ask(self) -> Config:
        self.asked += 1
        return self.configs[(self.asked - 1) % len(self.configs)]

    def tell(self, config: Config, reward: float) -> None:
        self.told.append((config, reward))

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, "told": [[list(c), r] for c, r in self.told]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked, self.told = state["asked"], [(tuple(c), r) for c, r in state["told"]]


class Judge:
    """Says that parameters are worth something; on the second look, that they are not."""

    recovery = "distill"

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        self.jobs += jobs
        found = []
        for job in jobs:
            params = float(sum(job.architecture.widths.values()))
            worth = params / 1000 if job.attack_steps == 10 else 1 - params / 1000
            found.append(Outcome(worth, worth, 1.0, params, job.steps))
        return found


@pytest.fixture(scope="module")
def session() -> Session:
    return make_session(rc.build_model("wrn_16_4", num_classes=10, width=0.125)[0])


@pytest.fixture(scope="module")
def space(session: Session) -> Space:
    return Space(session, discover(session, session.editor.bypassable), session.editor.bypassable, task())


def hunting(session: Session, space: Space, searcher: Scripted, **options: Any) -> tuple[Hunt, Judge]:
    judge = Judge()
    settings: dict[str, Any] = {"evaluations": 6, "batch": 2, "steps": 3} | options
    made = Hunt(session, space, searcher, lambda: judge, lambda outcome, *_: outcome.robust, **settings)  # type: ignore[arg-type,return-value]
    session.history.clear()
    return made, judge


def some(space: Space, count: int) -> list[Config]:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Config] = {}
    while len(found) < count:
        config = tuple(int(torch.randint(len(c.options), (), generator=generator)) for c in space.domain.coordinates)
        found.setdefault(space.project(config).key, config)
    return list(found.values())


def test_a_network_is_looked_at_once_and_its_reward_told_every_time(session: Session, space: Space) -> None:
    a, b, c, d, e, f = some(space, 6)
    searcher = Scripted([a, b, a, c, d, a, e, f])
    made, judge = hunting(session, space, searcher)
    made.look()
    assert [job.architecture.key for job in judge.jobs] == [space.project(x).key for x in (a, b, c, d, e, f)]
    assert [config for config, _ in searcher.told] == [a, b, a, c, d, a, e, f]
    rewards = dict(searcher.told)
    assert all(reward == rewards[config] for config, reward in searcher.told)
    assert len({job.seed for job in judge.jobs}) == 6 and {job.steps for job in judge.jobs} == {3}
    assert [r["event"] for r in session.history] == ["candidate"] * 6


def test_two_configurations_of_one_network_in_a_batch_are_both_told(session: Session, space: Space) -> None:
    widths = [i for i, coordinate in enumerate(space.domain.coordinates) if coordinate.kind == "width"]
    flat = list(space.domain.whole)
    for place in widths:
        flat[place] = 3
    searcher = Scripted([space.domain.whole, tuple(flat), some(space, 1)[0]])
    made, judge = hunting(session, space, searcher, evaluations=2, batch=2)
    made.look()
    assert len(judge.jobs) == 2 and len(searcher.told) == 3
    assert searcher.told[0][1] == searcher.told[1][1]


def test_where_the_searcher_stalls_others_are_drawn(session: Session, space: Space) -> None:
    searcher = Scripted([space.domain.whole])
    made, judge = hunting(session, space, searcher, evaluations=5, batch=5)
    made.look()
    assert len({job.architecture.key for job in judge.jobs}) == 5
    assert {config for config, _ in searcher.told} >= {space.domain.whole}


def test_what_is_to_be_first_is_first(session: Session, space: Space) -> None:
    a, b, c = some(space, 3)
    made, judge = hunting(session, space, Scripted([a]), evaluations=3, batch=3, first=[b, c])
    made.look()
    assert [job.architecture.key for job in judge.jobs] == [space.project(x).key for x in (b, c, a)]


def test_the_best_few_are_looked_at_again_and_the_second_look_decides(session: Session, space: Space) -> None:
    configs = some(space, 6)
    made, judge = hunting(session, space, Scripted(configs))
    made.look()
    ranked = sorted(configs, key=lambda x: -sum(space.project(x).widths.values()))
    winner = made.settle(3)
    again = judge.jobs[6:]
    assert [job.architecture.key for job in again] == [space.project(x).key for x in ranked[:3]]
    assert {job.steps for job in again} == {12} and {job.attack_steps for job in again} == {20}
    assert not {job.seed for job in again} & {job.seed for job in judge.jobs[:6]}, "fresh noise"
    assert winner == ranked[2], "the judge changed its mind"


def test_what_is_over_the_budget_may_be_looked_at_where_multipliers_are_literal(session: Session, space: Space) -> None:
    made, judge = hunting(session, space, Scripted([space.domain.whole]), evaluations=1, batch=1, literal=True)
    made.look()
    whole = space.domain.whole
    assert judge.jobs[0].architecture.key == space.literal(whole).key != space.project(whole).key


def test_a_ledger_comes_back_from_its_state(space: Space) -> None:
    searcher = Scripted(some(space, 2))
    ledger = Ledger(searcher)
    ledger.entries["x"] = hunt.Entry((1, 2), Outcome(0.5, 0.25, 10.0, 3.0, 4), 0.75)
    searcher.ask()
    again = Ledger(Scripted(searcher.configs))
    again.load_state_dict(ledger.state_dict())
    assert again.entries == ledger.entries
    assert again.searcher.ask() == ledger.searcher.ask()
