"""The compact networks within a reference: what a configuration stands for, brought to the budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from robustcompress.search.domain import BLOCKS, Config, Coordinate, Domain, Task, Token
from robustcompress.search.dressed import Dressed, Pick
from robustcompress.search.stages import Stage, alive
from robustcompress.shapes import Network, capped, floor_widths, rounded, shaped_widths, steps_of
from robustcompress.structure.groups import inside

LEVELS = 9
"""Of a width multiplier, and of a depth at most: as many bins as keep ratios commonly have."""

LEAST = 0.2
"""The smallest width multiplier."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network within the reference.

    Attributes:
        bypassed: Blocks that leave.
        widths: By group; of groups within those blocks nothing is said.
        inserted: Blocks that are not plain, each with the kind of the part in it.
    """

    bypassed: tuple[str, ...]
    widths: Mapping[str, int]
    inserted: tuple[Pick, ...] = ()

    @property
    def key(self) -> str:
        """The same for the same network."""
        typed = f" {sorted(self.inserted)}" if self.inserted else ""
        return f"{sorted(self.bypassed)} {sorted(self.widths.items())}{typed}"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        typed = {"inserted": [list(pick) for pick in self.inserted]} if self.inserted else {}
        return {"bypassed": list(self.bypassed), "widths": dict(self.widths), **typed}


class Space:
    """What a search may make of a reference: for each stage a depth, a width, and a type of blocks.

    A configuration is a *shape*: how many of a stage's blocks stay, how the stages' widths relate, and which part, if
    any, the blocks of a stage have in their residual branch. `project` scales all widths by one ratio so that the
    network just keeps the budget, whatever the depths and parts; where it would be below the budget at its widest,
    blocks come back. So every configuration stands for a network that may be built, and all are compared at one cost.

    Args:
        session: The network under compression, with the shape of the reference; with all parts in it (see `Dressed`)
            where types may be chosen.
        stages: Its stages.
        order: The blocks that may leave, the first to leave first: the last to leave is the first to come back.
        task: What the search is for.
        cap: No group becomes wider than this multiple of its width.
        kinds: Of parts among which types may be chosen.

    Attributes:
        stages: As given.
        domain: What a searcher is told of this space.
    """

    def __init__(
        self,
        session: Network,
        stages: Sequence[Stage],
        order: Sequence[str],
        task: Task,
        *,
        cap: float = 1.0,
        kinds: Sequence[str] = (),
    ) -> None:
        self.stages = tuple(stages)
        self._order = {name: number for number, name in enumerate(order)}
        self._session = session
        self._cap = cap
        self._full = session.editor.widths
        self._parts = session.parts if isinstance(session, Dressed) else {}
        types = tuple(float(number) for number, name in enumerate(BLOCKS) if name in ("plain", *kinds))
        coordinates = []
        wide = [number for number, stage in enumerate(self.stages) if stage.groups]
        for number, stage in enumerate(self.stages):
            if count := len(stage.blocks):
                kept = sorted({round(level * count / (LEVELS - 1)) for level in range(LEVELS)})
                coordinates.append(Coordinate(number, "depth", tuple(k / count for k in kept)))
            if stage.groups and len(wide) > 1:  # of one width alone the budget decides
                levels = (LEAST + (1 - LEAST) * level / (LEVELS - 1) for level in range(LEVELS))
                coordinates.append(Coordinate(number, "width", tuple(round(level, 3) for level in levels)))
            if stage.sites and len(types) > 1:
                coordinates.append(Coordinate(number, "block", types))
        widths = [max((self._full[name] for name in stage.groups), default=0) for stage in self.stages]
        tokens = (
            Token(stage.stride, float(stage.depth), float(width))
            for stage, width in zip(self.stages, widths, strict=True)
        )
        self.domain = Domain(tuple(coordinates), tuple(tokens), task)

    @property
    def staged(self) -> bool:
        """Whether all its stages are resolutions, of which one is the last."""
        return len(self.stages) > 1 and all(re.fullmatch(r"\d+x\d+", stage.name) for stage in self.stages)

    def project(self, config: Config) -> Architecture:
        """The network of a configuration's shape that just keeps the budget.

        Args:
            config: One option for each coordinate.
        """
        gone, _ = self._shape(config)
        editor = self._session.editor
        full = {group.name: group.width for group in editor.editable}
        widest = capped(full, self._cap, steps_of(editor, self._session.goal.round_to))
        lacking = self._lacking(config)
        while gone and self._session.fits(widest, without=(*gone, *lacking)):
            gone.remove(max(gone, key=self._order.__getitem__))
        return Architecture(tuple(gone), self.widths(config, gone), self._inserted(config, gone))

    def fits(self, architecture: Architecture) -> bool:
        """Whether a network keeps the budget."""
        chosen = set(architecture.inserted)
        lacking = (name for pick, name in self._parts.items() if pick not in chosen)
        return self._session.fits(architecture.widths, without=(*architecture.bypassed, *lacking))

    def share(self, config: Config, stage: int) -> str:
        """What a configuration says of a stage, in words."""
        said = [
            f"{kind} {BLOCKS[int(share)]}" if kind == "block" else f"{kind} {share:g}"
            for (number, kind), share in self.domain.shares(config).items()
            if number == stage
        ]
        return ", ".join(said) or "as it is"

    def widths(self, config: Config, gone: Sequence[str]) -> dict[str, int]:
        """The widths of a configuration's shape that just keep the budget, whatever its depths say.

        Args:
            config: One option for each coordinate.
            gone: The blocks that leave.
        """
        _, factors = self._shape(config)
        without = (*gone, *self._lacking(config))
        factors = {name: factors[name] for name in alive(self._session, factors, without)}
        return shaped_widths(self._session, factors, cap=self._cap, without=without)

    def literal(self, config: Config) -> Architecture:
        """The network whose multipliers are a configuration's own, whatever it costs."""
        gone, factors = self._shape(config)
        without = (*gone, *self._lacking(config))
        factors = {name: factors[name] for name in alive(self._session, factors, without)}
        editor, round_to = self._session.editor, self._session.goal.round_to
        floor, steps = floor_widths(editor, round_to), steps_of(editor, round_to)
        full = {name: self._full[name] for name in factors}
        widths = {n: rounded(factors[n] * w, steps[n], floor[n], w) for n, w in full.items()}
        return Architecture(tuple(gone), widths, self._inserted(config, gone))

    def _inserted(self, config: Config, gone: Sequence[str]) -> tuple[Pick, ...]:
        """The parts that a configuration has, in blocks that stay; none in a block that has one of the kind already."""
        return tuple(
            (site, BLOCKS[int(number)])
            for (stage, kind), number in self.domain.shares(config).items()
            if kind == "block"
            for site in self.stages[stage].sites
            if (site, BLOCKS[int(number)]) in self._parts and not inside(site, gone)
        )

    def _lacking(self, config: Config) -> tuple[str, ...]:
        """The names of the parts that a configuration does not have."""
        chosen = set(self._inserted(config, ()))
        return tuple(name for pick, name in self._parts.items() if pick not in chosen)

    def _shape(self, config: Config) -> tuple[list[str], dict[str, float]]:
        gone: list[str] = []
        factors: dict[str, float] = dict.fromkeys((g.name for g in self._session.editor.editable), 1.0)
        for (number, kind), share in self.domain.shares(config).items():
            stage = self.stages[number]
            if kind == "depth":
                gone += stage.blocks[: len(stage.blocks) - round(share * len(stage.blocks))]
            elif kind == "width":
                # Groups of blocks that have left since this space was laid out are there no more.
                factors |= {name: share for name in stage.groups if name in factors}
        return gone, factors
