"""A run under a budget: which widths it may have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from robustcompress.budget import CostModel
from robustcompress.checkpoint import Journal
from robustcompress.distributed import ALONE, World
from robustcompress.errors import InputError
from robustcompress.goal import Goal
from robustcompress.latency import LatencyLimit
from robustcompress.run import Run
from robustcompress.structure import StructuralEditor
from robustcompress.train import Progress


class BudgetedRun(Run):
    """A run that knows what its network may cost. Abstract: a `Session` is one.

    Args:
        editor: The network's editor.
        example: One image batch of the right shape, on the network's device.
        goal: What the run is for.
        progress: Where progress is shown.
        on_record: Called with every record of the history as it is written.
        journal: Where the run is recorded, to be resumed from there; None for nowhere.
        world: The processes that carry the run out together.

    Attributes:
        editor: The only way to change the network's shape.
        goal: What the run is for.
        cost_model: Predicts the cost of any widths.
        latency: The limit on latency; None where the budget says nothing about it.
    """

    def __init__(
        self,
        editor: StructuralEditor,
        example: torch.Tensor,
        goal: Goal,
        *,
        progress: Progress | None = None,
        on_record: Callable[[dict[str, Any]], None] | None = None,
        journal: Journal | None = None,
        world: World = ALONE,
    ) -> None:
        super().__init__(goal.seed + 1, progress=progress, on_record=on_record, journal=journal, world=world)
        self.editor = editor
        self.goal = goal
        self.cost_model = CostModel(editor, example)
        self.latency: LatencyLimit | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """The absolute limits on MACs and parameters."""
        return self.goal.budget.limits(self.goal.reference)

    def fits(self, widths: Mapping[str, int], *, without: Sequence[str] = ()) -> bool:
        """Whether the network with these widths, and without these blocks, keeps the budget.

        Raises:
            InputError: Latency is limited, and parts were inserted, of which the predictor does not know.
        """
        if self.latency is not None and self.editor.inserted:
            raise InputError(
                "a limit on latency cannot be kept here: parts were inserted, whose time is not predicted; give a "
                "budget in multiply-adds or parameters"
            )
        if not self._affords(widths, without):
            return False
        return self.latency is None or self.latency.predict(widths, without=without) <= self.latency.limit

    def _affords(self, widths: Mapping[str, int], without: Sequence[str] = ()) -> bool:
        macs, params = self.cost_model.predict(widths, without=without)
        return macs <= self.limits[0] and params <= self.limits[1]

    def choose(self, name: str, pick: Callable[[], dict[str, int]]) -> dict[str, int]:
        """Choose widths that `fits` accepts; where latency is limited, until the network that they make is measured so.

        A decision like those of `decide`, and not to be made within one.

        Args:
            name: What they are for, for messages.
            pick: Chooses; asked again after `fits` was corrected by a measurement. Draws nothing.
        """
        if self.latency is None:
            return pick()
        return self.latency.settle(name, pick, decide=self.decide, say=self.say, allows=self._affords)
