"""The channel groups of a network as a person looks at them: how wide, how wide before, and what they cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from robustcompress.budget import Cost, CostModel, measure
from robustcompress.errors import RobustCompressError
from robustcompress.models import image_size
from robustcompress.result import CompressResult
from robustcompress.structure import ChannelGroup, StructuralEditor


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWidth:
    """One channel group.

    Attributes:
        name: Its name in the editor.
        kind: What holds it together (see `ChannelGroup`).
        width: Its channels now, or its attention heads.
        head_dim: How wide one head is; 1 for channels.
        before: Its channels in the reference of a result; None where that is not known.
        min_width: The fewest it can have.
        macs: Multiply-adds of the layers that write it, and of those through which it passes.
        share: The same as a share of the whole network's.
        macs_per_channel: Multiply-adds that leave with one channel, where it is written and where it is read.
        params_per_channel: Parameters that leave with one channel.
        editable: Whether it can be pruned and grown.
        reason: Why not; empty where it can.
        members: Every side of every layer that changes with it, as "layer:side".
    """

    name: str
    kind: str
    width: int
    head_dim: int
    before: int | None
    min_width: int
    macs: int
    share: float
    macs_per_channel: int
    params_per_channel: int
    editable: bool
    reason: str
    members: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return asdict(self) | {"members": list(self.members)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """All channel groups of a network.

    Attributes:
        groups: In the model's own order.
        image_shape: Channels, height and width of the image that costs are counted for.
        cost: What the network costs now.
        before: What the reference of a result costs on such an image; None where that is not known.
        bypassable: Blocks that can leave, where that was asked for.
        insertable: Blocks into which a part can be inserted, where that was asked for.
    """

    groups: tuple[GroupWidth, ...]
    image_shape: tuple[int, int, int]
    cost: Cost
    before: Cost | None
    bypassable: tuple[str, ...] = ()
    insertable: tuple[str, ...] = ()


def widths_of(
    model_or_result: nn.Module | CompressResult, example: torch.Tensor | None = None, *, depth: bool = False
) -> Widths:
    """Trace a network and list its channel groups.

    Args:
        model_or_result: A network, or a result, whose widths are then shown beside those of its reference.
        example: An image batch `[N, 3, H, W]`. By default images as the result was trained on, or of the size that the
            network was made for.
        depth: Also say which blocks can be bypassed, which is proven block by block, and which can have parts.

    Raises:
        UnsupportedModelError: The network holds layers that cannot be edited.
    """
    result = model_or_result if isinstance(model_or_result, CompressResult) else None
    model = model_or_result.model if isinstance(model_or_result, CompressResult) else model_or_result
    if example is None:
        size = image_size(model)
        example = torch.zeros(2, *(result.image_shape if result is not None else (3, size.height, size.width)))
    channels, height, width = example.shape[1:]
    editor = StructuralEditor(model, example)
    cost, predicted = measure(model, example), CostModel(editor, example)
    written, now = predicted.macs_of_groups(), predicted.predict(editor.widths)
    before, cost_before = _reference(result, example) if result is not None else ({}, None)

    def describe(group: ChannelGroup) -> GroupWidth:
        fewer = predicted.predict({**editor.widths, group.name: group.width - 1})
        return GroupWidth(
            name=group.name,
            kind=group.kind,
            width=group.width,
            head_dim=editor.layout.axes[group.writers[0]][0].copies if group.kind == "heads" else 1,
            before=before.get(group.name),
            min_width=group.min_width,
            macs=round(written[group.name]),
            share=written[group.name] / max(1, cost.macs),
            macs_per_channel=round(now[0] - fewer[0]),
            params_per_channel=round(now[1] - fewer[1]),
            editable=group.editable,
            reason=group.reason,
            members=tuple(f"{axis.module}:{axis.side}" for axis in group.members),
        )

    return Widths(
        groups=tuple(describe(group) for group in editor.groups.values()),
        image_shape=(channels, height, width),
        cost=cost,
        before=cost_before,
        bypassable=editor.bypassable if depth else (),
        insertable=editor.insertable if depth else (),
    )


def _reference(result: CompressResult, example: torch.Tensor) -> tuple[dict[str, int], Cost | None]:
    """Widths and cost of the reference; no widths where it cannot be built from what the result says."""
    as_trained = result.before if example.shape[1:] == result.image_shape else None
    if result.spec is None or result.spec.imports_code:
        return {}, as_trained
    try:
        with torch.random.fork_rng(devices=[]):
            reference = result.spec.build()
        return StructuralEditor(reference, example).widths, as_trained or measure(reference, example)
    except RobustCompressError:
        return {}, as_trained
