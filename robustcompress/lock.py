"""One process at a time writes to a directory: the second is refused at once, and told who the first is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustcompress.distributed import ALONE, World
from robustcompress.durable import clear_way, make_way
from robustcompress.errors import InputError

NAME = ".lock"
"""How the lock's file ends, or is called where it can only lie within the directory."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(slots=True)
class _Held:
    """A lock of this process, or of the one that it was forked from."""

    owner: tuple[int, int]
    path: Path
    descriptor: int
    made: list[Path]
    depth: int = 1


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


@contextmanager
def held(*places: Path | None, world: World = ALONE) -> Iterator[None]:
    """Keep other processes, and other threads of this one, from writing to some directories.

    The lock is the kernel's (`fcntl` record locks, which network file systems know too): it goes with its process, also
    when that is killed, and a forked child does not inherit it. The file beside the directory only tells who holds it.
    The same thread may take it again. Where the file system knows no locks, what the file says is believed; where the
    file cannot be made, nothing is locked, and nothing can be written there either.

    Args:
        places: Directories, which need not exist; None is left out.
        world: The processes that write there together: the first one locks, for all.

    Raises:
        InputError: Another process holds one of them: its host, number and beginning are named.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            for place in places:
                if place is not None:
                    stack.enter_context(_one(Path(place)))

        world.only_first(enter)
        yield


@contextmanager
def _one(place: Path) -> Iterator[None]:
    key, me = place.resolve(), (os.getpid(), threading.get_ident())
    with _guard:
        mine = _held.get(key)
        if mine is not None and mine.owner == me:
            mine.depth += 1
        elif mine is not None and mine.owner[0] == me[0]:
            raise _taken(place, {"host": socket.gethostname(), "pid": me[0], "thread": True})
        else:  # free, or held by the process that this one was forked from, which the kernel knows
            path = _file_of(key)
            made: list[Path] = []
            descriptor = _lock(place, path, made)
            mine = None if descriptor is None else _Held(me, path, descriptor, made)
            if mine is not None:
                _held[key] = mine
    try:
        yield
    finally:
        if mine is not None:
            with _guard:
                mine.depth -= 1
                if mine.depth == 0:
                    del _held[key]
                    with contextlib.suppress(OSError):
                        mine.path.unlink()
                    os.close(mine.descriptor)
                    clear_way(mine.made)


def _file_of(key: Path) -> Path:
    beside = key.with_name(f".{key.name}{NAME}")
    return key / NAME if key.is_dir() and not os.access(key.parent, os.W_OK) else beside


def _lock(place: Path, path: Path, made: list[Path]) -> int | None:
    """The open file that holds the lock; None where there can be none.

    Args:
        place: What is locked, for the message.
        path: The file. Directories above it are made, or two could begin in a place that neither has made yet.
        made: Takes those that are new.
    """
    lost = 0
    while True:
        try:
            made[:0] = make_way(path)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            lost += 1
            if lost > 100:
                return None
            continue  # somebody whose way it was too has just removed it: once more
        except OSError:
            return None
        try:
            supported = _try(descriptor)
        except OSError:
            told = _read(descriptor)
            os.close(descriptor)
            raise _taken(place, told) from None
        if not supported:
            told = _read(descriptor)
            if _seems_alive(told):
                os.close(descriptor)
                raise _taken(place, told | {"remove": str(path)})
        with contextlib.suppress(OSError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                _tell(descriptor)
                return descriptor
        os.close(descriptor)  # whoever held it has removed it meanwhile: once more, with a new file


def _try(descriptor: int) -> bool:
    """Take the lock; False where the system knows none.

    Raises:
        OSError: Another process has it.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _tell(descriptor: int) -> None:
    """Write down who holds the lock."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    told = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(told).encode(), 0)


def _read(descriptor: int) -> dict[str, Any]:
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _seems_alive(told: dict[str, Any]) -> bool:
    """Whether the process that a file tells of may still run; of another machine nobody can say."""
    if told.get("host") != socket.gethostname():
        return bool(told)
    try:
        os.kill(int(told["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except OSError:
        return True
    return int(told["pid"]) != os.getpid()


def _taken(place: Path, told: dict[str, Any]) -> InputError:
    if told.get("thread"):
        return InputError(f"{place} is being written to by another thread of this process: choose another directory")
    who = f"process {told.get('pid', 'of unknown number')} on {told.get('host', 'an unknown host')}"
    since = f", since {told['since']}" if "since" in told else ""
    remedy = f"; if that process is gone, remove {told['remove']}" if "remove" in told else ""
    return InputError(
        f"{place} is being written to by {who}{since}: wait until it has ended, or choose another directory{remedy}"
    )
