"""Compares what the layers of a network write before and after an edit, each on its own scale.

The logits alone would not do: behind norms and sums with much larger terms, what a branch computes wrongly is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from robustcompress.structure.kinds import gather, kind_of, width_of
from robustcompress.structure.layer_kind import LayerKind
from robustcompress.structure.layout import Layout

T = TypeVar("T")

PLACES = 8
"""Places along a dimension without channels at which outputs are compared."""


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry; infinite where something is no number."""
    value = float((found - wanted).abs().max()) / (float(wanted.abs().max()) + 1e-12)
    return value if value == value else math.inf


class Watch:
    """Remembers the outputs of all layers that mix channels, and compares them with those of the edited network.

    Args:
        net: The network; it is edited in place between the two passes.
        layout: Its structure.
    """

    def __init__(self, net: nn.Module, layout: Layout) -> None:
        self._layout = layout
        self._layers: dict[str, tuple[nn.Module, LayerKind]] = {
            name: (module, kind)
            for name, module in net.named_modules()
            if (kind := kind_of(module)) is not None and "out" in kind.widths
        }
        self._old = {name: torch.arange(width_of(module, "out")) for name, (module, _) in self._layers.items()}
        self._wanted: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        self.worst: tuple[float, str] = (0.0, "")

    def note(self, run: Callable[[], T]) -> T:
        """Run the network as it is to be, and remember."""
        return self._hooked(run, self._remember)

    def edited(self, group: str, sources: tuple[int, ...], widths: Mapping[str, int]) -> None:
        """Follow an edit that is made: which position of each layer is which old one."""
        for axis in self._layout.groups[group].members:
            if axis.side == "out" and axis.module in self._old:
                index = self._layout.index(axis, group, sources, widths)
                self._old[axis.module] = gather(self._old[axis.module] + 1, 0, index) - 1

    def compare(self, run: Callable[[], T]) -> T:
        """Run the edited network, and note in `worst` the largest relative difference and the layer that shows it."""
        return self._hooked(run, self._look)

    def _remember(self, name: str, output: torch.Tensor) -> None:
        self._shapes[name] = output.shape
        self._wanted[name] = self._thinned(name, output).clone()  # what follows may write in place

    def _look(self, name: str, output: torch.Tensor) -> None:
        wanted = self._wanted.pop(name, None)
        if wanted is None:  # a forward that calls other layers when widths change
            self.worst = (math.inf, name)
            return
        dim = self._layers[name][1].channel_dim % output.dim()
        others = [[n for d, n in enumerate(shape) if d != dim] for shape in (output.shape, self._shapes[name])]
        if others[0] != others[1]:  # channels of other groups lie there: see what reads this
            return
        old, found = self._old[name], self._thinned(name, output)
        kept = (old >= 0).nonzero().flatten()
        if len(kept) < len(old) or wanted.shape[dim] != len(old):
            found = found.index_select(dim, kept.to(found.device))
            wanted = wanted.index_select(dim, old[kept].to(found.device))
        self.worst = max(self.worst, (difference(found, wanted), name))

    def _thinned(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """All channels of an output, at about `PLACES` places along each other dimension."""
        dim = self._layers[name][1].channel_dim % output.dim()
        steps = [1 if d == dim else max(1, size // PLACES) for d, size in enumerate(output.shape)]
        return output[tuple(slice(None, None, step) for step in steps)]

    def _hooked(self, run: Callable[[], T], see: Callable[[str, torch.Tensor], None]) -> T:
        def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
            return lambda module, args, output: see(name, output)

        handles = [module.register_forward_hook(hook_of(name)) for name, (module, _) in self._layers.items()]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()
