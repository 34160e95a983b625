"""What the numbers were made with: versions, hardware, and how many threads serve it best."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "pyautoattack", "torch-pruning", "thop", "numpy")


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what the numbers depend on."""
    from robustcompress import __version__

    return {
        "robustcompress": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def hardware() -> dict[str, Any]:
    """The processor, its cores and the system; no host name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }


def fastest_threads(model: nn.Module, example: torch.Tensor, *, runs: int = 3) -> int:
    """Try one thread and torch's own number on forward and backward passes, and return the faster.

    Where other programs keep the cores busy, torch's threads spin for each other: two can take a hundred times as long
    as one. Where they do not, more threads help large batches and hardly help small ones.

    Args:
        model: On the CPU; its weights, mode and gradients are left alone.
        example: A batch of the size that will be used, `[N, 3, H, W]`.
        runs: Timed passes for each number, after one that is not.
    """
    times = {}
    for count in sorted({1, torch.get_num_threads()}):
        with threads(count):
            seconds = [_one_pass(model, example) for _ in range(runs + 1)]
        times[count] = statistics.median(seconds[1:])
    return min(times, key=lambda count: times[count])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads within one operation, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _one_pass(model: nn.Module, example: torch.Tensor) -> float:
    began = time.perf_counter()
    x = example.detach().clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    return time.perf_counter() - began
