"""What can go wrong, and how it is said: one message that names every value at fault and its remedy."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any


class RobustCompressError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(RobustCompressError, ValueError):
    """The caller passed something that cannot work; the message names the value and the remedy."""


class DiskError(InputError):
    """The disk does not take a result: it is full, read-only, or gone. The work is not at fault, nor lost."""


class UnsupportedModelError(InputError):
    """The network holds layers or shapes that cannot be edited; all of them are listed, each with its reason."""


class BudgetError(InputError):
    """No widths meet the budget, or the model already does."""


class ResultError(RobustCompressError):
    """A saved result is missing, truncated, tampered with, or of a newer format."""


class CheckpointError(ResultError):
    """A checkpoint is damaged, of a newer format, or of a run that went another way than this one."""


class OutOfTime(RobustCompressError):  # noqa: N818 - no failure: the run goes on when it is called again
    """A run reached its deadline; its checkpoint is written, and the same call with it goes on from there."""


class Interrupted(OutOfTime):
    """A signal asked a run to stop (see `graceful`); where it keeps a checkpoint, the same call goes on from there.

    Attributes:
        signal: Which one.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class HubError(RobustCompressError):
    """A hub cannot be reached, or failed."""


class ParityError(RobustCompressError):
    """The exported file does not compute what the model computes."""


class AccuracyError(ParityError):
    """A smaller file loses more accuracy than it may, clean or under attack."""


class Problems:
    """Collects complaints so that the caller reads all of them at once.

    Example:
        >>> problems = Problems("compress() cannot start")
        >>> problems.add("epochs=-1: must be positive")
        >>> problems.raise_if_any()
        Traceback (most recent call last):
        ...
        robustcompress.errors.InputError: compress() cannot start: epochs=-1: must be positive
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.items: list[str] = []

    def add(self, problem: str) -> None:
        """Note one problem: the value at fault, then the remedy."""
        if problem not in self.items:
            self.items.append(problem)

    def attempt(self, make: Callable[[], Any], *, also: tuple[type[Exception], ...] = ()) -> Any:
        """Return what `make` makes; or note what it complains about and return None, so that all complaints are heard.

        Args:
            make: Makes something.
            also: What else, beside the package's own errors, is a complaint.
        """
        complaints: tuple[type[Exception], ...] = (RobustCompressError, *also)
        try:
            return make()
        except complaints as error:
            self.add(str(error))
            return None

    def raise_if_any(self, error: type[RobustCompressError] = InputError) -> None:
        """Raise `error` with everything noted so far, or return when nothing was."""
        if len(self.items) == 1:
            raise error(f"{self.title}: {self.items[0]}")
        if self.items:
            raise error(f"{self.title}:\n" + "\n".join(f"  - {item}" for item in self.items))


def nearest(name: str, options: Iterable[str]) -> str:
    """Return a hint that offers the nearest of `options`, and lists them while they are few."""
    choices = sorted(options)
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {match[0]!r}?" if match else ""
    listed = f" (one of: {', '.join(choices)})" if len(choices) <= 12 else ""
    return hint + listed


def first_line(error: BaseException, limit: int = 150) -> str:
    """The first line that an error of another library says, to be quoted in ours; its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:limit]
