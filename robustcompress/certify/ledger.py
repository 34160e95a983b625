"""Images that are certified already, kept in a file, so that a stopped run goes on where it was."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robustcompress.robust.kept import Kept
from robustcompress.untrusted import parse_json


class Ledger:
    """What was found of each image, one line each; a line that a crash cut short is made again.

    Args:
        directory: Where it is kept, made if missing; None for nowhere.
        settings: All that decides what is found: the file is named after their hash.
        warn: Told once where a line cannot be written; the run goes on.

    Raises:
        InputError: The directory cannot be made.
    """

    def __init__(
        self,
        directory: Path | None,
        settings: Mapping[str, Any],
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.kept = Kept(directory, warn)
        self._path = self.kept.path(settings, f"{settings['method']}-{{}}.jsonl")
        self._found: dict[int, tuple[int, float, float]] = {}
        content = self._path.read_bytes() if self._path is not None and self._path.is_file() else b""
        for line in content.splitlines():
            with contextlib.suppress(ValueError, TypeError, OverflowError):
                number, prediction, radius, seconds = parse_json(line.decode())
                self._found[int(number)] = (int(prediction), float(radius), float(seconds))

    def get(self, number: int) -> tuple[int, float, float] | None:
        """Prediction, radius and seconds of an image; None where it is still to be done."""
        return self._found.get(number)

    def put(self, number: int, prediction: int, radius: float, seconds: float) -> None:
        """Keep what was found of an image."""
        self._found[number] = (prediction, radius, seconds)
        if self._path is not None:
            with self.kept.trying(), self._path.open("a", encoding="utf-8") as file:
                # A leading break: what a crash left of the line before must not swallow this one.
                file.write(f"\n{json.dumps([number, prediction, radius, seconds])}\n")
