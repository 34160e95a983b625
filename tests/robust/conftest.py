from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Two logits: (w.x + b, 0), of which everything about attacks is known in closed form."""

    def __init__(self, weight: Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([score, torch.zeros_like(score)], 1)


@pytest.fixture
def linear() -> type[Linear]:
    return Linear


@pytest.fixture
def mlp() -> Callable[..., nn.Module]:
    def make(classes: int, *, seed: int = 0, gain: float = 1.0) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, classes)).eval()
        with torch.no_grad():
            model[3].weight.mul_(gain)
        return model

    return make


@pytest.fixture
def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 64, 4),
    )


@pytest.fixture
def images() -> Tensor:
    return torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Counter:
    """Counts the forward passes of a model, and the images in them."""

    def __init__(self, model: nn.Module) -> None:
        self.calls = 0
        self.images = 0
        model.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls += 1
        self.images += len(inputs[0])


@pytest.fixture
def count() -> type[Counter]:
    return Counter
