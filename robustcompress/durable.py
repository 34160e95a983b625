"""Text files that are there whole or not at all, also after the process was killed or the power has failed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any


def ground(path: Path) -> Path:
    """What is nearest above a path that may not exist: what lacks in between is made there when it is written.

    It may be a file, or a link that leads nowhere; then nothing can be.
    """
    above = path.absolute().parents
    return next((parent for parent in above if parent.exists() or parent.is_symlink()), path.absolute())


def make_way(path: Path) -> list[Path]:
    """Make the directories above a path.

    Returns:
        Those that are new, the lowest first, for `clear_way`.

    Raises:
        OSError: They cannot be made; none of them stays.
    """
    made = list(itertools.takewhile(lambda above: not above.exists(), path.absolute().parents))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        clear_way(made)
        raise
    return made


def clear_way(made: Sequence[Path]) -> None:
    """Remove what `make_way` made, but for directories in which something is by now."""
    with contextlib.suppress(OSError):
        for directory in made:
            directory.rmdir()


@contextlib.contextmanager
def draft_of(directory: Path, *, prefix: str | None = None) -> Iterator[Path]:
    """An empty directory beside another that does not exist, to be filled and renamed to it; gone if it was not.

    Args:
        directory: What it is to become. Directories above it are made, and removed again if nothing came of it.
        prefix: Its name begins so; by default it is hidden.

    Raises:
        OSError: It cannot be made.
    """
    made = make_way(directory)
    try:
        draft = Path(tempfile.mkdtemp(prefix=prefix or f".{directory.name}-", dir=directory.parent))
        try:
            draft.chmod(0o755)
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    finally:
        clear_way(made)


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
