"""Self-attention whose number of heads follows from its weights, so that heads can be removed and added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.errors import Problems, UnsupportedModelError
from robustcompress.models import timm_attention, windows


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2).

    `qkv` writes the queries of all heads, then their keys, then their values; each head takes `head_dim` neighbouring
    rows of each third, and as many neighbouring columns of `proj`. Heads that go take their rows and columns with them.

    Args:
        dim: Width of the embedding.
        heads: Number of heads to begin with.
        head_dim: Width of each head; the heads together need not be as wide as the embedding.
        bias: Whether `qkv` has a bias.
        dropout: Probability with which attention weights are dropped while training.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=bias)
        self.proj = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens `[N, T, dim]` to `[N, T, dim]`."""
        # [N, T, 3 * heads * head_dim] to three of [N, heads, T, head_dim]
        parts = self.qkv(x).unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], dropout_p=dropout)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out

    def extra_repr(self) -> str:
        """Show what the layers inside do not say."""
        return f"head_dim={self.head_dim}, dropout={self.dropout}"


class OpenAttention(nn.Module):
    """Stands in for an `nn.MultiheadAttention` that attends a batch of sequences to themselves.

    Args:
        attention: What it computes.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """Map `[N, T, dim]`, given three times, to `[N, T, dim]` and no weights.

        Raises:
            UnsupportedModelError: The three differ, or a mask is given, or the attention weights are asked for.
        """
        problems = Problems("the attention that replaced nn.MultiheadAttention cannot be called like this")
        if query is not key or query is not value:
            problems.add("query, key and value differ; only self-attention can be replaced")
        # Where nothing is said, torch returns the weights; a caller that wants them indexes them, and is told there.
        allowed = {"need_weights": (True, False), "attn_mask": (None,), "key_padding_mask": (None,)}
        allowed |= {"is_causal": (False,), "average_attn_weights": (True, False)}
        for name, value_given in options.items():
            if not any(value_given is option for option in allowed.get(name, ())):
                problems.add(f"{name} is given; only plain attention can be replaced")
        problems.raise_if_any(UnsupportedModelError)
        return self.inner(query), None


def open_attention(model: nn.Module) -> nn.Module:
    """Replace the attention in a network by the same function with heads that can be removed.

    Opened are `nn.MultiheadAttention`, the attention of torchvision's Swin (both versions) and MaxViT, and that of
    timm's Swin (both versions), BEiT and EVA. No random number is drawn; frozen weights stay frozen.

    torch's module cannot lose a head: it holds queries, keys and values as one bare parameter, and its forward asserts
    that the heads together are as wide as the embedding. The replacement has the same weights (`in_proj_weight` becomes
    `inner.qkv.weight`, `out_proj` becomes `inner.proj`), and it returns None for the weights of the attention. The
    others infer a head's width from the embedding's; their replacements keep every name in the state dict.

    Args:
        model: Edited in place; torchvision's VisionTransformer, for example.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: An attention that cannot be replaced: the model itself; or torch's with keys or values of
            another width, of added biases or zeros, not batch first, or inside torch's own encoder layers, which read
            its parameters.
    """
    problems = Problems(f"the attention of {type(model).__name__} cannot be replaced")
    found = [(name, m, opener) for name, m in model.named_modules() if (opener := _opener(m)) is not None]
    for name, module, _ in found:
        if not name:
            problems.add("attention: it is the model itself")
        if isinstance(module, nn.MultiheadAttention):
            _check_multihead(model, name, module, problems)
    problems.raise_if_any(UnsupportedModelError)
    for name, module, opener in found:
        owner_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner_name), attribute, opener(module))
    return model


def _opener(module: nn.Module) -> Callable[[Any], nn.Module] | None:
    if isinstance(module, nn.MultiheadAttention):
        return _opened
    kind = type(module)  # by its name, and not its bases': a subclass may compute something else
    name = f"{kind.__module__}.{kind.__qualname__}"
    return windows.OPENED.get(name) or timm_attention.OPENED.get(name)


def _check_multihead(model: nn.Module, name: str, module: nn.MultiheadAttention, problems: Problems) -> None:
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        problems.add(f"{name}: it is part of {type(parent).__name__}, which reads its parameters")
    if not module._qkv_same_embed_dim:
        problems.add(f"{name}: keys or values are not as wide as queries")
    if module.bias_k is not None or module.add_zero_attn:
        problems.add(f"{name}: it adds a bias or zeros to the sequence")
    if not module.batch_first:
        problems.add(f"{name}: the sequence comes before the batch; use batch_first=True")


@torch.no_grad()
def _opened(module: nn.MultiheadAttention) -> OpenAttention:
    weight, bias = module.in_proj_weight, module.in_proj_bias
    with torch.device("meta"):  # its own first weights would cost random numbers
        inner = Attention(module.embed_dim, module.num_heads, module.head_dim, bias=bias is not None)
    inner.dropout = float(module.dropout)
    inner.qkv.weight, inner.qkv.bias = weight, bias
    inner.proj.weight, inner.proj.bias = module.out_proj.weight, module.out_proj.bias
    return OpenAttention(inner.train(module.training)).train(module.training)
