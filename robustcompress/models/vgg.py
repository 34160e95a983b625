"""VGG-16 with BatchNorm (Simonyan and Zisserman 2015, configuration D) for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustcompress.models.factory import factory, scaled
from robustcompress.models.normalize import MEAN, STD, Normalize

# Channels of the convolutions between two poolings.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Stages of 3x3 conv-BN-ReLU, each ended by 2x2 max pooling; mean over space; one linear layer.

    Args:
        stages: Channels of the convolutions of each stage.
        num_classes: Logits.
        stem_stride: Stride of the first convolution.
        mean: Input mean for `Normalize`.
        std: Input standard deviation for `Normalize`.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        *,
        num_classes: int,
        stem_stride: int = 1,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        layers: list[nn.Module] = []
        width, stride = 3, stem_stride
        for stage in stages:
            for channels in stage:
                # No bias: the BatchNorm that follows would take it away again.
                layers += [
                    nn.Conv2d(width, channels, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                ]
                width, stride = channels, 1
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` in [0, 1], of at least 32x32 pixels, to logits `[N, num_classes]`."""
        x = self.features(self.normalize(x))
        logits: Tensor = self.classifier(torch.flatten(self.pool(x), 1))
        return logits


@factory
def vgg16_bn(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """VGG-16 with BatchNorm and one linear layer, the CIFAR form: 14,724,042 parameters, 313 M multiply-adds.

    `width` multiplies all channels. Five poolings need images of at least 32x32 (times `stem_stride`).
    """
    stages = [[scaled(c, width) for c in stage] for stage in _STAGES]
    return VGG(stages, num_classes=num_classes, stem_stride=stem_stride, mean=mean, std=std)
