"""What is known of a network's structure: traced, and proven on a copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from robustcompress.structure.copies import undrawn
from robustcompress.structure.groups import ChannelGroup
from robustcompress.structure.layout import Layout
from robustcompress.structure.trace import trace
from robustcompress.structure.verify import find_broken, find_least


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a network's structure.

    Attributes:
        layout: Its groups, and where they lie.
        broken: For each group that cannot be resized after all, the reason.
    """

    layout: Layout
    broken: Mapping[str, str]

    def groups(self, widths: Mapping[str, int]) -> dict[str, ChannelGroup]:
        """Every group with its present width, and with whatever speaks against editing it."""
        return {
            name: replace(group, width=widths[name], reason=group.reason or self.broken.get(name, ""))
            for name, group in self.layout.groups.items()
        }


def survey(model: nn.Module, example: torch.Tensor) -> Survey:
    """Trace a network and prove what was traced.

    Args:
        model: Not touched.
        example: One input batch `[N, 3, H, W]`.

    Raises:
        UnsupportedModelError: It cannot be edited.
    """
    with torch.inference_mode(False), undrawn(model):  # inside inference mode, tracing would see no graph
        layout = trace(model, example)
        broken = find_broken(model, layout, example)
        sound = [g.name for g in layout.groups.values() if g.editable and g.name not in broken]
        return Survey(layout.at_least(find_least(model, layout, example, sound)), broken)
