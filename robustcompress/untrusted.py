"""Files from strangers: sizes are looked at before contents, and nothing is believed that cannot be true.

Everything here raises ValueError (or OSError) with a reason; who reads a kind of file says which file, and what to do.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

LARGEST_RECORD = 1 << 28
"""Bytes of a JSON file; the history of a long run has a few megabytes."""

_DEEPEST = 200
_LARGEST = 1 << 64
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def read_text(path: Path, largest: int = LARGEST_RECORD) -> str:
    """Read a text of bounded size.

    Raises:
        ValueError: It is larger, or not UTF-8.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:  # one byte more: what a file says of its size need not be true
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest} bytes")
    return content.decode("utf-8")


def parse_json(text: str, *, nan: bool = False) -> Any:
    """Read JSON whose texts can be shown, and whose numbers are numbers.

    Args:
        text: The JSON.
        nan: Whether NaN and Infinity, which Python writes and JSON does not have, may stand in it.

    Raises:
        ValueError: It is no such JSON.
    """
    try:
        value = json.loads(text) if nan else json.loads(text, parse_constant=_no_number)
        check_plain(value, finite=not nan)
    except RecursionError as error:
        raise ValueError(f"it is nested in more than {_DEEPEST} levels") from error
    return value


def read_json(path: Path, largest: int = LARGEST_RECORD) -> Any:
    """Read a JSON file of bounded size; see `parse_json`.

    Raises:
        ValueError: It is larger, or no such JSON.
        OSError: It cannot be read.
    """
    return parse_json(read_text(path, largest))


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def check_plain(value: Any, *, finite: bool = False) -> None:
    """Raise ValueError where data are not plain, are nested too deep, or hold what cannot be shown or computed with.

    Args:
        value: Mappings, lists, texts, numbers, booleans and None.
        finite: Whether NaN and infinity are refused, too.
    """
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > _DEEPEST:
            raise ValueError(f"it is nested in more than {_DEEPEST} levels")
        if isinstance(item, str):
            if found := _UNSEEN.search(item):
                raise ValueError(f"a text holds the character {found[0]!a}, which cannot be shown")
        elif isinstance(item, dict):
            stack += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            stack += [(part, depth + 1) for part in item]
        elif isinstance(item, int) and abs(item) >= _LARGEST:
            raise ValueError("a whole number has more than 64 bits")
        elif finite and isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{item} is no number")
        elif not isinstance(item, int | float | None):
            raise ValueError(f"a {type(item).__name__} is no plain value: write numbers, texts, lists and mappings")


def shown(text: str, longest: int) -> str:
    """A text for people: nothing in it steers a terminal, and where it is longer than `longest` it is cut."""
    clean = _UNSEEN.sub("\ufffd", text[: longest + 1])
    return clean if len(text) <= longest else f"{clean[:longest]}... ({len(text)} characters in all)"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: It is damaged, or no such file.
        OSError: It cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error


def load_state(model: nn.Module, tensors: dict[str, Tensor], *, exact: bool = False) -> None:
    """Put tensors into a network that has exactly these, of these shapes.

    Args:
        model: The network.
        tensors: By name.
        exact: Whether types must be the same; else floats may be of another precision.

    Raises:
        ValueError: It has others.
    """
    for name, own in model.state_dict(keep_vars=True).items():
        given = tensors.get(name)
        if given is None or given.dtype == own.dtype:
            continue
        if exact or not (given.dtype.is_floating_point and own.dtype.is_floating_point):
            raise ValueError(f"{name} is of type {given.dtype}, the network's is {own.dtype}")
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(" ".join(" ".join(str(error).splitlines()[:2]).split())[:300]) from error


def room() -> int:
    """Bytes that may be taken: half of what is free, and of what this process may still have."""
    free = [4 << 30]
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not on every system
        free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(ValueError, OSError, StopIteration):  # better: pages of the disk's cache can be had, too
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))]
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            free.append(max(0, limit - pages * resource.getpagesize()))
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        group = Path("/sys/fs/cgroup")
        most, now = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(max(0, most - now))
    return min(free) // 2
