"""What proposes configurations: one protocol for all, `ask` and `tell`."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from robustcompress.search.domain import Config


@runtime_checkable
class Searcher(Protocol):
    """Proposes configurations and learns from their rewards. Deterministic: its randomness is its own, and seeded.

    Configurations may be asked for several at a time before any is told, and told in any order.
    """

    def ask(self) -> Config:
        """The next configuration to try; may be one that was tried before."""
        ...

    def tell(self, config: Config, reward: float) -> None:
        """How good a configuration is: higher is better; -1 for one that is not possible."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain JSON, from which `load_state_dict` goes on exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        ...
