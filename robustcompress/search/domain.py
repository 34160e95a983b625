"""What there is to choose in a search, apart from any network: coordinates, tokens of stages, the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["depth", "width", "block"]

BLOCKS = ("rir", "se", "plain")
"""Types that the blocks of a stage can have, each by its number here; plain is as in the reference."""

Config = tuple[int, ...]
"""One choice: for each coordinate of a domain, the number of an option."""


@dataclass(frozen=True, slots=True)
class Coordinate:
    """One thing to choose.

    Attributes:
        stage: Number of the stage it belongs to.
        kind: "depth", the share of a stage's removable blocks that stays; "width", a multiplier of its widths; or
            "block", the type of its blocks.
        options: Shares, ascending, in [0, 1]; or numbers of `BLOCKS`, ascending. The last leaves the reference as is.
    """

    stage: int
    kind: Kind
    options: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A stage as a policy sees it.

    Attributes:
        stride: Of the resolution before it over its own.
        depth: Blocks in it.
        width: Channels of its widest group.
        robust_block: Whether its blocks are of the robust kind; 0 or 1.
    """

    stride: float
    depth: float
    width: float
    robust_block: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """What is compressed, for what: all that a policy may know of it beside the stages.

    Attributes:
        budget: Share of the reference's cost that may stay, in (0, 1].
        macs: Multiply-adds of the reference.
        classes: How many classes the data have.
        attack: What robustness is measured by: "clean", "fgsm", "pgd", "cw" or "autoattack".
        eps: Its radius.
        clean: The teacher's clean accuracy, in [0, 1].
        robust: Its accuracy under the attack.
        lipschitz: Its empirical Lipschitz constant on a probe batch.
    """

    budget: float
    macs: float
    classes: int
    attack: str
    eps: float
    clean: float
    robust: float
    lipschitz: float


@dataclass(frozen=True, slots=True)
class Domain:
    """Everything that a search may choose among, and what it may know of it.

    Attributes:
        coordinates: What to choose; the coordinates of a stage lie together: depth, width, block.
        tokens: The stages, from the image on.
        task: What for.
    """

    coordinates: tuple[Coordinate, ...]
    tokens: tuple[Token, ...]
    task: Task

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many options each coordinate has."""
        return tuple(len(coordinate.options) for coordinate in self.coordinates)

    def shares(self, config: Sequence[int]) -> dict[tuple[int, Kind], float]:
        """By stage and kind, the share (or the number of a type) that a choice stands for."""
        return {
            (coordinate.stage, coordinate.kind): coordinate.options[option]
            for coordinate, option in zip(self.coordinates, config, strict=True)
        }

    @property
    def whole(self) -> Config:
        """The choice that leaves every stage as it is."""
        return tuple(size - 1 for size in self.sizes)
