"""Those of timm's attention modules whose heads cannot be removed as they are, made such that they can.

timm is never imported here: a class is known by its name, and whoever has a module of it has timm. Most of timm's
vision transformers need none of this: their attention counts its own heads (see `structure.attention.FUSED`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.models.windows import TakenOver, cosine_logits, mix, network_bias, split_heads, table_bias


class HeadsOfTimm(TakenOver):
    """What timm's attention modules share.

    Args:
        original: One of them.
    """

    proj: nn.Linear
    attn_drop: nn.Dropout
    proj_drop: nn.Dropout

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.head_dim = _head_dim(original)
        if "k_bias" in self._buffers:  # zeros that are in no state dict, and would not follow the heads
            del self.k_bias

    @property
    def dropout(self) -> float:
        """The probability with which an attention weight is dropped now."""
        return self.attn_drop.p if self.training else 0.0


class CosineAttention(HeadsOfTimm):
    """Stands in for the window attention of Swin V2 (Liu et al. 2022).

    Its window stays: set the network's input size before it is opened.

    Args:
        original: timm's `swin_transformer_v2.WindowAttention`.
    """

    qkv: nn.Linear
    logit_scale: nn.Parameter
    cpb_mlp: nn.Sequential
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens of windows `[N * windows, T, dim]`, with a mask `[windows, T, T]`, to the same shape."""
        q, k, v = _biased(*split_heads(self.qkv(x), self.head_dim), self)
        bias = network_bias(self.cpb_mlp, self.relative_coords_table, self.relative_position_index)
        logits = cosine_logits(q, k, self.logit_scale) + bias
        mixed = mix(logits, v, mask, self.dropout)
        out: Tensor = self.proj_drop(self.proj(mixed))
        return out


class BiasedAttention(HeadsOfTimm):
    """Stands in for the attention of BEiT (Bao et al. 2022): biases of relative positions, none on keys.

    Args:
        original: timm's `beit.Attention`.
    """

    qkv: nn.Linear

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Map tokens `[N, T, dim]`, with a bias `[1, heads, T, T]` that layers share, to the same shape."""
        q, k, v = _biased(*split_heads(self.qkv(x), self.head_dim), self)
        bias, table = shared_rel_pos_bias, getattr(self, "relative_position_bias_table", None)
        if table is not None:
            own = table_bias(table, self.get_buffer("relative_position_index"))[None]
            bias = own if bias is None else own + bias
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.dropout)
        out: Tensor = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))
        return out


class RotaryAttention(HeadsOfTimm):
    """Stands in for the attention of EVA-02 (Fang et al. 2023): rotary positions, queries and keys fused or apart.

    Args:
        original: timm's `eva.EvaAttention`.
    """

    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.num_prefix_tokens = int(original.num_prefix_tokens)  # type: ignore[arg-type]
        self.rotate_half = bool(getattr(original, "rotate_half", False))

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map tokens `[N, T, dim]` to the same shape; `rope` turns all but the first `num_prefix_tokens`."""
        if getattr(self, "qkv", None) is not None:
            q, k, v = _biased(*split_heads(self.get_submodule("qkv")(x), self.head_dim), self)
        else:
            layers = (self.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj"))
            q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._turned(q, rope).type_as(v), self._turned(k, rope).type_as(v)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, dropout_p=self.dropout, is_causal=is_causal
        )
        heard = self.norm(mixed.transpose(1, 2).flatten(2))
        if getattr(self, "gate", None) is not None:
            heard = heard * self.get_submodule("gate")(x).sigmoid()
        out: Tensor = self.proj_drop(self.proj(heard))
        return out

    def _turned(self, x: Tensor, rope: Tensor) -> Tensor:
        turn = importlib.import_module("timm.layers").apply_rot_embed_cat  # its caller's own package
        first, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        return torch.cat([first, turn(rest, rope, half=self.rotate_half)], 2)


def _open_windows(module: nn.Module) -> nn.Module:
    """Say how wide a head is: all that the attention of timm's first Swin, which counts its heads, leaves out."""
    module.head_dim = _head_dim(module)  # type: ignore[assignment]
    return module


OPENED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "timm.models.swin_transformer.WindowAttention": _open_windows,
    "timm.models.swin_transformer_v2.WindowAttention": CosineAttention,
    "timm.models.beit.Attention": BiasedAttention,
    "timm.models.eva.EvaAttention": RotaryAttention,
}
"""By the full name of a class, what makes of one of its modules one whose heads can be removed."""


def _head_dim(original: nn.Module) -> int:
    if hasattr(original, "head_dim"):
        return int(original.head_dim)  # type: ignore[arg-type]
    return int(original.qkv.out_features) // (3 * int(original.num_heads))  # type: ignore[union-attr, arg-type]


def _biased(q: Tensor, k: Tensor, v: Tensor, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Add the module's biases of queries and values, where it has them, to `[N, heads, T, head_dim]`."""
    added = []
    for part, name in ((q, "q_bias"), (v, "v_bias")):
        bias = getattr(module, name, None)
        added.append(part if bias is None else part + bias.unflatten(0, (-1, 1, part.shape[-1])))
    return added[0], k, added[1]
