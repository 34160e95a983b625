"""What a long evaluation has found so far, in small files: a stopped one goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from robustcompress.durable import write_text
from robustcompress.errors import InputError
from robustcompress.untrusted import read_json


class Kept:
    """A directory of findings, each in a file that is named after all that decides what is found.

    Where nothing can be written any more the evaluation goes on: that is said once.

    Args:
        directory: Made if missing; None to keep nothing.
        warn: Told where findings cannot be kept.
        option: What the caller calls the directory.

    Raises:
        InputError: The directory cannot be made.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        warn: Callable[[str], None] | None = None,
        *,
        option: str = "resume_dir",
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self._warn, self._warned = warn, False
        if self.directory is not None:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"{option}={str(directory)!r} cannot be made ({error.strerror}): name another directory"
                ) from error

    def __str__(self) -> str:
        """The end of the sentence in which an evaluation says that it stops."""
        return "" if self.directory is None else f"; what it has found so far is kept in {self.directory}"

    def path(self, settings: Mapping[str, Any], name: str = "{}.json") -> Path | None:
        """The file of a finding; None where nothing is kept.

        Args:
            settings: All that decides what is found, as plain JSON.
            name: Of the file, with {} for their hash.
        """
        if self.directory is None:
            return None
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
        return self.directory / name.format(key)

    def read(self, path: Path | None) -> Any:
        """What a file holds; None where there is none, or nothing that can be read: it is then found again."""
        if path is None:
            return None
        try:
            return read_json(path)
        except (OSError, ValueError):
            return None

    def write(self, path: Path | None, value: Any) -> None:
        """Write so that a reader, also after a crash, sees the whole file or none."""
        if path is None:
            return
        with self.trying():
            write_text(path, json.dumps(value))

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Go on where writing fails, and say so the first time."""
        try:
            yield
        except OSError as error:
            if not self._warned and self._warn is not None:
                self._warn(f"what is finished could not be kept in {self.directory} ({error.strerror})")
            self._warned = True
