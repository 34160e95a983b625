"""Work on the CPU that keeps the memory its tensors leave, in place of asking the system for it again.

glibc takes every block of more than 32 MB from the system and gives it back as soon as it is freed, and the end of its
heap with it. A network frees such blocks after every layer, and the system fills each page with zeros before it is had
again: with large batches that takes a good part of the time (`benchmarks/kept_memory.py`). Kept memory is torn into
pieces, so a process comes to hold more than it uses; it is therefore kept only where there is plenty.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustcompress.untrusted import room

SETTINGS = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_")
"""Environment variables by which users tell glibc what to do: where one is there, nothing is changed."""

EVERY_S = 1.0
"""How often it is asked how much memory is free."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER, _LARGEST = -1, 2**31 - 1
_UNKNOWN = 1 << 62
_USUAL_TRIM, _USUAL_MMAP = 64 << 20, 32 << 20  # what glibc's own rule comes to when large blocks are freed


def c_library() -> Any | None:
    """The C library whose allocator can be told; None where there is no such, or the user told it already."""
    return None if any(name in os.environ for name in SETTINGS) else _glibc()


@functools.cache
def _glibc() -> Any | None:
    if platform.libc_ver()[0] == "glibc":
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.malloc_trim.argtypes = [ctypes.c_size_t]
            library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
            return library
    return None


class Keeper:
    """Decides for the process whether memory is kept, for all who work at the time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._library: Any | None = None
        self._looked = float("-inf")
        self.keeps = self._refuses = False

    @contextmanager
    def working(self) -> Iterator[Callable[[], None]]:
        """Yield what is to be called after each step; memory is given back when the last one who works has ended."""
        with self._lock:
            if not self._users:
                self._library, self._looked, self._refuses = c_library(), float("-inf"), False
            self._users += 1
        try:
            yield self._look
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._let_go()

    def give_up(self) -> None:
        """Give back what is kept, and keep nothing more for those who work now: memory ran out."""
        with self._lock:
            self._refuses = True
            self._let_go()

    def _look(self) -> None:
        """Keep memory where twice what was ever held is free; stop for good where little is left."""
        if self._library is None or self._refuses or time.monotonic() - self._looked < EVERY_S:
            return
        with self._lock:
            self._looked = time.monotonic()
            held, most = _held()
            free = room() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's word for processes on a machine
            if not self.keeps and most <= free:
                self._library.mallopt(_TRIM_THRESHOLD, _NEVER)
                self._library.mallopt(_MMAP_THRESHOLD, _LARGEST)
                self.keeps = True
            elif self.keeps and 8 * free < held:
                self._refuses = True
                self._let_go()

    def _let_go(self) -> None:
        if self._library is not None and self.keeps:
            self._library.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
            self._library.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
            self._library.malloc_trim(0)
        self.keeps = False


KEEPER = Keeper()
"""The process's own."""


@contextmanager
def kept_memory(device_type: str) -> Iterator[Callable[[], None]]:
    """Keep memory while work on such a device lasts, where there is plenty of it.

    Args:
        device_type: As torch names it; on others than "cpu" nothing is done.

    Yields:
        What is to be called after each step: only a step that was made shows what one takes.
    """
    if device_type != "cpu":
        yield lambda: None
        return
    with KEEPER.working() as look:
        yield look


def _held() -> tuple[int, int]:
    """Bytes that this process holds, and the most that it ever held; far too many where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        found = {line.partition(":")[0]: line.split() for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        return 1024 * int(found["VmRSS"][1]), 1024 * int(found["VmHWM"][1])
    except (OSError, KeyError, IndexError, ValueError):
        return _UNKNOWN, _UNKNOWN
