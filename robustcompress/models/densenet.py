"""DenseNet-BC (Huang et al. 2017) for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustcompress.models.factory import factory, scaled
from robustcompress.models.normalize import MEAN, STD, Normalize


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 conv to `4 * growth`, BN-ReLU-3x3 conv to `growth`, joined to the input."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to `[N, C + growth, H, W]`; the input comes first."""
        out = self.conv2(self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x))))))
        return torch.cat([x, out], 1)


class DenseNet(nn.Module):
    """A 3x3 stem, dense blocks with half-width transitions, a last BN-ReLU, mean over space, a linear layer.

    Args:
        growth: Channels that each dense layer adds; the stem has twice as many.
        depths: Dense layers in each block.
        num_classes: Logits.
        stem_stride: Stride of the stem.
        mean: Input mean for `Normalize`.
        std: Input standard deviation for `Normalize`.
    """

    def __init__(
        self,
        growth: int,
        depths: Sequence[int],
        *,
        num_classes: int,
        stem_stride: int = 1,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        super().__init__()
        width = 2 * growth
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False)
        stages: list[nn.Module] = []
        for index, depth in enumerate(depths):
            if index:
                stages += [
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width // 2, 1, bias=False),
                    nn.AvgPool2d(2),
                ]
                width //= 2
            stages += [DenseLayer(width + i * growth, growth) for i in range(depth)]
            width += depth * growth
        self.features = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` in [0, 1] to logits `[N, num_classes]`."""
        x = self.relu(self.bn(self.features(self.conv1(self.normalize(x)))))
        logits: Tensor = self.classifier(torch.flatten(self.pool(x), 1))
        return logits


@factory
def densenet121(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """DenseNet-121 with a 3x3 stem and growth 32: 6,956,298 parameters, 0.9 G multiply-adds at 32x32.

    `width` multiplies the growth, and with it every layer.
    """
    return DenseNet(
        scaled(32, width),
        (6, 12, 24, 16),
        num_classes=num_classes,
        stem_stride=stem_stride,
        mean=mean,
        std=std,
    )
