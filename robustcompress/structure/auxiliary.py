"""Layers that only training calls, such as GoogLeNet's auxiliary classifiers: how to have them called, what comes out.

They are part of the structure: what they read may only change with them. A pass in evaluation mode does not see them,
and one in training mode is not the same twice. So they are looked at with the modules that hold them in training mode,
and everything else (dropout, batch norms, stochastic depth) in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn


def expose(net: nn.Module, auxiliary: Collection[str]) -> nn.Module:
    """Put the modules that hold these layers in training mode, and all others in evaluation mode.

    Args:
        net: The network; its modes are changed.
        auxiliary: Names of layers that only training calls; with none the network is simply in evaluation mode.

    Returns:
        The network.
    """
    net.eval()
    for name in auxiliary:
        while name:
            name = name.rpartition(".")[0]
            net.get_submodule(name).training = True
    return net


def tensors_of(output: Any) -> tuple[torch.Tensor, ...]:
    """The tensors in what a network returned, in order: the first one is its logits.

    Args:
        output: A tensor; or a tuple or a list, also of such, in which anything else is passed over.
    """
    if isinstance(output, torch.Tensor):
        return (output,)
    if isinstance(output, tuple | list):
        return tuple(tensor for part in output for tensor in tensors_of(part))
    return ()
