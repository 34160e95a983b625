"""Residual networks for 32x32 images: He et al. 2016 (section 4.2) and the usual CIFAR forms of ResNet-18."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustcompress.models.factory import factory, scaled
from robustcompress.models.normalize import MEAN, STD, Normalize


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, added to the input, then ReLU.

    Where the shape changes the input passes a 1x1 convolution with BN (option B of He et al. 2016), never a
    padded slice (option A): a slice with fixed channel numbers could not be edited.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to `[N, channels, H/stride, W/stride]`."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        added: Tensor = self.relu2(out + self.shortcut(x))
        return added


class PreActBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, added to the input (He et al. 2016b); a projection reads after BN-ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to `[N, channels, H/stride, W/stride]`."""
        active = self.relu1(self.bn1(x))
        out: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class ResNet(nn.Module):
    """A 3x3 stem, stages of `BasicBlock`, mean over space, one linear layer.

    Args:
        channels: Channels of each stage; the first are also the stem's. Every stage but the first halves the
            image.
        depths: Blocks in each stage.
        num_classes: Logits.
        stem_stride: Stride of the stem.
        mean: Input mean for `Normalize`.
        std: Input standard deviation for `Normalize`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int,
        stem_stride: int = 1,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, channels[0], 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.layers = _stages(BasicBlock, channels[0], channels, depths)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` in [0, 1] to logits `[N, num_classes]`."""
        x = self.relu(self.bn1(self.conv1(self.normalize(x))))
        logits: Tensor = self.fc(torch.flatten(self.pool(self.layers(x)), 1))
        return logits


class PreActResNet(nn.Module):
    """A bare 3x3 stem, stages of `PreActBlock`, a last BN-ReLU, mean over space, one linear layer.

    With a stem narrower than the first stage it is the wide residual network of Zagoruyko and Komodakis 2016.

    Args:
        stem: Channels of the first convolution.
        channels: Channels of each stage. Every stage but the first halves the image.
        depths: Blocks in each stage.
        num_classes: Logits.
        stem_stride: Stride of the stem.
        mean: Input mean for `Normalize`.
        std: Input standard deviation for `Normalize`.
    """

    def __init__(
        self,
        stem: int,
        channels: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int,
        stem_stride: int = 1,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(3, stem, 3, stride=stem_stride, padding=1, bias=False)
        self.layers = _stages(PreActBlock, stem, channels, depths)
        self.bn = nn.BatchNorm2d(channels[-1])
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` in [0, 1] to logits `[N, num_classes]`."""
        x = self.relu(self.bn(self.layers(self.conv1(self.normalize(x)))))
        logits: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


def _stages(
    block: type[BasicBlock] | type[PreActBlock], width: int, channels: Sequence[int], depths: Sequence[int]
) -> nn.Sequential:
    stages = []
    for index, (out, depth) in enumerate(zip(channels, depths, strict=True)):
        stride = 1 if index == 0 else 2
        blocks = [block(width, out, stride), *(block(out, out, 1) for _ in range(depth - 1))]
        stages.append(nn.Sequential(*blocks))
        width = out
    return nn.Sequential(*stages)


def _cifar(
    depth: int,
    width: float,
    num_classes: int,
    stem_stride: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> ResNet:
    """Depth 6n + 2 with three stages of n blocks, 16/32/64 channels (He et al. 2016, section 4.2)."""
    return ResNet(
        [scaled(c, width) for c in (16, 32, 64)],
        [(depth - 2) // 6] * 3,
        num_classes=num_classes,
        stem_stride=stem_stride,
        mean=mean,
        std=std,
    )


@factory
def resnet8(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """ResNet-8 (He et al. 2016, section 4.2): 0.08 M parameters, 12.6 M multiply-adds at 32x32.

    Shortcuts that change shape are 1x1 convolutions, so that every layer can be edited.
    `width` multiplies all channels (at least 4 stay); `stem_stride` suits larger images.
    """
    return _cifar(8, width, num_classes, stem_stride, mean, std)


@factory
def resnet20(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """ResNet-20 (He et al. 2016, section 4.2): 0.27 M parameters, 41 M multiply-adds at 32x32.

    Shortcuts that change shape are 1x1 convolutions, so that every layer can be edited.
    `width` multiplies all channels (at least 4 stay); `stem_stride` suits larger images.
    """
    return _cifar(20, width, num_classes, stem_stride, mean, std)


@factory
def resnet32(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """ResNet-32 (He et al. 2016, section 4.2): 0.47 M parameters, 69 M multiply-adds at 32x32.

    Shortcuts that change shape are 1x1 convolutions, so that every layer can be edited.
    `width` multiplies all channels (at least 4 stay); `stem_stride` suits larger images.
    """
    return _cifar(32, width, num_classes, stem_stride, mean, std)


@factory
def resnet44(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """ResNet-44 (He et al. 2016, section 4.2): 0.66 M parameters, 98 M multiply-adds at 32x32.

    Shortcuts that change shape are 1x1 convolutions, so that every layer can be edited.
    `width` multiplies all channels (at least 4 stay); `stem_stride` suits larger images.
    """
    return _cifar(44, width, num_classes, stem_stride, mean, std)


@factory
def resnet56(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """ResNet-56 (He et al. 2016, section 4.2): 0.86 M parameters, 126 M multiply-adds at 32x32.

    Shortcuts that change shape are 1x1 convolutions, so that every layer can be edited.
    `width` multiplies all channels (at least 4 stay); `stem_stride` suits larger images.
    """
    return _cifar(56, width, num_classes, stem_stride, mean, std)


@factory
def resnet18(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """ResNet-18 with a 3x3 stem and no max pooling: 11,173,962 parameters, 555.4 M multiply-adds at 32x32.

    The CIFAR form that adversarial training papers use; not torchvision's, whose 7x7 stem shrinks images by
    four.
    """
    channels = [scaled(c, width) for c in (64, 128, 256, 512)]
    return ResNet(channels, [2] * 4, num_classes=num_classes, stem_stride=stem_stride, mean=mean, std=std)


@factory
def preact_resnet18(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """Pre-activation ResNet-18 (He et al. 2016b), with a last BN-ReLU: 11,172,170 parameters."""
    channels = [scaled(c, width) for c in (64, 128, 256, 512)]
    return PreActResNet(
        channels[0], channels, [2] * 4, num_classes=num_classes, stem_stride=stem_stride, mean=mean, std=std
    )
