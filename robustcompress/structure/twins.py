"""Copies with random weights, on which structures are proven."""

from __future__ import annotations

import torch
from torch import nn

from robustcompress.structure.copies import copied
from robustcompress.structure.kinds import taught_kind


@torch.no_grad()
def random_twin(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy in eval mode with random weights and statistics.

    A zero-initialised layer, a dead unit or a fresh batch norm would hide what an edit does wrong until it is trained.
    """
    twin = copied(model, lambda t: torch.empty_like(t, dtype=dtype) if isinstance(t, nn.Parameter) else _as(t, dtype))
    draw = _Noise(dtype, sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())))
    for name, parameter in twin.eval().named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias"):
            bound = (6 / max(1, parameter[0].numel())) ** 0.5
            draw.fill(parameter, -bound, bound)
        else:
            draw.fill(parameter, 0.5, 1.5)
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for tensor in (module.running_mean, module.running_var):
                if tensor is not None:
                    draw.fill(tensor, 0.5, 1.5)
        elif (kind := taught_kind(module)) is not None:
            for name in sorted({name for slots in kind.slots.values() for name, _ in slots} & module._buffers.keys()):
                if (tensor := module._buffers[name]) is not None and tensor.is_floating_point():
                    draw.fill(tensor, 0.5, 1.5)
    return twin


class _Noise:
    """Random numbers that begin again after a prime number of them: as good here, and much quicker."""

    PERIOD = 999_983

    def __init__(self, dtype: torch.dtype, most: int) -> None:
        self._period = min(self.PERIOD, most)  # no more memory for the noise of a small network than for itself
        self._values = torch.rand(self._period, generator=torch.Generator().manual_seed(1), dtype=dtype)
        self._next = 0

    def fill(self, tensor: torch.Tensor, low: float, high: float) -> None:
        tensor = tensor.detach()
        here = tensor.is_contiguous() and tensor.device == self._values.device and tensor.dtype == self._values.dtype
        flat = tensor.view(-1) if here else torch.empty(tensor.numel(), dtype=self._values.dtype)
        count, done = tensor.numel(), 0
        while done < count:
            size = min(count - done, self._period - self._next)
            torch.add(
                self._values.new_full((), low),
                self._values[self._next : self._next + size],
                alpha=high - low,
                out=flat[done : done + size],
            )
            done, self._next = done + size, (self._next + size) % self._period
        if not here:
            tensor.copy_(flat.view(tensor.shape))


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().clone().to(dtype) if tensor.is_floating_point() else tensor.detach().clone()
