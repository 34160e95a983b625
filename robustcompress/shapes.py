"""Widths that meet a budget: the arithmetic that all strategies share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from torch import nn

from robustcompress.session import Goal, Session
from robustcompress.structure import StructuralEditor

Widths = dict[str, int]


class Network(Protocol):
    """As much of a session as widths are chosen by."""

    @property
    def model(self) -> nn.Module:
        """The network."""

    @property
    def editor(self) -> StructuralEditor:
        """Its editor."""

    @property
    def goal(self) -> Goal:
        """What the run is for."""

    def fits(self, widths: Mapping[str, int], *, without: Sequence[str] = ()) -> bool:
        """Whether the network with these widths, and without these modules, keeps the budget."""


def steps_of(editor: StructuralEditor, round_to: int) -> Widths:
    """By group, of what its widths are multiples: `round_to` channels, or one attention head, which is many."""
    return {group.name: 1 if group.kind == "heads" else round_to for group in editor.editable}


def floor_widths(editor: StructuralEditor, round_to: int) -> Widths:
    """The narrowest network that editing may leave."""
    steps = steps_of(editor, round_to)
    return {group.name: min(group.width, max(group.min_width, steps[group.name])) for group in editor.editable}


def rounded(width: float, round_to: int, low: int, high: int) -> int:
    """The multiple of `round_to` nearest to `width` within [low, high]; `high` itself from there on."""
    if width >= high:
        return high
    return int(min(high, max(low, round(width / round_to) * round_to)))


def capped(widths: Mapping[str, int], cap: float, steps: Mapping[str, int] | None = None) -> Widths:
    """The widest that groups may become: `cap` times their width, or their width itself where that is more.

    Args:
        widths: By group.
        cap: Multiple of the width.
        steps: By group, of what widths above the given one are multiples; 1 by default.
    """
    steps = steps or dict.fromkeys(widths, 1)
    return {name: max(width, int(cap * width) // steps[name] * steps[name]) for name, width in widths.items()}


def uniform_widths(session: Session, *, only: Collection[str] | None = None) -> Widths:
    """Every group scaled by one ratio, the largest that keeps the budget (MobileNet's width multiplier).

    Args:
        session: Knows the network and the budget.
        only: The groups that may change; all by default.
    """
    editor, round_to = session.editor, session.goal.round_to
    floor, steps = floor_widths(editor, round_to), steps_of(editor, round_to)
    full = {group.name: group.width for group in editor.editable if only is None or group.name in only}

    def widths_at(ratio: float) -> Widths:
        return {name: rounded(ratio * width, steps[name], floor[name], width) for name, width in full.items()}

    return session.choose("uniform widths", lambda: fill_budget(session, largest(session, widths_at), full))


def shaped_widths(
    session: Network, factors: Mapping[str, float], *, cap: float = 1.0, without: Sequence[str] = ()
) -> Widths:
    """A shape brought to the budget: every group scaled by one ratio times its own factor, the largest that keeps it.

    What rounding leaves goes first to whoever it put furthest behind the shape. Where the widest groups come to their
    cap, what is left of the budget widens the others past their factors.

    Args:
        session: Knows the network and the budget.
        factors: By group, what counts is how they relate; groups that are not named stay as wide as they are.
        cap: No group becomes wider than this multiple of its width.
        without: Blocks to reckon without; groups within them are best not named.
    """
    editor, round_to = session.editor, session.goal.round_to
    floor, steps = floor_widths(editor, round_to), steps_of(editor, round_to)
    full = {group.name: group.width for group in editor.editable if group.name in factors}
    most = max(factors.values(), default=1.0)
    factors = {name: factor / most for name, factor in factors.items()}
    caps = capped(full, cap, steps)

    def widths_at(ratio: float) -> Widths:
        return {n: rounded(ratio * factors[n] * width, steps[n], floor[n], caps[n]) for n, width in full.items()}

    widths = largest(session, widths_at, high=cap, without=without)
    ruled = {name: max(widths[name], int(factors[name] * caps[name])) for name in full}
    return fill_budget(session, fill_budget(session, widths, ruled, without=without), caps, without=without)


def largest(
    session: Network, widths_at: Callable[[float], Widths], high: float = 1.0, *, without: Sequence[str] = ()
) -> Widths:
    """Bisect for the largest ratio in [0, high] whose widths keep the budget."""
    low = 0.0
    if session.fits(widths_at(high), without=without):
        return widths_at(high)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if session.fits(widths_at(middle), without=without) else (low, middle)
    return widths_at(low)


def fill_budget(
    session: Network,
    widths: Widths,
    caps: Mapping[str, int],
    order: list[str] | None = None,
    *,
    without: Sequence[str] = (),
) -> Widths:
    """Spend what rounding left of the budget: widen one group at a time, the most wanted first, while it fits.

    Args:
        session: Knows the budget.
        widths: Where to start; must fit.
        caps: The widest each group may become.
        order: Groups from most to least wanted; by default those that lost the largest share come first.
        without: Blocks to reckon without.
    """
    widths, steps = dict(widths), steps_of(session.editor, session.goal.round_to)
    full = session.editor.widths
    open_groups = set(caps)
    while open_groups:
        if order is None:
            name = min(open_groups, key=lambda n: (widths[n] / caps[n], n))
        else:
            name = next(n for n in order if n in open_groups)
        width = widths[name] + steps[name]
        if widths[name] < caps[name] < width and caps[name] == full[name]:
            width = caps[name]  # the whole group, whose width may be no multiple
        wider = {**widths, name: width}
        if width <= caps[name] and session.fits(wider, without=without):
            widths = wider
        else:
            open_groups.discard(name)
    return widths
