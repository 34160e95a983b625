"""The table of `any_model.py`, from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.common import provenance, table
from robustcompress.budget import human

HEAD = (
    *(
        "model",
        "image",
        "parameters",
        "groups",
        "trace s",
        "edit ms",
        "of a forward pass",
        "MACs",
        "growth",
        "export s",
    ),
    *("parity", "what is kept or refused, and why"),
)
SHORT = (
    ("holds the model's output", ""),
    ("a norm takes its mean and variance", "under a layer norm"),
    ("pass through an operation in which", "cannot be followed"),
    ("forward() assumes its width", "forward() assumes the width"),
    ("changes the output's shape", "the output's shape depends on it"),
    ("forward() mixes its channels", "forward() mixes channels"),
    ("together with other groups", "not provable together"),
    ("nothing reads it", "read by no layer"),
    ("no layer writes it", "written by no layer"),
)
"""What a reason holds, and a few words for it."""


def markdown(value: Mapping[str, Any]) -> str:
    """The counts, the table, and where they come from."""
    rows = sorted(value["results"], key=lambda row: (_library(row), row["model"]))
    return "\n\n".join([_counts(rows), table(HEAD, map(_cells, rows), words=1), provenance(value)])


def _counts(rows: list[Mapping[str, Any]]) -> str:
    run = [row for row in rows if "not_run" not in row]
    traced = [row for row in run if "editable" in row]
    said = [
        f"{len(run)} networks run, {len(rows) - len(run)} not",
        f"{len(traced)} traced, {sum('refused' in row for row in run)} refused",
        f"{sum(row.get('half', False) for row in run)} cut to half the multiply-adds or less",
        f"{sum(bool(row['failures']) for row in run)} with a failed step",
    ]
    return "; ".join(said) + "."


def _library(row: Mapping[str, Any]) -> int:
    return ("robustcompress", "torchvision", "timm").index(row["model"].partition(":")[0])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    seconds, image = row.get("seconds", {}), row.get("image")
    size = "" if not image else str(image[0]) if image[0] == image[1] else f"{image[0]}x{image[1]}"
    traced = "editable" in row
    share = row["edit_ms"] / row["forward_ms"] if "edit_ms" in row and "forward_ms" in row else None
    return (
        row["model"].removeprefix("robustcompress:"),
        size,
        human(row["params"]) if "params" in row else "",
        f"{row['editable']}/{row['groups']}" if traced else "",
        f"{seconds['trace']:.1f}" if traced else "",
        f"{row['edit_ms']:.1f}" if "edit_ms" in row else "",
        f"{share:.2f}" if share is not None else "",
        f"{row['macs']:.2f}" if "macs" in row else "",
        _small(row.get("growth_break")),
        f"{seconds['export']:.0f}" if "parity" in row else "",
        _small(row.get("parity")),
        "; ".join(words_of(row)),
    )


def _small(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else "0" if value == 0 else f"{value:.0e}"


def words_of(row: Mapping[str, Any]) -> Iterator[str]:
    """What a reader should know of a network: failures first."""
    if "not_run" in row:
        yield f"not run: {row['not_run']}"
    for failure in row.get("failures", []):
        yield f"**failed** {_cell(failure, 120)}"
    if "refused" in row:
        yield f"refused: {_cell(row['refused'], 160)}"
    if row.get("half") is False:
        yield "half out of reach"
    reasons: dict[str, int] = {}
    for reason, count in row.get("reasons", {}).items():
        words = next((short for part, short in SHORT if part in reason), _cell(reason, 60))
        reasons[words] = reasons.get(words, 0) + count
    yield from (f"{count} {words}" for words, count in reasons.items() if words)
    if "norm_break" in row:
        yield f"growth under norms {_small(row['norm_break'])}"
    if missing := row.get("no_gradient"):
        yield f"{len(missing)} parameters without a gradient"


def _cell(text: str, longest: int) -> str:
    words = " ".join(text.split()).replace("|", "/")
    return words if len(words) <= longest else words[: longest - 3] + "..."
