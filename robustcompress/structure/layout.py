"""Where each group's channels lie on each axis: the arithmetic between channels and positions, in one place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from robustcompress.structure.groups import Axis, ChannelGroup, Kind, Segment, inside


@dataclass(frozen=True, slots=True)
class Layout:
    """The structure of a network, by name.

    Attributes:
        groups: Every channel group, in the model's own order.
        axes: For each axis that a group touches, the runs it is made of, in order.
        param_dims: For each plain parameter that holds channels, the dimension they lie along.
        output: The name of the group that holds the logits.
        attention: For each group of heads, the attention module that counts them.
        norm_dims: For each norm that takes its statistics over channels, the dimension of its input that holds them.
        counts: For each group that modules other than layers count, those modules and their attributes.
        across: For each layer that is applied once for each position along another dimension, the runs along that one.
        auxiliary: The layers that are called in training mode only.
    """

    groups: Mapping[str, ChannelGroup]
    axes: Mapping[Axis, tuple[Segment, ...]]
    param_dims: Mapping[str, int]
    output: str
    attention: Mapping[str, str] = field(default_factory=dict)
    norm_dims: Mapping[Axis, int] = field(default_factory=dict)
    counts: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    across: Mapping[str, tuple[tuple[Segment, ...], ...]] = field(default_factory=dict)
    auxiliary: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The groups that hold logits: those of the network, and those that only training asks for."""
        return tuple(name for name, group in self.groups.items() if group.kind == "output")

    def heard_in_training_only(self, group: str) -> bool:
        """Whether all that read a group are called in training mode only."""
        readers = self.groups[group].readers
        return bool(self.auxiliary and readers) and all(axis.module in self.auxiliary for axis in readers)

    def widths(self) -> dict[str, int]:
        """The traced width of every group."""
        return {name: group.width for name, group in self.groups.items()}

    def axis_width(self, axis: Axis, widths: Mapping[str, int]) -> int:
        """The number of positions along `axis` when the groups have these `widths`."""
        return span_width(self.axes[axis], widths)

    def index(self, axis: Axis, group: str, sources: Sequence[int], widths: Mapping[str, int]) -> torch.Tensor:
        """Turn an edit of channels into a gather of positions.

        Args:
            axis: The axis to gather.
            group: The group that changes.
            sources: Its new channels, as old channel numbers or `NEW`.
            widths: The widths of all groups *before* the edit.

        Returns:
            Int64 `[new positions]`: old positions, or -1 where a channel is fresh.
        """
        channels = torch.as_tensor(sources, dtype=torch.long)
        pieces: list[torch.Tensor] = []
        offset = 0
        for segment in self.axes[axis]:
            width = widths[segment.group] if segment.group is not None else 0
            span = segment.positions(width)
            if segment.group == group:
                pieces.append(_positions(segment, channels, offset))
            else:
                pieces.append(torch.arange(offset, offset + span))
            offset += span
        return torch.cat(pieces)

    def owners(self, axis: Axis, group: str, widths: Mapping[str, int]) -> torch.Tensor:
        """Int64 `[positions]`: the channel of `group` that owns each position of `axis`, or -1 where another does."""
        pieces: list[torch.Tensor] = []
        for segment in self.axes[axis]:
            width = widths[segment.group] if segment.group is not None else 0
            if segment.group == group:
                pieces.append(spread(torch.arange(width), segment))
            else:
                pieces.append(torch.full((segment.positions(width),), -1, dtype=torch.long))
        return torch.cat(pieces)

    def at_least(self, widths: Mapping[str, int]) -> Layout:
        """The same structure, with these groups at least so wide."""
        groups = {name: replace(g, min_width=widths.get(name, g.min_width)) for name, g in self.groups.items()}
        return replace(self, groups=groups)

    def renamed(self, names: Mapping[str, str]) -> Layout:
        """The same structure, with other names for these groups."""

        def called(name: str) -> str:
            return names.get(name, name)

        def spans(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
            return tuple(s if s.group is None else replace(s, group=called(s.group)) for s in segments)

        return replace(
            self,
            groups={called(name): replace(group, name=called(name)) for name, group in self.groups.items()},
            axes={axis: spans(segments) for axis, segments in self.axes.items()},
            output=called(self.output),
            attention={called(name): owner for name, owner in self.attention.items()},
            counts={called(name): counted for name, counted in self.counts.items()},
            across={name: tuple(spans(segments) for segments in several) for name, several in self.across.items()},
        )

    def without(self, module: str, widths: Mapping[str, int]) -> Layout:
        """The structure that is left when a module is replaced by the identity.

        What lived inside goes with it; other groups lose the members that did, and keep their names. A group that
        nothing writes any more can never change again: where it is read, its positions become fixed ones.

        Args:
            module: The module's name.
            widths: The present widths of all groups.
        """
        axes = {axis: runs for axis, runs in self.axes.items() if not inside(axis.module, [module])}
        written = {name for name, group in self.groups.items() if any(axis in axes for axis in group.writers)}
        axes = {axis: tuple(_settled(s, written, widths) for s in segments) for axis, segments in axes.items()}
        return Layout(
            {name: _remaining(group, axes) for name, group in self.groups.items() if name in written},
            axes,
            {name: dim for name, dim in self.param_dims.items() if not inside(name, [module])},
            self.output,
            {name: owner for name, owner in self.attention.items() if name in written},
            {axis: dim for axis, dim in self.norm_dims.items() if axis in axes},
            {name: counted for name, counted in self.counts.items() if name in written},
            {
                name: tuple(tuple(_settled(s, written, widths) for s in spans) for spans in several)
                for name, several in self.across.items()
                if not inside(name, [module])
            },
            tuple(name for name in self.auxiliary if not inside(name, [module])),
        )


def _settled(segment: Segment, written: Collection[str], widths: Mapping[str, int]) -> Segment:
    if segment.group is None or segment.group in written:
        return segment
    return Segment(None, fixed=segment.positions(widths[segment.group]))


def _remaining(group: ChannelGroup, axes: Mapping[Axis, tuple[Segment, ...]]) -> ChannelGroup:
    """The group with those of its members that are still there, and what it now is."""
    writers, readers, passers = (
        tuple(axis for axis in members if axis in axes) for members in (group.writers, group.readers, group.passers)
    )
    if (writers, readers, passers) == (group.writers, group.readers, group.passers):
        return group
    kind: Kind = group.kind
    if kind in ("residual", "concat"):
        shared = any(len({s.group for s in axes[axis]} - {None}) > 1 for axis in (*writers, *readers))
        kind = "concat" if shared else "residual" if len(writers) > 1 else "hidden"
    if not readers and not group.reason:
        return replace(group, kind="frozen", writers=writers, readers=(), passers=passers, reason="nothing reads it")
    return replace(group, kind=kind, writers=writers, readers=readers, passers=passers)


def span_width(segments: Sequence[Segment], widths: Mapping[str, int]) -> int:
    """The number of positions of these runs when the groups have these `widths`."""
    return sum(s.positions(widths[s.group] if s.group is not None else 0) for s in segments)


def spread(values: torch.Tensor, segment: Segment) -> torch.Tensor:
    """Lay one value a channel (`[C]`) out over the positions of a segment (`[C * copies]`), keeping gradients."""
    return values if segment.copies == 1 else values.repeat_interleave(segment.copies)


def _positions(segment: Segment, channels: torch.Tensor, offset: int) -> torch.Tensor:
    positions = offset + channels[:, None] * segment.copies + torch.arange(segment.copies)[None, :]
    return positions.masked_fill((channels < 0)[:, None], -1).flatten()


def runs(
    owners: torch.Tensor, channels: torch.Tensor, names: Sequence[str], widths: Mapping[str, int]
) -> tuple[Segment, ...] | None:
    """Read the owners of an axis's positions, in order, as segments.

    Args:
        owners: Int64 `[positions]`: the number of the group that owns each, or -1.
        channels: Int64 `[positions]`: its channel there.
        names: The groups' names.
        widths: The width of each group.

    Returns:
        The segments, or None when some group's channels do not lie in their order.
    """
    changes = torch.ones(len(owners), dtype=torch.bool)
    changes[1:] = (owners[1:] != owners[:-1]) | ((channels[1:] != channels[:-1]) & (owners[1:] >= 0))
    starts = [*changes.nonzero().flatten().tolist(), len(owners)]
    following = dict(pairwise(starts))
    segments: list[Segment] = []
    start = 0
    while start < len(owners):
        stop = following.get(start)
        if stop is None:
            return None
        owner = int(owners[start])
        if owner < 0:
            segments.append(Segment(None, fixed=stop - start))
        else:
            copies, width = stop - start, widths[names[owner]]
            stop = start + copies * width
            expected = torch.arange(width).repeat_interleave(copies)
            if (
                stop > len(owners)
                or not torch.equal(channels[start:stop], expected)
                or bool((owners[start:stop] != owner).any())
            ):
                return None
            segments.append(Segment(names[owner], copies))
        start = stop
    return tuple(segments)
