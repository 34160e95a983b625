"""What a command answers, and how it is shown on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from robustcompress.robust import EvaluationProgress
from robustcompress.train.progress import console

WIDE = 160
"""Columns where the output is no terminal: a table in a file is not cut to 80."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The answer of a command.

    Attributes:
        document: What `--json` prints: plain JSON.
        parts: What is printed otherwise, one below the other: text, or anything that rich can render.
    """

    document: Mapping[str, Any]
    parts: tuple[Any, ...]

    def show(self) -> None:
        """Print the parts on standard output."""
        from rich.console import Console

        shown = Console(file=sys.stdout)
        if not shown.is_terminal:
            shown = Console(file=sys.stdout, width=WIDE)
        for part in self.parts:
            if isinstance(part, str):
                shown.print(part, markup=False, highlight=False, soft_wrap=True)
            else:
                shown.print(part)


NOTHING = Output(document={}, parts=())
"""What the other processes of a command answer, where the first one speaks for all."""


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = ()) -> Any:
    """Lay out a table for the terminal.

    Args:
        title: Stands above it.
        columns: Headings.
        rows: Cells, one text for each column.
        left: Columns of text, which are aligned to the left and may wrap; the others hold numbers.

    Returns:
        A rich table.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    laid_out = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        text = column in left
        laid_out.add_column(column, justify="left" if text else "right", no_wrap=not text, vertical="top")
    for row in rows:
        laid_out.add_row(*(Text(cell) for cell in row))
    return laid_out


def say(line: str) -> None:
    """Tell the person who waits: one line on standard error."""
    console().print(line, markup=False, highlight=False)


@contextmanager
def evaluation_bar(title: str) -> Iterator[Any]:
    """Show how far an evaluation is, on standard error; gives what `evaluate(progress=...)` takes."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    where = console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=where, disable=not where.is_terminal, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(step: EvaluationProgress) -> None:
            accuracy = f"{100 * step.accuracy:5.1f} % right"
            if step.attack not in tasks:
                tasks[step.attack] = bar.add_task(f"{title}: {step.attack}", total=step.total, accuracy=accuracy)
            bar.update(tasks[step.attack], completed=step.done, accuracy=accuracy)
            if not where.is_terminal and step.done == step.total:
                say(f"{title}: {step.attack:<12} {step.done:>5} images  {accuracy}  {step.seconds:6.1f} s")

        yield advance
