"""MobileNetV2 (Sandler et al. 2018) for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustcompress.models.factory import factory, scaled
from robustcompress.models.normalize import MEAN, STD, Normalize

# (expansion, channels, blocks, first stride) as in table 2 of the paper, but for two strides: the stem's, an
# argument, and the second row's, which is 1 here so that 32x32 images end at 4x4 and not at 1x1.
_ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 linear projection; added to the input where the shapes agree."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = _conv(in_channels, hidden, 1) if expansion != 1 else []
        layers += _conv(hidden, hidden, 3, stride=stride, groups=hidden)
        layers += [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to `[N, channels, H/stride, W/stride]`."""
        out: Tensor = self.layers(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, a 1x1 convolution, mean over space, one linear layer.

    Args:
        stem: Channels of the first convolution.
        rows: `(expansion, channels, blocks, first stride)` of each stage.
        last: Channels of the last convolution.
        num_classes: Logits.
        stem_stride: Stride of the first convolution.
        mean: Input mean for `Normalize`.
        std: Input standard deviation for `Normalize`.
    """

    def __init__(
        self,
        stem: int,
        rows: Sequence[tuple[int, int, int, int]],
        last: int,
        *,
        num_classes: int,
        stem_stride: int = 1,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        layers = _conv(3, stem, 3, stride=stem_stride)
        width = stem
        for expansion, channels, blocks, first in rows:
            for index in range(blocks):
                layers.append(InvertedResidual(width, channels, first if index == 0 else 1, expansion))
                width = channels
        self.features = nn.Sequential(*layers, *_conv(width, last, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` in [0, 1] to logits `[N, num_classes]`."""
        x = self.features(self.normalize(x))
        logits: Tensor = self.classifier(torch.flatten(self.pool(x), 1))
        return logits


def _conv(in_channels: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), nn.ReLU6()]


@factory
def mobilenet_v2(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """MobileNetV2 with CIFAR strides: 2,236,682 parameters, 88 M multiply-adds at 32x32.

    `width` multiplies all channels, the last 1280 too, without rounding to multiples of eight (torchvision
    rounds).
    """
    rows = [(t, scaled(c, width), n, s) for t, c, n, s in _ROWS]
    return MobileNetV2(
        scaled(32, width),
        rows,
        scaled(1280, width),
        num_classes=num_classes,
        stem_stride=stem_stride,
        mean=mean,
        std=std,
    )
