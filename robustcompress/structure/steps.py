"""One operation that autograd recorded: what goes into it, and what is found out from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from robustcompress.structure.labels import NONE, Label, Shape, aligned

Labels = tuple[Label, ...]


class Ledger(Protocol):
    """What is found out on the way."""

    def couple(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Note that the units at the same places of two tensors of ids (broadcast) can only change together."""

    def part(self, units: torch.Tensor) -> None:
        """Note that units passed a chunk, a split or a slice along their own dimension."""

    def hide(self, units: torch.Tensor) -> None:
        """Note that units went where they cannot be followed."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One input of an operation: its labels, and its shape; None for a tensor that autograd does not know."""

    labels: Labels
    shape: Shape | None


@dataclass(frozen=True, slots=True)
class Step:
    """One operation.

    Attributes:
        function: Autograd's node, whose saved attributes are read.
        operands: Its inputs, in order.
        shapes: The shape of each output.
        number: The output that is asked for.
        ledger: Where findings go.
    """

    function: Any
    operands: tuple[Operand, ...]
    shapes: tuple[Shape, ...]
    number: int
    ledger: Ledger

    @property
    def shape(self) -> Shape:
        """The shape of the output that is asked for."""
        return self.shapes[self.number]

    @property
    def first(self) -> Operand:
        """The only operand of most operations."""
        return self.operands[0]

    def saved(self, name: str) -> Any:
        """An argument that autograd kept."""
        return getattr(self.function, f"_saved_{name}")

    def dim(self, value: int, rank: int) -> int:
        """A dimension counted from the front; autograd keeps negative ones unsigned."""
        value = signed(value)
        return value + rank if value < 0 else value


def join(operands: Sequence[Operand], shape: Shape, ledger: Ledger) -> Labels:
    """Labels of an elementwise result: units at one place are coupled; what is broadcast along its units is not."""
    found: list[Label] = []
    for operand in operands:
        for label in operand.labels:
            label = aligned(label, len(shape))
            inside = (1,) * (len(shape) - len(operand.shape or ())) + (operand.shape or ())
            if any(inside[d] == 1 < shape[d] for d in label.live):
                continue
            for number, other in enumerate(found):
                if not other.live.isdisjoint(label.live):
                    found[number] = _met(other, label, ledger)
                    break
            else:
                found.append(label)
    return tuple(found)


def _met(one: Label, other: Label, ledger: Ledger) -> Label:
    ledger.couple(one.ids, other.ids)
    whole = [label for label in (one, other) if bool((label.ids != NONE).all())]
    if whole:  # the other's units are the same ones
        return min(whole, key=lambda label: label.ids.numel())
    return Label(torch.where(one.ids != NONE, one.ids, other.ids), one.live | other.live)


def each(step: Step, change: Callable[[Label], Label | None]) -> Labels:
    """The labels of an operation's only operand, each changed; None where it is lost."""
    changed = [change(label) for label in step.first.labels]
    return tuple(label for label in changed if label is not None)


def hide(step: Step) -> Labels:
    """Set aside all that goes in."""
    for operand in step.operands:
        for label in operand.labels:
            step.ledger.hide(label.units())
    return ()


def signed(value: int) -> int:
    """A number that autograd keeps unsigned."""
    return int(value) - (1 << 64) if int(value) >= 1 << 63 else int(value)
