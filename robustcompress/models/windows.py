"""Attention within windows whose number of heads follows from its weights: what stands in for torchvision's.

torchvision's own modules take a head's width from the embedding's, and Swin's never call their linear layers, so that
heads can neither leave nor be seen. These compute the same from the same parameters under the same names: what was
saved from torchvision's network is loaded into the opened one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


class TakenOver(nn.Module):
    """A module that has the parameters, buffers and layers of another: the very same ones, under their names.

    Args:
        original: Whose they are; it should not be used any more.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name, parameter in original._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in original._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        for name, module in original._modules.items():
            self.register_module(name, module)
        self.training = original.training


class ShiftedWindows(TakenOver):
    """Self-attention within shifted windows. Abstract: what queries and keys make of each other is left open.

    Args:
        original: One of torchvision's shifted window attentions.
    """

    qkv: nn.Linear
    proj: nn.Linear
    relative_position_index: Tensor

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.window, self.shift, self.head_dim = _sizes(original)
        self.attention_dropout, self.dropout = _dropouts(original)

    @abstractmethod
    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens of windows `[N, tokens, dim]` to logits `[N, heads, tokens, tokens]` and values, one a token."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, H, W, dim]` to `[N, H, W, dim]`."""
        return over_windows(x, self.window, self.shift, self._within)

    def _within(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        logits, values = self.attend(tokens)
        mixed = mix(logits, values, mask, self.attention_dropout if self.training else 0.0)
        return F.dropout(self.proj(mixed), self.dropout, self.training)

    def extra_repr(self) -> str:
        """Show what the layers inside do not say."""
        return f"head_dim={self.head_dim}, window={self.window}, shift={self.shift}"


class WindowAttention(ShiftedWindows):
    """Self-attention within shifted windows, with a learned bias for each relative position (Liu et al. 2021, eq. 4).

    Args:
        original: torchvision's `ShiftedWindowAttention`.
    """

    relative_position_bias_table: nn.Parameter

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `ShiftedWindows.attend`."""
        q, k, v = split_heads(self.qkv(tokens), self.head_dim)
        bias = table_bias(self.relative_position_bias_table, self.relative_position_index)
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1) + bias, v


class CosineWindowAttention(ShiftedWindows):
    """Self-attention within shifted windows by the cosine of queries and keys (Liu et al. 2022, section 3.2 and 3.3).

    The bias of a relative position comes from a small network. Keys have no bias: that of `qkv` has entries for them,
    as in torchvision, but they change no output.

    Args:
        original: torchvision's `ShiftedWindowAttentionV2`.
    """

    logit_scale: nn.Parameter
    cpb_mlp: nn.Sequential
    relative_coords_table: Tensor
    keys: Tensor

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.register_buffer("keys", self.qkv.weight.new_tensor([[0], [1], [0]]), persistent=False)

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `ShiftedWindows.attend`."""
        qkv = self.qkv(tokens)
        if self.qkv.bias is not None:
            # Taken from all at once, so that its gradient is the sum that it is within `qkv`, and cancels to the bit.
            qkv = qkv - (torch.unflatten(self.qkv.bias, 0, (3, -1)) * self.keys).flatten()
        q, k, v = split_heads(qkv, self.head_dim)
        bias = network_bias(self.cpb_mlp, self.relative_coords_table, self.relative_position_index)
        return cosine_logits(q, k, self.logit_scale) + bias, v


class PartitionAttention(TakenOver):
    """Self-attention within each of several sets of tokens, as MaxViT's blocks and grids are (Tu et al. 2022, 3.2).

    Args:
        original: torchvision's `RelativePositionalMultiHeadAttention`.
    """

    to_qkv: nn.Linear
    merge: nn.Linear
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.head_dim = int(original.head_dim)  # type: ignore[arg-type]
        # By the width of the embedding, not of a head, and fixed: heads that leave must not make the others louder.
        self.scale = float(original.scale_factor)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, sets, tokens, dim]` to `[N, sets, tokens, dim]`."""
        # [N, sets, tokens, 3 * heads * head_dim] to three of [N, sets, heads, tokens, head_dim]
        q, k, v = self.to_qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias = table_bias(self.relative_position_bias_table, self.relative_position_index)
        mixed = (q @ (k * self.scale).transpose(-2, -1) + bias).softmax(-1) @ v
        out: Tensor = self.merge(mixed.transpose(2, 3).flatten(3))
        return out

    def extra_repr(self) -> str:
        """Show what the layers inside do not say."""
        return f"head_dim={self.head_dim}, scale={self.scale:.4g}"


OPENED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": WindowAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": CosineWindowAttention,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": PartitionAttention,
}
"""By the full name of a class, what makes of one of its modules one whose heads can be removed."""


def over_windows(x: Tensor, window: Pair, shift: Pair, attend: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """Cut feature maps into shifted windows, attend within each, and put them together again.

    Args:
        x: `[N, H, W, dim]`; padded with zeros to whole windows.
        window: Height and width of a window.
        shift: By how much the windows are shifted, around the edges; not in a direction that one window fills.
        attend: Maps `[N * windows, tokens, dim]`, and what `region_mask` returns or None, to tokens like the first.

    Returns:
        `[N, H, W, dim]`.
    """
    height, width = x.shape[1:3]
    bottom, right = -height % window[0], -width % window[1]
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    padded = height + bottom, width + right
    down, along = (s if w < size else 0 for s, w, size in zip(shift, window, padded, strict=True))
    shifted = bool(down or along)
    if shifted:
        x = x.roll((-down, -along), (1, 2))
    mask = region_mask(padded, window, (down, along), x) if shifted else None
    x = attend(_cut(x, window).flatten(0, 2), mask)
    # [N * windows, tokens, dim] to [N, rows, height of a window, columns, width of a window, dim] to [N, H, W, dim]
    grid = padded[0] // window[0], padded[1] // window[1]
    x = torch.unflatten(torch.unflatten(x, 0, (-1, *grid)), 3, window).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    if shifted:
        x = x.roll((down, along), (1, 2))
    return x[:, :height, :width] if bottom or right else x


def region_mask(size: Pair, window: Pair, shift: Pair, like: Tensor) -> Tensor:
    """What keeps tokens apart that only the shift around the edges has brought into one window.

    Args:
        size: Height and width of the padded feature maps.
        window: Height and width of a window.
        shift: By how much they were shifted.
        like: Says of which type and where.

    Returns:
        `[windows, tokens, tokens]`: 0 within a region, -100 between regions.
    """
    sides = []
    for length, span, step in zip(size, window, shift, strict=True):
        place = torch.arange(length, device=like.device)
        inside = torch.where(place >= length - step, 2, (place >= length - span).long())
        sides.append(inside if step else torch.zeros_like(place))
    region = _cut((3 * sides[0][:, None] + sides[1])[None, :, :, None], window).flatten(0, 2).squeeze(-1)
    apart = region[:, None, :] != region[:, :, None]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, -100.0)


def _cut(x: Tensor, window: Pair) -> Tensor:
    """`[N, H, W, C]` to `[N, rows of windows, columns of windows, tokens, C]`."""
    x = torch.unflatten(torch.unflatten(x, 2, (-1, window[1])), 1, (-1, window[0]))
    return x.transpose(2, 3).flatten(3, 4)


def split_heads(qkv: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[N, tokens, 3 * heads * head_dim]` to three of `[N, heads, tokens, head_dim]`: queries, keys and values."""
    q, k, v = torch.unflatten(qkv, -1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def table_bias(table: Tensor, index: Tensor) -> Tensor:
    """What each head adds for the relative position of two tokens.

    Args:
        table: `[positions, heads]`.
        index: Which position each pair of tokens has, `tokens * tokens` numbers in any shape.

    Returns:
        `[heads, tokens, tokens]`.
    """
    tokens = math.isqrt(index.numel())
    return torch.unflatten(table[index.flatten()], 0, (tokens, tokens)).permute(2, 0, 1)


def network_bias(network: nn.Module, coordinates: Tensor, index: Tensor) -> Tensor:
    """As `table_bias`, where a network makes the table from coordinates `[1, 2 Wh - 1, 2 Ww - 1, 2]`; in (0, 16)."""
    return 16 * torch.sigmoid(table_bias(network(coordinates).flatten(0, 2), index))


def cosine_logits(q: Tensor, k: Tensor, logit_scale: Tensor) -> Tensor:
    """Cosines of queries and keys `[N, heads, tokens, head_dim]`, times a scale a head, at most 100."""
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return cosines * logit_scale.clamp(max=math.log(100.0)).exp()


def mix(logits: Tensor, values: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Weigh the values by the softmax of the logits.

    Args:
        logits: `[N * windows, heads, tokens, tokens]`.
        values: `[N * windows, heads, tokens, head_dim]`.
        mask: `[windows, tokens, tokens]`, added to the logits of each window; or None.
        dropout: Probability with which a weight is dropped.

    Returns:
        `[N * windows, tokens, heads * head_dim]`.
    """
    if mask is not None:
        logits = (torch.unflatten(logits, 0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return (F.dropout(logits.softmax(-1), dropout) @ values).transpose(1, 2).flatten(2)


def _sizes(original: nn.Module) -> tuple[Pair, Pair, int]:
    """Window, shift and a head's width of one of torchvision's shifted window attentions."""
    window, shift = (tuple(getattr(original, name)) for name in ("window_size", "shift_size"))
    rows: int = original.qkv.out_features  # type: ignore[union-attr, assignment]
    return window, shift, rows // (3 * int(original.num_heads))  # type: ignore[arg-type]


def _dropouts(original: nn.Module) -> tuple[float, float]:
    return float(original.attention_dropout), float(original.dropout)  # type: ignore[arg-type]
