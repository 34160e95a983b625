"""Layers of a user's own, each with what the editor is told of it, and a network around each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from robustcompress.structure import LayerKind


class Kernel(nn.Module):
    """A linear layer whose weight is `[inputs, outputs]`."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.kernel = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x @ self.kernel
        return out if self.bias is None else out + self.bias


KERNEL = LayerKind(
    slots={"in": (("kernel", 0),), "out": (("kernel", 1), ("bias", 0))},
    widths={"in": ("inputs",), "out": ("outputs",)},
    fill={"bias": 0.0},
    channel_dim=-1,
)


class Standardised(nn.Conv2d):
    """A convolution whose weights have mean zero and variance one in each output channel, and a gain (NFNets)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, self.gain * (self.weight - mean) / (std + 1e-3), self.bias, padding=1)


STANDARDISED = LayerKind(
    slots={"in": (("weight", 1),), "out": (("weight", 0), ("bias", 0), ("gain", 0))},
    widths={"in": ("in_channels",), "out": ("out_channels",)},
    fill={"bias": 0.0, "gain": 1.0},
)


class FilterResponse(nn.Module):
    """Filter response normalisation with its thresholded unit (Singh and Krishnan 2020): no channel sees another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta, self.tau = (nn.Parameter(torch.rand(1, width, 1, 1) + 0.5) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1e-6)
        return torch.maximum(self.gamma * x + self.beta, self.tau)


FILTER_RESPONSE = LayerKind(slots={"both": (("gamma", 1), ("beta", 1), ("tau", 1))}, fill={"gamma": 1.0, "beta": 0.0})


class LowRank(nn.Module):
    """A linear layer with a correction of low rank beside its weight."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs) / 2), nn.Parameter(torch.randn(outputs))
        self.down, self.up = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.randn(outputs, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)


LOW_RANK = LayerKind(
    slots={"in": (("weight", 1), ("down", 1)), "out": (("weight", 0), ("bias", 0), ("up", 0))},
    fill={"bias": 0.0},
    channel_dim=-1,
)


class Complex(nn.Module):
    """A convolution with complex weights, whose output is the magnitude."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.real, self.imaginary = (nn.Parameter(torch.randn(outputs, inputs, 3, 3) / 5) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        real, imaginary = F.conv2d(x, self.real, padding=1), F.conv2d(x, self.imaginary, padding=1)
        return (real.square() + imaginary.square() + 1e-3).sqrt()


COMPLEX = LayerKind(slots={"in": (("real", 1), ("imaginary", 1)), "out": (("real", 0), ("imaginary", 0))})


class Gate(nn.Module):
    """Scales each channel by a parameter and by a buffer; while it trains, it keeps track of their means in another."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.logit = nn.Parameter(torch.randn(channels))
        self.register_buffer("scale", torch.rand(channels) + 0.5)
        self.register_buffer("seen", torch.zeros(1, channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with torch.no_grad():
                self.seen.lerp_(x.detach().mean((0, 2, 3), keepdim=True), 0.1)
        return x * (self.logit.sigmoid() * self.scale)[:, None, None]


GATE = LayerKind(
    slots={"both": (("logit", 0), ("scale", 0), ("seen", 1))},
    widths={"both": ("channels",)},
    fill={"scale": 1.0, "seen": 0.0},
)


class Noisy(nn.Module):
    """Gives back the very tensor that it is given, but in training: then it adds noise of a size for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.rand(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.size[:, None, None] * torch.randn_like(x) if self.training else x


NOISY = LayerKind(slots={"both": (("size", 0),)})


class Net(nn.Module):
    """Group `a` (8 channels) goes through `middle` to `b` (9), that through `second` to `c`, and on to a classifier."""

    def __init__(
        self,
        middle: nn.Module | None = None,
        b: nn.Module | None = None,
        c: nn.Module | None = None,
        *,
        flat: bool = False,
        num_classes: int = 5,
    ) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.middle = middle or nn.ReLU()
        self.b = b or nn.Conv2d(8, 9, 3, padding=1)
        self.c = c or (nn.Linear(9, 6) if flat else nn.Conv2d(9, 6, 3, padding=1))
        self.fc, self.flat = nn.Linear(6, num_classes), flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.bn(self.a(x)))
        if self.flat:
            return self.fc(F.gelu(self.c(F.gelu(self.b(x.mean((2, 3)))))))
        return self.fc(F.gelu(self.c(F.gelu(self.b(x)))).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A type of layer, what is told of it, a network around it, and which groups cannot be edited."""

    type: type[nn.Module]
    kind: LayerKind
    net: Callable[[], nn.Module]
    held: frozenset[str] = frozenset()


CASES = {
    "kernel": Case(Kernel, KERNEL, lambda: Net(b=Kernel(8, 9, bias=False), c=Kernel(9, 6), flat=True)),
    "standardised": Case(Standardised, STANDARDISED, lambda: Net(b=Standardised(8, 9)), frozenset({"a"})),
    "filter response": Case(FilterResponse, FILTER_RESPONSE, lambda: Net(FilterResponse(8))),
    "low rank": Case(LowRank, LOW_RANK, lambda: Net(b=LowRank(8, 9), c=LowRank(9, 6), flat=True)),
    "complex": Case(Complex, COMPLEX, lambda: Net(b=Complex(8, 9), c=Complex(9, 6))),
    "gate": Case(Gate, GATE, lambda: Net(Gate(8))),
    "noisy": Case(Noisy, NOISY, lambda: Net(Noisy(8))),
}
