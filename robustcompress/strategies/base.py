"""What a strategy is, and the arithmetic that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, Literal

import torch

from robustcompress.errors import Problems
from robustcompress.session import Session
from robustcompress.structure import StructuralEditor
from robustcompress.structure.kinds import magnitudes_of

Direction = Literal["grow", "prune", "search", "none"]
Granularity = Literal["channel", "weight"]
Widths = dict[str, int]


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

    def largest(self, widths: Widths) -> Widths:
        """The widest network this strategy can end with, given the reference's widths."""
        return dict(widths)

    def narrowest(self, editor: StructuralEditor, round_to: int) -> Widths:
        """The narrowest."""
        return floor_widths(editor, round_to)

    def to_json(self) -> dict[str, Any]:
        """The strategy's name and options as plain JSON."""
        options: dict[str, Any] = asdict(self) if is_dataclass(self) else {}
        return {"name": self.name, **options}


def check_numbers(problems: Problems, strategy: Strategy, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Note options that are no number in their range; a range of two whole numbers wants a whole number."""
    for name, (low, high) in ranges.items():
        value, whole = getattr(strategy, name), isinstance(low, int)
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            kind = "whole number" if whole else "number"
            problems.add(f"{name}={value!r}: must be a {kind} in [{low:g}, {high:g}]")


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
    session: Session, factors: Mapping[str, float], *, cap: float = 1.0, without: Sequence[str] = ()
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
    caps = {name: max(floor[name], int(cap * width)) for name, width in full.items()}

    def widths_at(ratio: float) -> Widths:
        return {n: rounded(ratio * factors[n] * width, steps[n], floor[n], caps[n]) for n, width in full.items()}

    widths = largest(session, widths_at, high=cap, without=without)
    ruled = {name: max(widths[name], int(factors[name] * caps[name])) for name in full}
    return fill_budget(session, fill_budget(session, widths, ruled, without=without), caps, without=without)


def largest(
    session: Session, widths_at: Callable[[float], Widths], high: float = 1.0, *, without: Sequence[str] = ()
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
    session: Session,
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


def group_norms(editor: StructuralEditor) -> dict[str, torch.Tensor]:
    """Euclidean norm of all weights that touch each channel: its rows, its columns and the scales of its norms.

    Returns:
        Per editable group, `[C]` on the CPU.
    """
    norms: dict[str, torch.Tensor] = {}
    for group in editor.editable:
        total = torch.zeros(group.width, dtype=torch.float64)
        for axis in group.members:
            if axis.side == "param":
                continue
            module = editor.model.get_submodule(axis.module)
            owners = editor.layout.owners(axis, group.name, editor.widths)
            for name, dim in magnitudes_of(module, axis.side):
                weight = module.get_parameter(name).detach().double().cpu()
                squares = weight.square().movedim(dim, 0).flatten(1).sum(1) if weight.dim() > 1 else weight.square()
                total.index_add_(0, owners[owners >= 0], squares[owners >= 0])
        norms[group.name] = total.sqrt()
    return norms


def reader_norms(editor: StructuralEditor, *, only: Collection[str]) -> dict[str, torch.Tensor]:
    """Sum of the magnitudes of all weights that read each channel, over outputs and kernel (HARP's first scores).

    Args:
        editor: Of the network.
        only: Which groups.

    Returns:
        Per group, `[C]` on the CPU.
    """
    norms = {name: torch.zeros(editor.groups[name].width, dtype=torch.float64) for name in only}
    for name, total in norms.items():
        for axis in editor.groups[name].readers:
            module = editor.model.get_submodule(axis.module)
            owners = editor.layout.owners(axis, name, editor.widths)
            for tensor, dim in magnitudes_of(module, axis.side):
                sums = module.get_parameter(tensor).detach().double().cpu().abs().movedim(dim, 0).flatten(1).sum(1)
                total.index_add_(0, owners[owners >= 0], sums[owners >= 0])
    return norms


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
