"""One network that holds all candidates of a search over types of blocks: with every part in it that may be chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from robustcompress.budget import CostModel
from robustcompress.session import Goal, Session
from robustcompress.structure import StructuralEditor
from robustcompress.structure.groups import inside

Pick = tuple[str, str]
"""A block, and the kind of a part in it."""


class Dressed:
    """A copy of the network under compression with every part in it: a candidate is this network without some of them.

    So a candidate needs no trace of its own, and its cost is this network's without what it lacks.

    Args:
        session: The network, as it is now.
        kinds: Of parts that may be chosen; each is inserted into every block that can have it and has it not.

    Attributes:
        model: The copy.
        editor: Its editor.
        goal: What the run is for.
        costs: Predicts costs of the copy.
        parts: The name of each inserted part by block and kind.
    """

    def __init__(self, session: Session, kinds: Sequence[str]) -> None:
        self.goal: Goal = session.goal
        self.editor: StructuralEditor = session.editor.fork()
        had, blocks = self.editor.parts, self.editor.insertable
        self.editor.insert_all(
            (block, kind)
            for block in blocks
            for kind in kinds
            if not any(kind == known and inside(name, [block]) for name, known in had.items())
        )
        self.model: nn.Module = self.editor.model
        self.parts: Mapping[Pick, str] = {
            (block, kind): name
            for name, kind in self.editor.parts.items()
            if name not in had
            for block in blocks
            if inside(name, [block])
        }
        parameter = next(self.model.parameters())
        self.costs = CostModel(self.editor, torch.zeros(2, *self.goal.data.image_shape).to(parameter))
        self._limits = session.limits

    def fits(self, widths: Mapping[str, int], *, without: Sequence[str] = ()) -> bool:
        """Whether this network with these widths, and without these blocks and parts, keeps the budget."""
        macs, params = self.costs.predict(widths, without=without)
        return macs <= self._limits[0] and params <= self._limits[1]

    def lacking(self, inserted: Iterable[Pick]) -> tuple[str, ...]:
        """The parts that a network does not have which has only these."""
        chosen = set(inserted)
        return tuple(name for pick, name in self.parts.items() if pick not in chosen)
