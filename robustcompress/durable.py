"""Text files that are there whole or not at all, also after the process was killed or the power has failed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any


def ground(path: Path) -> Path:
    """What is nearest above a path that may not exist: what lacks in between is made there when it is written.

    It may be a file, or a link that leads nowhere; then nothing can be.
    """
    return next(above for above in path.absolute().parents if above.exists() or above.is_symlink())


def sync_file(file: IO[Any]) -> None:
    """Have the disk hold what was written, before a rename relies on it."""
    file.flush()
    os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text under another name and rename it: a reader sees what was there before, or all of it.

    Raises:
        OSError: The disk does not take it; what was there before stands.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            sync_file(file)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as an indented JSON file, in the same way.

    Raises:
        OSError: The disk does not take it.
        ValueError: A number is not finite, which JSON does not know.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
