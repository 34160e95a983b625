"""What a person sees while they wait: a bar in a terminal, one line a phase elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any


class PhaseBar:
    """One phase's bar; `advance` it after every step."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:
        self._bar = bar
        self._task = task
        self.text = ""

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Count one step, and show the metrics of the moment."""
        self.text = describe(metrics) or self.text
        if self._bar is not None:
            self._bar.update(self._task, advance=1, metrics=self.text)


class Progress:
    """Shows progress on the terminal, or says nothing.

    Args:
        enabled: False is silent.
        title: What stands in front of every phase, for example the strategy.
    """

    def __init__(self, enabled: bool = True, title: str = "") -> None:
        self.enabled = enabled
        self.title = title

    def say(self, line: str) -> None:
        """Print one line."""
        if self.enabled:
            console().print(line, markup=False, highlight=False)

    @contextlib.contextmanager
    def phase(self, name: str, steps: int, done: int = 0) -> Iterator[PhaseBar]:
        """Show a bar over `steps` steps, `done` of which lie behind; leave one line behind."""
        if not self.enabled:
            yield PhaseBar()
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        label = f"{self.title}: {name}" if self.title else name
        terminal = console().is_terminal
        start = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=console(), disable=not terminal, transient=True) as bar:
            shown = PhaseBar(bar, bar.add_task(label, total=steps, completed=done, metrics=""))
            yield shown
        self.say(f"{label:<26} {steps:>5} steps  {shown.text}  {time.perf_counter() - start:6.1f} s")


def console() -> Any:
    """The console everything is printed on: standard error, so that `--json` leaves standard output clean."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def describe(metrics: Mapping[str, float]) -> str:
    """Metrics in one fixed-width line."""
    parts = []
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.3f}")
    for key, label in (("clean", "clean"), ("robust", "robust")):
        if key in metrics:
            parts.append(f"{label} {100 * metrics[key]:5.1f} %")
    if "images_per_s" in metrics:
        parts.append(f"{metrics['images_per_s']:,.0f} images/s")
    return "  ".join(parts)
