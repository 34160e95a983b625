"""Learnable gates on channel groups, applied where channels are read, so that a closed gate *is* a removed channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from robustcompress.errors import Problems, nearest
from robustcompress.structure.groups import Axis, ChannelGroup
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.layout import Layout, spread
from robustcompress.structure.masks import MaskRule, ScoreMasks, largest_entries
from robustcompress.structure.norms import mask_norm, norms_over


def top_channels(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Int64 `[k]`: the channels with the largest magnitudes, ascending; see `largest_entries` for ties."""
    return largest_entries(scores, k).nonzero().flatten()


def open_gates(
    model: nn.Module,
    layout: Layout,
    groups: Mapping[str, ChannelGroup],
    scores: Mapping[str, torch.Tensor],
    rule: MaskRule | None,
) -> Gates:
    """See `StructuralEditor.gates`."""
    problems = Problems("the gates were refused")
    for name, values in scores.items():
        if name not in groups:
            problems.add(f"there is no channel group {name!r}{nearest(name, groups)}")
        elif groups[name].reason:
            problems.add(f"group {name!r} cannot be edited: {groups[name].reason}")
        elif values.shape != (groups[name].width,):
            problems.add(f"group {name!r} needs {groups[name].width} scores; these have shape {tuple(values.shape)}")
    problems.raise_if_any()
    device = next(model.parameters()).device
    parameters = {
        name: nn.Parameter(values.detach().clone().to(device, torch.float32)) for name, values in scores.items()
    }
    return Gates(model, layout, {name: group.width for name, group in groups.items()}, parameters, rule)


class Gates(ScoreMasks):
    """Multiplies every reader's input by the gate values of the groups it reads, while the context is open.

    With 0/1 gates the network computes exactly what `resize(keep)` would leave, gradients included; a gate on the
    writers' outputs would not, because batch-norm shifts leak. Norms over the channels count each as much as its gate
    says.

    Args:
        model: The network; hooks are attached on entry and removed on exit, also after an error.
        layout: Its structure.
        widths: The present width of every group.
        scores: Per gated group, `[C]` leaf tensors on the model's device.
        rule: Turns scores into gate values; the scores themselves by default.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        widths: Mapping[str, int],
        scores: Mapping[str, nn.Parameter],
        rule: MaskRule | None = None,
    ) -> None:
        super().__init__(model, scores, rule)
        self._layout = layout
        self._widths = dict(widths)
        self._axes = sorted(
            {axis for name in self.scores for axis in layout.groups[name].readers},
            key=lambda axis: axis.module,
        )
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _attach(self) -> None:
        self._handles.append(self._model.register_forward_pre_hook(self._forget))
        for axis in self._axes:
            module = self._model.get_submodule(axis.module)
            self._handles.append(module.register_forward_pre_hook(self._gate(axis)))
        norms = dict.fromkeys(axis for name in self.scores for axis in norms_over(self._layout, name))
        for axis in norms:
            module = self._model.get_submodule(axis.module)
            self._handles.append(mask_norm(module, self._layout, axis, self._widths, self._mask_of))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _mask_of(self, group: str) -> torch.Tensor | None:
        return self._mask(group) if group in self.scores else None

    def _gate(self, axis: Axis) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs = args[0]
            pieces = []
            for segment in self._layout.axes[axis]:
                if segment.group is not None and segment.group in self.scores:
                    pieces.append(spread(self._mask(segment.group), segment))
                else:
                    width = self._widths[segment.group] if segment.group is not None else 0
                    pieces.append(inputs.new_ones(segment.positions(width)))
            mask = torch.cat(pieces).to(inputs.dtype)
            kind = kind_of(module)
            assert kind is not None
            shape = [1] * inputs.dim()
            shape[kind.channel_dim] = -1
            return (inputs * mask.view(shape), *args[1:])

        return hook
