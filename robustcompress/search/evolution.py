"""Regularised evolution (Real et al. 2019, "Regularized evolution for image classifier architecture search")."""

from __future__ import annotations

from collections import deque
from typing import Any

from robustcompress.search.choices import at_least, checked, draw, mutated, seeded, uniform
from robustcompress.search.domain import Config, Domain


class Evolution:
    """The best of a random few of the youngest is mutated; the oldest dies (algorithm 1 of the paper).

    The first `population` proposals are random. Rewards of configurations that it did not propose, such as the rule's,
    join the population like any other. Asks in flight are not in it yet.

    Args:
        domain: What there is to choose.
        seed: Of its draws.
        population: How many of the last told ones are alive.
        sample: How many of them compete to be the parent.
    """

    def __init__(self, domain: Domain, seed: int, *, population: int = 20, sample: int = 5) -> None:
        at_least("Evolution cannot start", 1, population=population, sample=sample)
        self.domain = domain
        self.population = population
        self.sample = sample
        self._generator = seeded(seed)
        self._alive: deque[tuple[Config, float]] = deque(maxlen=population)
        self._asked = 0

    def ask(self) -> Config:
        """A random choice at the start, then a child of one mutation."""
        self._asked += 1
        if self._asked <= self.population or not self._alive:
            return uniform(self.domain, self._generator)
        rivals = [self._alive[draw(self._generator, len(self._alive))] for _ in range(self.sample)]
        parent, _ = max(rivals, key=lambda rival: rival[1])
        return mutated(self.domain, parent, self._generator)

    def tell(self, config: Config, reward: float) -> None:
        """Let a configuration join the population."""
        self._alive.append(checked(self.domain, config, reward))

    def state_dict(self) -> dict[str, Any]:
        """Who is alive, how many were asked for, and the generator."""
        return {
            "alive": [[list(config), reward] for config, reward in self._alive],
            "asked": self._asked,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._alive.clear()
        self._alive.extend((tuple(config), reward) for config, reward in state["alive"])
        self._asked = state["asked"]
        self._generator.set_state(state["generator"])
