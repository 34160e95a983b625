"""The searchers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from robustcompress.errors import Problems, nearest
from robustcompress.search.domain import Domain
from robustcompress.search.evolution import Evolution
from robustcompress.search.optuna_search import OptunaSearch
from robustcompress.search.random_search import RandomSearch
from robustcompress.search.reinforce import Reinforce
from robustcompress.search.rule import Rule
from robustcompress.search.searcher import Searcher

SEARCHERS: dict[str, Callable[..., Searcher]] = {
    "reinforce": Reinforce,
    "evolution": Evolution,
    "random": RandomSearch,
    "optuna": OptunaSearch,
    "rule": Rule,
}
"""How each is made, of a domain, a seed, and options of its own."""


def make_searcher(name: str, domain: Domain, seed: int, **options: Any) -> Searcher:
    """A searcher by its name.

    Args:
        name: One of `SEARCHERS`.
        domain: What there is to choose.
        seed: Of all its draws.
        **options: Its own, such as `population` of "evolution".

    Raises:
        InputError: The name or an option is unknown, the domain has nothing to choose, or the searcher refuses a value.
    """
    problems = Problems(f"make_searcher({name!r}) cannot start")
    if name not in SEARCHERS:
        problems.add(f"there is no searcher {name!r}{nearest(name, SEARCHERS)}")
    else:
        known = [key for key in inspect.signature(SEARCHERS[name]).parameters if key not in ("domain", "seed")]
        for option in sorted(options.keys() - set(known)):
            problems.add(f"{name} has no option {option!r}{nearest(option, known) if known else '; it has none'}")
    if not domain.coordinates:
        problems.add("the domain has no coordinates; there is nothing to choose")
    problems.raise_if_any()
    return SEARCHERS[name](domain, seed, **options)
