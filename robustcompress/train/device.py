"""Where to compute."""

from __future__ import annotations

import torch

from robustcompress.errors import InputError


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn "auto" into cuda where there is one, else cpu; anything else into a torch device.

    Raises:
        InputError: The name means nothing to torch, or there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={str(device)!r} cannot be used ({str(error).splitlines()[0]}); try 'auto'") from error
    return resolved


def describe(device: torch.device) -> str:
    """Name the hardware behind a device, for result files."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"
