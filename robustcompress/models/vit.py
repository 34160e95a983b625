"""Vision transformers (Dosovitskiy et al. 2021) for small images, without a class token (Beyer et al. 2022)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.models.attention import Attention
from robustcompress.models.factory import factory, scaled
from robustcompress.models.normalize import MEAN, STD, Normalize


class Block(nn.Module):
    """Attention, then two linear layers, each behind a layer norm and added to its input.

    Args:
        dim: Width of the embedding.
        heads: Number of heads.
        head_dim: Width of each.
        hidden: Width between the two linear layers.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, head_dim)
        self.norm2, self.fc1 = nn.LayerNorm(dim), nn.Linear(dim, hidden)
        self.act, self.fc2 = nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `[N, T, dim]` to `[N, T, dim]`."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """Patches, a learned position for each, blocks, mean over the patches, one linear layer.

    Images of another size than the positions were made for get interpolated positions.

    Args:
        dim: Width of the embedding.
        depth: Number of blocks.
        heads: Heads of each block.
        hidden: Width inside each block's linear layers.
        patch: Pixels a side of one patch.
        grid: Patches a side for which positions are learned.
        num_classes: Logits.
        mean: Input mean for `Normalize`.
        std: Input standard deviation for `Normalize`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        *,
        patch: int,
        grid: int,
        num_classes: int,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.patch = nn.Conv2d(3, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, dim, grid, grid))
        self.blocks = nn.Sequential(*(Block(dim, heads, max(1, round(dim / heads)), hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the positions anew; the layers have methods of their own."""
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, 3, H, W]` in [0, 1] to logits `[N, num_classes]`."""
        x = self.patch(self.normalize(x))
        position: Tensor = self.position
        if position.shape[2:] != x.shape[2:]:
            position = F.interpolate(position, size=x.shape[2:], mode="bicubic", align_corners=False)
        tokens = (x + position).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(self.norm(self.blocks(tokens)).mean(1))
        return logits


def _build(
    num_classes: int,
    width: float,
    stem_stride: int,
    depth: int,
    dim: int,
    heads: int,
    patch: int,
    mlp_ratio: float,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> nn.Module:
    dim = scaled(dim, width)
    return VisionTransformer(
        dim,
        depth,
        heads,
        scaled(dim, mlp_ratio),
        patch=patch * stem_stride,
        grid=max(1, image_size // (patch * stem_stride)),
        num_classes=num_classes,
        mean=mean,
        std=std,
    )


@factory
def vit_tiny(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    depth: int = 6,
    dim: int = 192,
    heads: int = 3,
    patch: int = 4,
    mlp_ratio: float = 4.0,
    image_size: int = 32,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """ViT-Ti (Touvron et al. 2021, table 1) at half its depth, on 4x4 patches: 2,693,194 parameters.

    `width` multiplies the embedding, and with it the heads' and the hidden width, not the number of heads;
    `stem_stride` multiplies the patch; `image_size` says for how many patches positions are learned.
    """
    return _build(num_classes, width, stem_stride, depth, dim, heads, patch, mlp_ratio, image_size, mean, std)


@factory
def vit_micro(
    num_classes: int = 10,
    *,
    width: float = 1.0,
    stem_stride: int = 1,
    depth: int = 3,
    dim: int = 48,
    heads: int = 6,
    patch: int = 4,
    mlp_ratio: float = 2.0,
    image_size: int = 32,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> nn.Module:
    """A very small vision transformer for quick runs: 62,890 parameters; its arguments are those of `vit_tiny`."""
    return _build(num_classes, width, stem_stride, depth, dim, heads, patch, mlp_ratio, image_size, mean, std)
