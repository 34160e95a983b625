"""Compares what the layers of a network write before and after an edit, each on its own scale.

The logits alone would not do: behind norms and sums with much larger terms, what a branch computes wrongly is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from robustcompress.structure.kinds import gather, kind_of, width_of
from robustcompress.structure.layer_kind import LayerKind
from robustcompress.structure.layout import Layout

PLACES = 8
"""Places along a dimension without channels at which outputs are compared."""


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
        self.worst: tuple[float, str] = (0.0, "")

    def note(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the network as it is to be, and remember."""
        return self._hooked(run, self._wanted.__setitem__)

    def edited(self, group: str, sources: tuple[int, ...], widths: Mapping[str, int]) -> None:
        """Follow an edit that is made: which position of each layer is which old one."""
        for axis in self._layout.groups[group].members:
            if axis.side == "out" and axis.module in self._old:
                index = self._layout.index(axis, group, sources, widths)
                self._old[axis.module] = gather(self._old[axis.module] + 1, 0, index) - 1

    def compare(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run the edited network, and note in `worst` the largest relative difference and the layer that shows it."""
        return self._hooked(run, self._look)

    def _look(self, name: str, found: torch.Tensor) -> None:
        dim = self._layers[name][1].channel_dim
        old = self._old[name]
        kept = (old >= 0).nonzero().flatten()
        wanted = self._wanted.pop(name, None)
        if wanted is None:  # a forward that calls other layers when widths change
            self.worst = (math.inf, name)
            return
        if len(kept) < len(old) or wanted.shape[dim] != len(old):
            found = found.index_select(dim, kept.to(found.device))
            wanted = wanted.index_select(dim, old[kept].to(found.device))
        if found.shape != wanted.shape:
            self.worst = (math.inf, name)
            return
        difference = float((found - wanted).abs().max()) / (float(wanted.abs().max()) + 1e-12)
        if not difference <= self.worst[0]:
            self.worst = (difference, name)

    def _hooked(self, run: Callable[[], torch.Tensor], see: Callable[[str, torch.Tensor], None]) -> torch.Tensor:
        def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
            dim = self._layers[name][1].channel_dim
            # What follows may write in place; a wrong channel is wrong everywhere, so a few places of each will do.
            return lambda module, args, output: see(name, _thinned(output, dim % output.dim()).clone())

        handles = [module.register_forward_hook(hook_of(name)) for name, (module, _) in self._layers.items()]
        try:
            return run()
        finally:
            for handle in handles:
                handle.remove()


def _thinned(output: torch.Tensor, dim: int) -> torch.Tensor:
    """All channels of an output, at about `PLACES` places along each other dimension."""
    steps = [1 if d == dim else max(1, size // PLACES) for d, size in enumerate(output.shape)]
    return output[tuple(slice(None, None, step) for step in steps)]
