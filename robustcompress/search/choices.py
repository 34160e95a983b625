"""Drawing, changing and checking choices of a domain: what all searchers share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from robustcompress.errors import Problems
from robustcompress.search.domain import Config, Domain


def seeded(seed: int) -> torch.Generator:
    """A generator of a searcher's own."""
    return torch.Generator().manual_seed(seed)


def draw(generator: torch.Generator, count: int) -> int:
    """A whole number below `count`, all alike."""
    return int(torch.randint(count, (), generator=generator))


def uniform(domain: Domain, generator: torch.Generator) -> Config:
    """A choice in which every option of every coordinate is as likely as the others."""
    return tuple(draw(generator, size) for size in domain.sizes)


def mutated(domain: Domain, config: Config, generator: torch.Generator) -> Config:
    """The choice with one coordinate changed: every second time to an option beside it, else to any other.

    A domain without a coordinate of two options gives the choice back.
    """
    free = [number for number, size in enumerate(domain.sizes) if size > 1]
    if not free:
        return config
    place = free[draw(generator, len(free))]
    old, size = config[place], domain.sizes[place]
    if draw(generator, 2):
        beside = [option for option in (old - 1, old + 1) if 0 <= option < size]
        new = beside[draw(generator, len(beside))]
    else:
        new = draw(generator, size - 1)
        new += new >= old
    return (*config[:place], new, *config[place + 1 :])


def checked(domain: Domain, config: Sequence[int], reward: float) -> tuple[Config, float]:
    """What was told, as it is kept.

    Raises:
        InputError: The choice is none of the domain's, or the reward is not a finite number.
    """
    problems = Problems("tell() cannot learn from this")
    sizes = domain.sizes
    if len(config) != len(sizes):
        problems.add(f"config={tuple(config)} has {len(config)} options; the domain has {len(sizes)} coordinates")
    else:
        for place, (option, size) in enumerate(zip(config, sizes, strict=True)):
            if not 0 <= option < size or option != int(option):
                problems.add(f"config[{place}]={option}: that coordinate has options 0 to {size - 1}")
    if not math.isfinite(reward):
        problems.add(f"reward={reward}: must be finite; tell -1 for a configuration that is not possible")
    problems.raise_if_any()
    return tuple(int(option) for option in config), float(reward)


def at_least(title: str, least: float, **values: float) -> None:
    """Complain about every value below `least`.

    Raises:
        InputError: There is one; all are named.
    """
    problems = Problems(title)
    for name, value in values.items():
        if not value >= least:
            problems.add(f"{name}={value}: must be at least {least:g}")
    problems.raise_if_any()
