"""How much memory there is, as far as the system tells: of the container where there is one, else of the machine."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # version 2, as containers see it
_UNKNOWN = 8 << 30


def whole_memory() -> int:
    """Bytes that there are, taken or free: the same whenever it is asked."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        machine = _UNKNOWN
    try:
        return min(machine, int((_CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return machine


def processors() -> int:
    """Processors that this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
