"""Plain data that says which tensor slices change together. Holds names, never modules, so it outlives edits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Side = Literal["out", "in", "both", "param"]
Kind = Literal["hidden", "residual", "concat", "split", "heads", "output", "frozen"]

NEW = -1
"""The source of a channel that did not exist before."""

MAX_WIDTH = 1 << 20
"""No group read from a file may have more channels: a damaged record must not exhaust the memory."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One side of one layer: what a convolution writes ("out"), reads ("in"), or what a batch norm does both with.

    Attributes:
        module: Qualified module name; for a plain parameter, the parameter's qualified name.
        side: "out", "in", "both" (batch norm, depthwise convolution, PReLU), or "param".
    """

    module: str
    side: Side


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of positions along an axis that holds each channel of one group once, in order, or of none.

    A group may have several runs on one axis: a convolution in front of a two-way chunk writes two.

    Attributes:
        group: The group's name; None for positions that never change (for example the image's own channels).
        copies: Positions per channel, side by side: 1 usually, H*W behind a flatten, a head's width for a head.
        fixed: The number of positions, for a run that belongs to no group.
    """

    group: str | None
    copies: int = 1
    fixed: int = 0

    def positions(self, width: int) -> int:
        """The number of positions this run takes while the group has `width` channels."""
        return width * self.copies if self.group is not None else self.fixed


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that are written, normalised and read together, so that they can only change together.

    Attributes:
        name: The first layer that writes the group, in the model's own order ("layer1.0.conv1").
        width: The number of channels now.
        kind: "hidden" (one writer), "residual" (several, joined by addition or product), "concat" (read beside other
            groups on one axis), "split" (one writer, several equal parts), "heads" (a channel is an attention head),
            "output" (the model's logits), or "frozen".
        writers: Layers whose output axis holds the group.
        readers: Layers whose input axis holds it.
        passers: Layers and parameters through which each channel passes by itself.
        min_width: The fewest channels it can have.
        reason: Why the group cannot be edited; empty when it can.
        exact: Whether removing a channel changes no more than silencing its readers would, and adding one that nothing
            reads changes nothing. Not so where a layer norm takes its statistics over the channels: the others move.
    """

    name: str
    width: int
    kind: Kind
    writers: tuple[Axis, ...]
    readers: tuple[Axis, ...]
    passers: tuple[Axis, ...]
    min_width: int = 1
    reason: str = ""
    exact: bool = True

    @property
    def editable(self) -> bool:
        """Whether `resize` accepts this group."""
        return not self.reason

    @property
    def members(self) -> tuple[Axis, ...]:
        """Every axis that changes with the group: writers, passers, then readers."""
        return self.writers + self.passers + self.readers


@dataclass(frozen=True, slots=True)
class Edit:
    """One structural edit as it is replayed and saved: new channel `i` is old channel `sources[i]`, fresh where `NEW`.

    Attributes:
        group: The group's name.
        sources: Old channel numbers, in their new order.
        init: How fresh channels began ("pair", "zero_out", "clone", "kaiming"); None for a pure gather.
        share: Whether a channel that appears several times divides its readers' weights among its copies (Net2Wider).
    """

    result_format: ClassVar[int] = 1
    """The oldest format of saved results that can hold it; so for the other edits."""
    group: str
    sources: tuple[int, ...]
    init: str | None = None
    share: bool = False

    def to_json(self) -> dict[str, Any]:
        """The edit as plain JSON; runs of consecutive sources are kept as [first, last] pairs."""
        return {"group": self.group, "sources": _pack(self.sources), "init": self.init, "share": self.share}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Edit:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The record cannot have been written by it, or asks for more channels than any layer has.
        """
        init = data.get("init")
        known = isinstance(data["group"], str) and isinstance(data["sources"], list) and isinstance(init, str | None)
        if not known:
            raise ValueError(f"not an edit: {str(data)[:200]}")
        return cls(data["group"], _unpack(data["sources"]), init, data.get("share", False) is True)


@dataclass(frozen=True, slots=True)
class Bypass:
    """One edit of the depth as it is replayed and saved: a residual block became the identity.

    Attributes:
        module: The block's name.
    """

    result_format: ClassVar[int] = 2
    module: str

    def to_json(self) -> dict[str, Any]:
        """The edit as plain JSON."""
        return {"bypass": self.module}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Bypass:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The record cannot have been written by it.
        """
        if set(data) != {"bypass"} or not isinstance(data["bypass"], str) or not data["bypass"]:
            raise ValueError(f"not a bypass: {str(data)[:200]}")
        return cls(data["bypass"])


@dataclass(frozen=True, slots=True)
class Insert:
    """One inserted part as it is replayed and saved (see `StructuralEditor.insert`).

    Attributes:
        module: The block in whose residual branch it stands.
        kind: "se" or "rir" (see `parts`).
        width: Its hidden channels at first.
    """

    result_format: ClassVar[int] = 3
    module: str
    kind: str
    width: int

    def to_json(self) -> dict[str, Any]:
        """The edit as plain JSON."""
        return {"insert": self.module, "kind": self.kind, "width": self.width}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Insert:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The record cannot have been written by it, or asks for more channels than any layer has.
        """
        named = set(data) == {"insert", "kind", "width"} and isinstance(data["insert"], str) and data["insert"]
        if not named or not isinstance(data["kind"], str) or type(data["width"]) is not int:
            raise ValueError(f"not an insertion: {str(data)[:200]}")
        if not 1 <= data["width"] <= MAX_WIDTH:
            raise ValueError(f"{data['width']} hidden channels: a part has 1 to {MAX_WIDTH}")
        return cls(data["insert"], data["kind"], data["width"])


@dataclass(frozen=True, slots=True)
class Factorise:
    """One layer that became a product of smaller ones, as it is replayed and saved (see `factors`).

    Attributes:
        module: The layer.
        kind: "tucker" (Kim et al. 2016, section 3.1), "cp" (Lebedev et al. 2015, section 3) or "svd".
        ranks: Of outputs and of inputs, `(r_out, r_in)`, for "tucker"; one, `(R,)`, for the others. Later they
            are channel groups like any.
    """

    result_format: ClassVar[int] = 4
    module: str
    kind: str
    ranks: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The edit as plain JSON."""
        return {"factorise": self.module, "kind": self.kind, "ranks": list(self.ranks)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Factorise:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The record cannot have been written by it, or asks for more channels than any layer has.
        """
        named = set(data) == {"factorise", "kind", "ranks"} and isinstance(data["factorise"], str)
        if not named or not data["factorise"] or not isinstance(data["kind"], str):
            raise ValueError(f"not a factorisation: {str(data)[:200]}")
        ranks = data["ranks"]
        if not isinstance(ranks, list) or not 1 <= len(ranks) <= 2 or any(type(rank) is not int for rank in ranks):
            raise ValueError(f"not the ranks of a factorisation: {str(ranks)[:200]}")
        if not all(1 <= rank <= MAX_WIDTH for rank in ranks):
            raise ValueError(f"ranks {ranks}: each is 1 to {MAX_WIDTH}")
        return cls(data["factorise"], data["kind"], tuple(ranks))


AnyEdit = Edit | Bypass | Insert | Factorise
"""Whatever may stand in a list of edits: one of width, of depth, of the type of a block, or of a layer's factors."""


def edit_from_json(data: dict[str, Any]) -> AnyEdit:
    """Read an edit of any kind.

    Raises:
        ValueError: It is none.
    """
    if "insert" in data:
        return Insert.from_json(data)
    if "factorise" in data:
        return Factorise.from_json(data)
    return Bypass.from_json(data) if "bypass" in data else Edit.from_json(data)


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of these modules, or lies in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def batches_of(edits: Iterable[AnyEdit]) -> Iterator[list[AnyEdit]]:
    """Edits in their order: neighbours that are traced at once together, any other by itself.

    A factor that is factorised again begins another batch, since it is there only after the one before.
    """
    batch: list[AnyEdit] = []
    for edit in edits:
        joins = bool(batch) and type(edit) is type(batch[-1]) and isinstance(edit, Insert | Factorise)
        if joins and isinstance(edit, Factorise):
            before = {other.module for other in batch if isinstance(other, Factorise)} - {edit.module}
            joins = not inside(edit.module, before)
        if batch and not joins:
            yield batch
            batch = []
        batch.append(edit)
    if batch:
        yield batch


def _pack(sources: tuple[int, ...]) -> list[int | list[int]]:
    packed: list[int | list[int]] = []
    start = 0
    while start < len(sources):
        stop = start
        step = 0 if sources[start] == NEW else 1
        while stop + 1 < len(sources) and sources[stop + 1] == sources[stop] + step:
            stop += 1
        if step and stop > start:
            packed.append([sources[start], sources[stop]])
        elif not step and stop > start:
            packed.append([NEW, stop - start + 1])  # a run of fresh channels: [-1, how many]
        else:
            packed.append(sources[start])
        start = stop + 1
    return packed


def _unpack(packed: list[int | list[int]]) -> tuple[int, ...]:
    sources: list[int] = []
    for item in packed:
        first, last = (item, item) if isinstance(item, int) else item
        if type(first) is not int or type(last) is not int or first < NEW or last < NEW:
            raise ValueError(f"not a channel: {item!r}")
        count = last if first == NEW and not isinstance(item, int) else last - first + 1
        if count < 1 or len(sources) + count > MAX_WIDTH:
            raise ValueError(f"{count} more channels: a group has 1 to {MAX_WIDTH}")
        sources.extend([NEW] * count if first == NEW else range(first, last + 1))
    return tuple(sources)
