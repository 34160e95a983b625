"""What tells one reference network from another."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import nn


def fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 of a network's structure (layers, settings, names, shapes) and of its weights and buffers."""
    structure, weights = hashlib.sha256(), hashlib.sha256()
    printed = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # an address is no setting
    structure.update(printed.encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        structure.update(f"{name} {list(tensor.shape)} {tensor.dtype} {tensor.requires_grad}".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        weights.update(values.view(torch.uint8).numpy().data if values.numel() else b"")
    return {"model structure": structure.hexdigest(), "initial weights": weights.hexdigest()}
