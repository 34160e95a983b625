"""Grouped convolutions keep their own counts true, whatever they look like while an edit is half done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from robustcompress.structure import NEW, StructuralEditor
from tests.structure.networks import EXAMPLE, images


class Multiplied(nn.Module):
    """Each channel of the first convolution becomes two of the second: a multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 6, 1)
        self.multiply = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.project, self.fc = nn.Conv2d(12, 4, 1), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.project(self.multiply(self.expand(x)).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("width", [3, 4, 12])
def test_a_multiplier_stays_one_when_it_halves_or_doubles(width: int) -> None:
    torch.manual_seed(0)
    model = Multiplied().double().eval()
    editor = StructuralEditor(model, EXAMPLE)
    before = model(images())
    editor.resize("expand", [*range(6), *[NEW] * 6][:width])
    layer = model.multiply
    assert (layer.groups, layer.in_channels, layer.out_channels) == (width, width, 2 * width)
    assert layer.weight.shape[:2] == (2 * width, 1)
    assert StructuralEditor(model, EXAMPLE).widths == editor.widths
    if width >= 6:
        assert torch.allclose(model(images()), before)
        editor.prune("expand", range(6))
        assert torch.equal(model(images()), before)
