"""Learnable gates on channel groups, applied where channels are read, so that a closed gate *is* a removed channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from robustcompress.structure.groups import Axis
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.layout import Layout, spread

MaskRule = Callable[[str, torch.Tensor], torch.Tensor]
"""(group name, scores `[C]`) to gate values `[C]`, differentiable in the scores as the rule sees fit."""


class _TopK(torch.autograd.Function):
    """0/1 mask of the k largest magnitudes; the gradient passes straight through the selection, and through the abs."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, k: int) -> torch.Tensor:
        ctx.save_for_backward(scores)
        return torch.zeros_like(scores).index_fill_(0, top_channels(scores, k), 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (scores,) = ctx.saved_tensors
        sign = torch.where(scores < 0, -1.0, 1.0)
        return grads[0] * sign, None


def top_channels(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Int64 `[k]`: the channels with the largest magnitudes, ascending; ties go to the lower channel number."""
    order = torch.argsort(scores.detach().abs(), descending=True, stable=True)
    return order[:k].sort().values


def top_k_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Straight-through top-k gate (Ramanujan et al. 2020, edge-popup; used by HYDRA, Sehwag et al. 2020).

    Args:
        scores: `[C]`, any sign; magnitudes are ranked.
        k: How many channels stay open.

    Returns:
        `[C]` of zeros and ones. Its gradient with respect to the scores is that of the mask times sign(score).
    """
    return _TopK.apply(scores, k)  # type: ignore[no-any-return]


class Gates:
    """Multiplies every reader's input by the gate values of the groups it reads, while the context is open.

    With 0/1 gates the network computes exactly what `resize(keep)` would leave, gradients included; a gate on the
    writers' outputs would not, because batch-norm shifts leak.

    Args:
        model: The network; hooks are attached on entry and removed on exit, also after an error.
        layout: Its structure.
        widths: The present width of every group.
        scores: Per gated group, `[C]` leaf tensors on the model's device.
        rule: Turns a group's scores into gate values; the scores themselves by default.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        widths: Mapping[str, int],
        scores: Mapping[str, nn.Parameter],
        rule: MaskRule | None = None,
    ) -> None:
        self.scores = dict(scores)
        self.rule: MaskRule = rule or (lambda name, values: values)
        self._model = model
        self._layout = layout
        self._widths = dict(widths)
        self._axes = sorted(
            {axis for name in self.scores for axis in layout.groups[name].readers},
            key=lambda axis: axis.module,
        )
        self._cache: dict[str, torch.Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def parameters(self) -> list[nn.Parameter]:
        """The score tensors, in the model's order of groups."""
        return list(self.scores.values())

    def masks(self) -> dict[str, torch.Tensor]:
        """The gate values now, per group, with gradients."""
        return {name: self.rule(name, values) for name, values in self.scores.items()}

    def __enter__(self) -> Gates:
        """Attach the hooks."""
        self._handles.append(self._model.register_forward_pre_hook(self._forget))
        for axis in self._axes:
            module = self._model.get_submodule(axis.module)
            self._handles.append(module.register_forward_pre_hook(self._gate(axis)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks; the network is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._cache.clear()

    def _forget(self, *_: object) -> None:
        # Scores move between forward passes, and a graph may be walked only once: gate values live for one pass.
        self._cache.clear()

    def _mask(self, name: str) -> torch.Tensor:
        if name not in self._cache:
            self._cache[name] = self.rule(name, self.scores[name])
        return self._cache[name]

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
