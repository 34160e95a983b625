"""Wide residual networks (Zagoruyko and Komodakis 2016) for 32x32 images."""

from __future__ import annotations

from torch import nn

from robustcompress.models.factory import factory, scaled
from robustcompress.models.normalize import MEAN, STD
from robustcompress.models.resnet import PreActResNet


def _wide(
    depth: int,
    widen: int,
    width: float,
    num_classes: int,
    stem_stride: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> PreActResNet:
    """Depth 6n + 4: three stages of n blocks, 16/32/64 channels times `widen`; the stem has 16 (table 1)."""
    return PreActResNet(
        scaled(16, width),
        [scaled(c * widen, width) for c in (16, 32, 64)],
        [(depth - 4) // 6] * 3,
        num_classes=num_classes,
        stem_stride=stem_stride,
        mean=mean,
        std=std,
    )


@factory
def wrn_16_4(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """WRN-16-4 of Zagoruyko and Komodakis 2016, without dropout: 2.7 M parameters.

    `width` multiplies all channels on top of the widening factor 4.
    """
    return _wide(16, 4, width, num_classes, stem_stride, mean, std)


@factory
def wrn_28_4(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """WRN-28-4 of Zagoruyko and Komodakis 2016, without dropout: 5.8 M parameters.

    `width` multiplies all channels on top of the widening factor 4.
    """
    return _wide(28, 4, width, num_classes, stem_stride, mean, std)


@factory
def wrn_28_10(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """WRN-28-10 of Zagoruyko and Komodakis 2016, without dropout: 36.5 M parameters.

    `width` multiplies all channels on top of the widening factor 10.
    """
    return _wide(28, 10, width, num_classes, stem_stride, mean, std)
