"""A given architecture trained from scratch: is it the shape that a method finds, or the way it gets there?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from robustcompress.budget import Budget, human
from robustcompress.errors import BudgetError, InputError, Problems, nearest
from robustcompress.session import Session
from robustcompress.shapes import Widths, fill_budget, floor_widths, largest, rounded, steps_of
from robustcompress.strategies.base import Direction, Strategy
from robustcompress.strategies.scratch import plant
from robustcompress.structure import AnyEdit, Bypass, Edit, Factorise, Insert, StructuralEditor
from robustcompress.structure.groups import inside

WIDEST = 8
"""No group may become wider than this multiple of the reference's width (as far as `grape` may grow)."""


class Compressed(Protocol):
    """As much of a result as `Fixed.of` looks at."""

    @property
    def model(self) -> nn.Module:
        """The compact network."""

    @property
    def edits(self) -> tuple[AnyEdit, ...]:
        """What led to it."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed(Strategy):
    """The final compact architecture retrained: given widths, trained from scratch for all epochs.

    The control of Liu et al. 2019 ("Rethinking the value of network pruning") and Crowley et al. 2018: a method whose
    architecture does as well from scratch found a shape, and nothing more.

        rc.compress(reference, rc.Fixed.of(rc.load("runs/hydra")))

    Attributes:
        widths: By group name (`robustcompress inspect` lists them); above the reference's width, up to 8 times it,
            channels are added before training. Groups that are not named share what the named ones leave of the
            budget, as in `uniform`.
        bypassed: Residual blocks that leave first, by name, in this order (see `StructuralEditor.bypass`).
        inserted: Parts that come before all else: pairs of a block and a kind (see `StructuralEditor.insert`).
    """

    name: ClassVar[str] = "fixed"
    direction: ClassVar[Direction] = "prune"
    given_shape: ClassVar[bool] = True
    widths: Mapping[str, int] = field(default_factory=dict)
    bypassed: tuple[str, ...] = ()
    inserted: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        problems = Problems("fixed cannot run")
        if not isinstance(self.widths, Mapping):
            problems.add(f"widths={self.widths!r}: give channels by group, such as {{'layer1.0.conv1': 48}}")
            problems.raise_if_any()
        for name, width in self.widths.items():
            if not isinstance(name, str) or type(width) is not int or width < 1:
                problems.add(f"widths[{name!r}]={width!r}: must be a whole number of channels, at least 1")
        listed = isinstance(self.bypassed, list | tuple) and all(isinstance(name, str) for name in self.bypassed)
        if not listed:
            problems.add(f"bypassed={self.bypassed!r}: give a list of block names, such as ['layers.0.1']")
        pairs = isinstance(self.inserted, list | tuple) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
            for pair in self.inserted
        )
        if not pairs:
            problems.add(f"inserted={self.inserted!r}: give pairs of block and kind, such as [['layers.0.1', 'se']]")
        problems.raise_if_any()
        object.__setattr__(self, "widths", dict(self.widths))  # its own, and plain for JSON
        object.__setattr__(self, "bypassed", tuple(self.bypassed))
        object.__setattr__(self, "inserted", tuple((block, kind) for block, kind in self.inserted))

    def __hash__(self) -> int:
        return hash((self.name, *sorted(self.widths.items()), *self.bypassed, *self.inserted))

    @classmethod
    def of(cls, result: Compressed) -> Fixed:
        """The architecture that a compression ended with.

        Args:
            result: What `compress` returned or `load` read. Compress the same reference again to retrain it.

        Raises:
            InputError: Layers were factorised there, which this cannot begin with.
        """
        if factors := [edit.module for edit in result.edits if isinstance(edit, Factorise)]:
            raise InputError(f"fixed cannot retrain it: {', '.join(factors)} were factorised after the training began")
        editor = StructuralEditor(result.model, torch.zeros(2, *result.image_shape))
        bypassed = tuple(edit.module for edit in result.edits if isinstance(edit, Bypass))
        widths = {group.name: group.width for group in editor.editable}
        for edit in result.edits:
            # A group of a block that left is not there to be given a width, though it may have had one.
            if isinstance(edit, Edit) and edit.group not in editor.layout.outputs and not inside(edit.group, bypassed):
                widths[edit.group] = len(edit.sources)
        inserted = tuple((edit.module, edit.kind) for edit in result.edits if isinstance(edit, Insert))
        return cls(widths=widths, bypassed=bypassed, inserted=inserted)

    def objections(self, editor: StructuralEditor, budget: Budget) -> tuple[str, ...]:
        """Inserted parts need a budget that does not limit latency."""
        if self.inserted and budget.limits_latency:
            return ("inserted: the time of parts is not predicted; limit multiply-adds or parameters instead",)
        return ()

    def identity(self) -> dict[str, Any]:
        """Checkpoints from before parts could be inserted go on."""
        options = self.to_json()
        return options if self.inserted else {name: value for name, value in options.items() if name != "inserted"}

    def largest(self, widths: Widths) -> Widths:
        """The given widths, where they are wider."""
        return {name: max(width, self.widths.get(name, 0)) for name, width in widths.items()}

    def run(self, session: Session) -> None:
        """Take the shape, then train.

        Raises:
            InputError: A block that cannot leave, a group that does not exist or cannot be edited, or a width out of
                range; all are listed.
            BudgetError: The network is over the budget. Nothing was trained in either case.
        """
        self._shorten(session)
        plant(session, self._complete(session))
        cost, budget = session.cost(), session.goal.budget
        if not budget.allows(cost, session.goal.reference):
            raise BudgetError(
                f"fixed: these widths cost {human(cost.macs)} MACs and {human(cost.params)} parameters, over {budget}; "
                "give smaller widths, or raise the budget"
            )
        latency = session.latency
        if latency is not None and latency.measured is not None and latency.missed:
            raise BudgetError(
                f"fixed: these widths take {latency.measured:.3g} ms, over {latency.limit:.3g} ms ({budget}); give "
                "smaller widths, or raise the budget"
            )
        session.train("train", share=1.0, select=True)

    def _shorten(self, session: Session) -> None:
        """Put parts in and take blocks out, and check the widths against the groups that there are then."""
        problems = Problems("fixed cannot run")
        problems.attempt(partial(session.editor.insert_all, self.inserted))
        for module in self.bypassed:
            problems.attempt(partial(session.editor.bypass, module))
        groups = session.editor.groups
        for name, width in self.widths.items():
            if name not in groups:
                problems.add(f"widths[{name!r}]: there is no such channel group{nearest(name, groups)}")
            elif groups[name].reason:
                problems.add(f"widths[{name!r}]: the group cannot be edited: {groups[name].reason}")
            elif not groups[name].min_width <= width <= WIDEST * groups[name].width:
                least, most = groups[name].min_width, WIDEST * groups[name].width
                problems.add(f"widths[{name!r}]={width}: must be in [{least}, {most}]")
        problems.raise_if_any()

    def _complete(self, session: Session) -> Widths:
        """The given widths, and one ratio for the groups that are not named."""
        editor, round_to = session.editor, session.goal.round_to
        floor, steps = floor_widths(editor, round_to), steps_of(editor, round_to)
        rest = {g.name: g.width for g in session.editor.editable if g.name not in self.widths}
        given = dict(self.widths)

        def widths_at(ratio: float) -> Widths:
            return given | {
                name: rounded(ratio * width, steps[name], floor[name], width) for name, width in rest.items()
            }

        return session.choose(
            "widths of the groups not named", lambda: fill_budget(session, largest(session, widths_at), rest)
        )
