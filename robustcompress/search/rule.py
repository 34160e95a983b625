"""The rule of thumb as a searcher: no evaluation is needed for it, and every search has to beat it."""

from __future__ import annotations

from typing import Any

from robustcompress.search.choices import checked
from robustcompress.search.domain import Config, Coordinate, Domain

LAST_STAGE = 0.4
"""Width of the last stage over the others': RobustResNets have 2 : 2.5 : 1 (Huang et al. 2022, arXiv 2212.11005).

Wide residual networks have 1 : 1 : 1 in the same multiples, so that it is the share of the last stage too."""


class Rule:
    """Proposes one configuration again and again: whole depth, plain blocks, the last stage's width at `LAST_STAGE` of
    the others'.

    Of the published rule this is what concerns the last stage's width alone, which costs most when it is wrong; its
    depths (2 : 2 : 1) are left to the searches. In a domain of one stage it proposes to leave all as it is.

    Args:
        domain: What there is to choose.
        seed: Not used; every searcher takes one.
    """

    def __init__(self, domain: Domain, seed: int) -> None:
        del seed
        self.domain = domain
        last = len(domain.tokens) - 1

        def option(coordinate: Coordinate) -> int:
            if coordinate.kind == "block":
                return len(coordinate.options) - 1  # plain
            cut = coordinate.kind == "width" and coordinate.stage == last > 0
            share = LAST_STAGE if cut else 1.0
            return min(range(len(coordinate.options)), key=lambda i: abs(coordinate.options[i] - share))

        self._config = tuple(option(coordinate) for coordinate in domain.coordinates)

    def ask(self) -> Config:
        """The configuration."""
        return self._config

    def tell(self, config: Config, reward: float) -> None:
        """Check what is told; there is nothing to learn from it."""
        checked(self.domain, config, reward)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
