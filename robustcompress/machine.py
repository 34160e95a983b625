"""What the numbers were made with: versions and hardware."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
