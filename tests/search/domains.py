"""Domains that tests search."""

from __future__ import annotations

from robustcompress.search.domain import Coordinate, Domain, Kind, Task, Token

EIGHTHS = tuple(i / 8 for i in range(9))


def task(**changes: object) -> Task:
    values: dict[str, object] = {
        "budget": 0.5,
        "macs": 5e9,
        "classes": 10,
        "attack": "pgd",
        "eps": 8 / 255,
        "clean": 0.85,
        "robust": 0.55,
        "lipschitz": 3.0,
    }
    return Task(**(values | changes))  # type: ignore[arg-type]


def staged(stages: int = 3, *, options: tuple[float, ...] = EIGHTHS, about: Task | None = None) -> Domain:
    """Depth and width for each stage."""
    kinds: tuple[Kind, ...] = ("depth", "width")
    coordinates = tuple(Coordinate(stage, kind, options) for stage in range(stages) for kind in kinds)
    tokens = tuple(Token(1.0 + (stage > 0), 4.0, 160.0 * 2**stage) for stage in range(stages))
    return Domain(coordinates, tokens, about or task())


def typed() -> Domain:
    """Depth, width and type for each of two stages; the second has two types alone."""
    coordinates = (
        Coordinate(0, "depth", (0.0, 0.5, 1.0)),
        Coordinate(0, "width", EIGHTHS),
        Coordinate(0, "block", (0.0, 1.0, 2.0)),
        Coordinate(1, "width", EIGHTHS),
        Coordinate(1, "block", (1.0, 2.0)),
    )
    return Domain(coordinates, (Token(1, 3, 16), Token(2, 1, 32)), task())


def uneven() -> Domain:
    """A stage without blocks to remove, one that cannot be narrowed, and one with a coordinate of one option."""
    coordinates = (
        Coordinate(0, "width", (0.3, 1.0)),
        Coordinate(1, "depth", (0.0, 0.5, 1.0)),
        Coordinate(2, "depth", (1.0,)),
        Coordinate(2, "width", (0.25, 0.4, 0.6, 1.0)),
    )
    return Domain(coordinates, (Token(1, 1, 16), Token(2, 3, 32), Token(2, 1, 64, 1.0)), task(attack="autoattack"))
