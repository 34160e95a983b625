"""Where to compute."""

from __future__ import annotations

import torch
from torch import nn

from robustcompress.distributed import current
from robustcompress.errors import InputError, first_line


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn "auto" into cuda where there is one, else cpu; anything else into a torch device.

    Raises:
        InputError: The name means nothing to torch, there is no such device here, or it is another process's.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type == "meta":
            raise InputError("device='meta' holds no values; try 'auto'")
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device={str(device)!r} cannot be used ({first_line(error)}); try 'auto'") from error
    world = current()
    if world.size > 1 and resolved.type == "cuda" and resolved.index not in (None, world.local_rank):
        raise InputError(f"device={str(device)!r}: each process takes the GPU of its local rank; try 'auto'")
    return resolved


def describe(device: torch.device) -> str:
    """Name the hardware behind a device, for result files."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def safe_memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels-last, unless training in it could crash.

    On x86 CPUs oneDNN's weight gradient of a strided 1x1 convolution writes past its workspace in channels-last when
    there are fewer input channels than one vector holds (8 floats with AVX2, 16 with AVX-512): memory is corrupted.
    """
    if device.type != "cpu":
        return torch.channels_last
    vector = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and max(m.stride) > 1]
    if any(module.in_channels // module.groups < vector for module in strided):
        return torch.contiguous_format
    return torch.channels_last


@torch.no_grad()
def set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay out every four-dimensional tensor of a network in this format, in place.

    `Module.to` leaves the strides of 1x1 kernels as they are, which then still count as channels-last.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 4:
            tensor.data = torch.empty_like(tensor, memory_format=memory_format).copy_(tensor)


def computes_in_bf16(wanted: bool | str, device: torch.device) -> bool:
    """Whether forward passes run in bfloat16: as wanted, and for "auto" on GPUs that can."""
    return wanted is True or (wanted == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
