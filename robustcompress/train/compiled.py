"""Compiled forward and backward passes for training on GPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CompiledNetwork(nn.Module):
    """A network whose passes are compiled; parameters, buffers, hooks and modes are those of the network itself.

    A compiled backward pass computes the gradient of every input that requires one. So that attacks, which run in eval
    mode, do not compute gradients of the weights and throw them away, the weights are constants in eval mode: a loss
    computed there trains nothing.

    Args:
        model: The network. After a structural edit make a new one.
        backend: Of `torch.compile`.
    """

    def __init__(self, model: nn.Module, *, backend: str = "inductor") -> None:
        super().__init__()
        torch.compiler.reset()  # what was compiled for the shapes before an edit will not be called again
        self.network = model
        self._compiled = [torch.compile(model, backend=backend, dynamic=False)]  # in a list: not a submodule again

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to logits `[N, K]`."""
        moving = [] if self.network.training else [p for p in self.network.parameters() if p.requires_grad]
        for parameter in moving:
            parameter.requires_grad_(False)
        try:
            logits: Tensor = self._compiled[0](x)
            return logits
        finally:
            for parameter in moving:
                parameter.requires_grad_(True)
