"""What the numbers were made with: versions and hardware."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "torch-pruning",
    "thop",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "pyautoattack",
    "numpy",
)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those it stands on."""
    from robustcompress import __version__

    found = {"python": platform.python_version(), "robustcompress": __version__}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def hardware() -> dict[str, Any]:
    """The processor, its cores and the system; no host name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
