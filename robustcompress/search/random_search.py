"""Random search: the baseline that every other searcher has to beat."""

from __future__ import annotations

from typing import Any

from robustcompress.search.choices import checked, seeded, uniform
from robustcompress.search.domain import Config, Domain


class RandomSearch:
    """Proposes every option of every coordinate with the same probability, and learns nothing.

    Args:
        domain: What there is to choose.
        seed: Of its draws.
    """

    def __init__(self, domain: Domain, seed: int) -> None:
        self.domain = domain
        self._generator = seeded(seed)

    def ask(self) -> Config:
        """A choice drawn from all."""
        return uniform(self.domain, self._generator)

    def tell(self, config: Config, reward: float) -> None:
        """Check what is told; there is nothing to learn from it."""
        checked(self.domain, config, reward)

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._generator.set_state(state["generator"])
