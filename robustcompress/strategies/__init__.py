"""One file a paper; each reads like the paper's algorithm box."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from robustcompress.errors import InputError, Problems, nearest
from robustcompress.strategies.awt import AWT
from robustcompress.strategies.base import Strategy
from robustcompress.strategies.fixed import Fixed
from robustcompress.strategies.grape import Grape
from robustcompress.strategies.harp import Harp
from robustcompress.strategies.hydra import Hydra
from robustcompress.strategies.magnitude import Magnitude
from robustcompress.strategies.none import Reference
from robustcompress.strategies.random_channels import RandomChannels
from robustcompress.strategies.rcnas import RCNAS
from robustcompress.strategies.s2ap import S2AP
from robustcompress.strategies.scaling import Scaling
from robustcompress.strategies.scores import ScoreBased
from robustcompress.strategies.taylor import Taylor
from robustcompress.strategies.uniform import Uniform

STRATEGIES: dict[str, type[Strategy]] = {
    kind.name: kind
    for kind in (
        Grape,
        Hydra,
        S2AP,
        Harp,
        AWT,
        RCNAS,
        Magnitude,
        Taylor,
        RandomChannels,
        Uniform,
        Scaling,
        Fixed,
        Reference,
    )
}


def register_strategy(kind: type[Strategy]) -> type[Strategy]:
    """Make a strategy known by its name; also usable as a class decorator.

    Raises:
        InputError: The name is taken.
    """
    if STRATEGIES.setdefault(kind.name, kind) is not kind:
        raise InputError(f"a strategy called {kind.name!r} exists already; choose another name")
    return kind


def make_strategy(strategy: str | Strategy, **options: Any) -> Strategy:
    """Build a strategy by name.

    Args:
        strategy: A name, or a ready strategy, which is returned as it is.
        options: Its options.

    Raises:
        InputError: No such strategy or option; the nearest is offered.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise InputError(f"strategy {strategy!r} does not exist{nearest(str(strategy), STRATEGIES)}")
    kind = STRATEGIES[strategy]
    known: list[str] = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    problems = Problems(f"strategy {strategy!r} cannot be made")
    for name in options:
        if name not in known:
            inside = "; options of its host go into host={'name': ..., ...}" if "host" in known else ""
            problems.add(f"option {name!r} does not exist{nearest(name, known)}{inside}")
    problems.raise_if_any()
    return kind(**options)


__all__ = [
    "AWT",
    "RCNAS",
    "S2AP",
    "STRATEGIES",
    "Fixed",
    "Grape",
    "Harp",
    "Hydra",
    "Magnitude",
    "RandomChannels",
    "Reference",
    "Scaling",
    "ScoreBased",
    "Strategy",
    "Taylor",
    "Uniform",
    "make_strategy",
    "register_strategy",
]
