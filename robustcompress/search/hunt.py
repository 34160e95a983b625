"""The ladder of a search: many candidates looked at cheaply, the best few once more and longer, one winner."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustcompress.search.choices import seeded, uniform
from robustcompress.search.domain import Config
from robustcompress.search.evaluate import Evaluator, Job, Outcome
from robustcompress.search.searcher import Searcher
from robustcompress.search.space import Architecture, Space
from robustcompress.session import Session

TRIES = 20
"""How often a searcher may propose what is known before configurations are drawn at random in its place."""

FIRST_LOOK, SECOND_LOOK = 10, 20
"""PGD steps of the two rungs."""

LONGER = 4
"""How many times as long finalists recover."""

Reward = Callable[[Outcome, Architecture, float], float]
"""What an outcome is worth, of which network, given how far the search has come, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One candidate that was evaluated.

    Attributes:
        config: The configuration that it was first proposed as.
        outcome: What came of it.
        reward: What that is worth.
    """

    config: Config
    outcome: Outcome
    reward: float


class Ledger:
    """What was evaluated so far, by network, and the state of who proposes: what a checkpoint holds of a search.

    Args:
        searcher: Who proposes.

    Attributes:
        entries: By network, in the order in which they were looked at.
        exhausted: Whether no other network can be found.
    """

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher
        self.entries: dict[str, Entry] = {}
        self.exhausted = False

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain JSON by name."""
        rows = {key: [list(e.config), e.outcome.to_json(), e.reward] for key, e in self.entries.items()}
        return {
            "entries": rows,
            "exhausted": self.exhausted,
            **{f"searcher/{key}": value for key, value in self.searcher.state_dict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on from a state."""
        self.entries = {
            key: Entry(tuple(config), Outcome(**outcome), reward)
            for key, (config, outcome, reward) in state["entries"].items()
        }
        self.exhausted = state["exhausted"]
        inner = {k.removeprefix("searcher/"): v for k, v in state.items() if k.startswith("searcher/")}
        self.searcher.load_state_dict(inner)

    def best(self) -> list[Entry]:
        """The entries, the highest reward first, and of equal ones the first found."""
        return sorted(self.entries.values(), key=lambda entry: -entry.reward)


class Hunt:
    """One search.

    Args:
        session: The network under compression, trained: the teacher.
        space: What there is to find.
        searcher: Who proposes.
        evaluator: Makes the evaluator; called where the teacher's weights are in place.
        reward: What an outcome is worth.
        evaluations: How many networks are looked at; a network that was looked at is not looked at again.
        batch: How many are proposed before any is known.
        steps: Of recovery on the first look; on that at finalists, `LONGER` times as many.
        first: Configurations to look at before any other.
        literal: Take multipliers as they are, whatever the network costs.
    """

    def __init__(
        self,
        session: Session,
        space: Space,
        searcher: Searcher,
        evaluator: Callable[[], Evaluator],
        reward: Reward,
        *,
        evaluations: int,
        batch: int,
        steps: int,
        first: Sequence[Config] = (),
        literal: bool = False,
    ) -> None:
        self._session, self._space, self._reward = session, space, reward
        self._evaluations, self._batch, self._steps = evaluations, batch, steps
        self._first, self._make = list(first), evaluator
        self._ledger = Ledger(searcher)
        self._project = functools.cache(space.project)  # it takes longer than proposing
        self._network = functools.cache(space.literal) if literal else self._project

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        return self._make()

    def look(self) -> None:
        """The first rung: `evaluations` networks, each for a few steps."""
        session = self._session
        session.keep("search", self._ledger)
        session.repeat("candidates", -(-self._evaluations // self._batch), self._round)
        session.forget("search")
        if self._ledger.exhausted:
            session.say(f"only {len(self._ledger.entries)} different networks were found; all were looked at")

    def settle(self, count: int) -> Config:
        """The second: the best few once more, with longer recovery, fresh noise and PGD-20; the best of them wins.

        Whoever came first by luck does not stay there: of the best of many noisy looks the noise is the best part.

        Args:
            count: How many.
        """
        finalists = self._session.decide("finalists", lambda: self._best(count))

        def again(number: int) -> dict[str, float]:
            numbers = range(len(finalists))[number * self._batch : (number + 1) * self._batch]
            configs = [tuple(finalists[place]) for place in numbers]
            jobs = [
                Job(self._project(config), LONGER * self._steps, SECOND_LOOK, self._seed(1_000_000 + place))
                for place, config in zip(numbers, configs, strict=True)
            ]
            for config, job, outcome in zip(configs, jobs, self._evaluator.run(jobs), strict=True):
                reward = self._reward(outcome, job.architecture, 1.0)
                self._record("finalist", config, job.architecture, outcome, reward)
            return {"robust": outcome.robust, "clean": outcome.clean}

        self._session.repeat("finalists", -(-len(finalists) // self._batch), again)
        judged = [record for record in self._session.history if record.get("event") == "finalist"]
        return tuple(max(judged, key=lambda record: record["reward"])["config"])

    def _best(self, count: int) -> list[list[int]]:
        """The best configurations that come out as different networks once they keep the budget."""
        found: dict[str, Config] = {}
        for entry in self._ledger.best():
            if len(found) < count:
                found.setdefault(self._project(entry.config).key, entry.config)
        return [list(config) for config in found.values()]

    def _round(self, number: int) -> dict[str, float]:
        ledger = self._ledger
        left = self._evaluations - len(ledger.entries)
        asked = self._propose(min(self._batch, left))
        jobs = {
            key: Job(architecture, self._steps, FIRST_LOOK, self._seed(len(ledger.entries) + index))
            for index, (key, (_, architecture)) in enumerate(asked.items())
        }
        outcomes = dict(zip(jobs, self._evaluator.run(list(jobs.values())), strict=True))
        for key, outcome in outcomes.items():
            configs, architecture = asked[key]
            reward = self._reward(outcome, architecture, len(ledger.entries) / self._evaluations)
            ledger.entries[key] = Entry(configs[0], outcome, reward)
            for config in configs:
                ledger.searcher.tell(config, reward)
            self._record("candidate", configs[0], architecture, outcome, reward)
        best = ledger.best()
        return {"robust": best[0].outcome.robust, "clean": best[0].outcome.clean} if best else {}

    def _propose(self, size: int) -> dict[str, tuple[list[Config], Architecture]]:
        """By network, those not looked at yet, with all configurations that came out as it."""
        ledger, asked = self._ledger, dict[str, tuple[list[Config], Architecture]]()
        if ledger.exhausted:
            return {}

        def take(config: Config) -> bool:
            architecture = self._network(config)
            if architecture.key in ledger.entries:
                return False
            asked.setdefault(architecture.key, ([], architecture))[0].append(config)
            return True

        for config in self._first:
            if len(asked) < size:
                take(config)
        tries = 0
        while len(asked) < size and tries < TRIES * size:
            config = ledger.searcher.ask()
            tries += 1
            if not take(config):
                ledger.searcher.tell(config, ledger.entries[self._network(config).key].reward)
        tries, generator = 0, seeded(self._seed(len(ledger.entries)))
        while len(asked) < size and tries < TRIES * size:  # it has stalled
            take(uniform(self._space.domain, generator))
            tries += 1
        ledger.exhausted = len(asked) < size
        return asked

    def _seed(self, number: int) -> int:
        return (self._session.goal.seed * 10_000_019 + number) % 2**63

    def _record(self, event: str, config: Config, architecture: Architecture, outcome: Outcome, reward: float) -> None:
        self._session.record(
            {
                "phase": f"{event}s",
                "event": event,
                "config": list(config),
                **architecture.to_json(),
                "macs": round(outcome.macs),
                "params": round(outcome.params),
                "recovery": self._evaluator.recovery,
                "recovery_steps": outcome.steps,
                "attack_steps": FIRST_LOOK if event == "candidate" else SECOND_LOOK,
                "val_clean": outcome.clean,
                "val_robust": outcome.robust,
                "reward": reward,
            }
        )
