"""What a strategy is, and the cut that many of them make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, Literal

import torch

from robustcompress.budget import Budget
from robustcompress.errors import Problems, nearest
from robustcompress.session import Session
from robustcompress.shapes import Widths, floor_widths
from robustcompress.structure import StructuralEditor

Direction = Literal["grow", "prune", "search", "none"]
Granularity = Literal["channel", "weight"]


class Strategy(ABC):
    """One way to a compact robust network. Abstract: each strategy is a final, frozen dataclass of its options.

    `run` is a deterministic script over phases: it trains, decides and edits through the session, keeps no state of its
    own outside it, draws its randomness from `session.generator`, and decides through `session.decide` wherever it
    looks at weights: so a killed run can be resumed.
    """

    name: ClassVar[str]
    direction: ClassVar[Direction]
    given_shape: ClassVar[bool] = False
    """Whether the widths are the caller's: a budget that the reference meets already is then no mistake."""

    @abstractmethod
    def run(self, session: Session) -> None:
        """Bring `session.model` under the budget and train it."""

    @property
    def granularity(self) -> Granularity:
        """What is removed: channels, or single weights, which become zeros in a network of the same shape."""
        return "channel"

    @property
    def finetunes(self) -> bool:
        """Whether a phase of fine-tuning follows a cut (`Session.finetune`), which may have a loss of its own."""
        return False

    @property
    def pretrains(self) -> bool:
        """Whether the reference is trained before it is cut, and so can teach what is left (`teacher.appoint`)."""
        return False

    def largest(self, widths: Widths) -> Widths:
        """The widest network this strategy can end with, given the reference's widths."""
        return dict(widths)

    def narrowest(self, editor: StructuralEditor, round_to: int) -> Widths:
        """The narrowest."""
        return floor_widths(editor, round_to)

    def objections(self, editor: StructuralEditor, budget: Budget) -> tuple[str, ...]:
        """What speaks against running it on this network under this budget; asked before anything takes long."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """The strategy's name and options as plain JSON."""
        options: dict[str, Any] = asdict(self) if is_dataclass(self) else {}
        return {"name": self.name, **options}

    def identity(self) -> dict[str, Any]:
        """What of it the weights depend on: a checkpoint belongs to a run in which this is the same."""
        return self.to_json()


def check_numbers(problems: Problems, strategy: Strategy, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Note options that are no number in their range; a range of two whole numbers wants a whole number."""
    for name, (low, high) in ranges.items():
        value, whole = getattr(strategy, name), isinstance(low, int)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            kind = "whole number" if whole else "number"
            problems.add(f"{name}={value!r}: must be a {kind} in [{low:g}, {high:g}]")


def check_choices(problems: Problems, strategy: Strategy, choices: Mapping[str, Collection[str]]) -> None:
    """Note options that are none of their choices."""
    for name, known in choices.items():
        value = getattr(strategy, name)
        if value not in known:
            problems.add(f"{name}={value!r} does not exist{nearest(str(value), known)}")


def prune_to(session: Session, widths: Mapping[str, int], scores: Mapping[str, torch.Tensor]) -> None:
    """Keep, in every group, as many channels as `widths` says: those with the largest scores."""
    prune_by(session, lambda: (widths, scores))


def prune_by(session: Session, choose: Callable[[], tuple[Mapping[str, int], Mapping[str, torch.Tensor]]]) -> None:
    """As `prune_to`, with widths and scores that are asked for once in all of a run, however often it is resumed."""
    from robustcompress.structure.gates import top_channels

    def keep() -> dict[str, list[int]]:
        widths, scores = choose()
        wanted = {group.name: widths.get(group.name, group.width) for group in session.editor.editable}
        now = session.editor.widths
        return {n: top_channels(scores[n], width).tolist() for n, width in wanted.items() if width < now[n]}

    for name, channels in session.decide("channels to keep", keep).items():
        session.editor.prune(name, channels)
    macs, params = session.cost_model.predict(session.editor.widths)
    session.record(
        {"phase": "prune", "event": "prune", "widths": session.editor.widths, "macs": macs, "params": params}
    )
