"""Input normalisation as the first layer of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


class Normalize(nn.Module):
    """Maps images in [0, 1] to `(x - mean) / std`, so that eps means the same everywhere.

    The two buffers follow the model between devices and are not part of its state dict: they are arguments
    of the factory, and a saved result writes them down with the other arguments.

    Args:
        mean: One value per input channel, in units of [0, 1] images. The default is CIFAR-10's training set.
        std: One positive value per input channel, in the same units.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> None:
        super().__init__()
        # No state dict brings these values back to a model that was built on the meta device.
        device = torch.get_default_device()
        device = torch.device("cpu") if device.type == "meta" else device
        for name, values in (("mean", mean), ("std", std)):
            buffer = torch.tensor(values, device=device).view(1, -1, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images `[N, C, H, W]`."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        """Show the values, which also lets two models be compared by their printed form."""
        values = [[round(v, 6) for v in buffer.flatten().tolist()] for buffer in (self.mean, self.std)]
        return f"mean={values[0]}, std={values[1]}"
