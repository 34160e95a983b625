"""How a network came about: the course of training, and what was searched for, as the history has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from robustcompress.budget import human
from robustcompress.plots import timed
from robustcompress.publish import chart
from robustcompress.publish.markup import Html, figure, fold, join, plain, section, table, tag
from robustcompress.publish.reading import number, points, short
from robustcompress.result import DAMAGE, CompressResult
from robustcompress.search_plot import candidate_records, search_records

BEST = 8
"""Candidates that are listed."""

LISTED = 60
"""Records of one kind that are listed."""

SEARCHES = {
    "hamming": ("mask bits that changed (%)", 100.0),
    "top_eigenvalue": ("largest eigenvalue of the robust loss in the gates", 1.0),
    "sharpness": ("rise of the robust loss in the ball of S2AP", 1.0),
    "mask_robust": ("PGD-10 accuracy of the mask, validation (%)", 100.0),
}
"""What is drawn of a search for a mask, and by what it is multiplied."""


def training(result: CompressResult) -> Html | None:
    """Accuracies and loss over epochs; None where the history has none."""
    placed = _placed(result)
    if not placed:
        return None
    kinds = (
        ("robust", "training batches, under the training attack", "line", 0),
        ("val_robust", "validation, PGD-10", "dots", 1),
        ("val_clean", "validation, clean", "dots", 2),
    )
    series = [
        chart.Series(name=name, points=_over(placed, key, 100.0), look=look, colour=colour)  # type: ignore[arg-type]
        for key, name, look, colour in kinds
    ]
    parts: list[Html] = []
    phases = _phases(placed)
    if any(one.points for one in series):
        last = {one.name: one.points[-1][1] for one in series if one.points}
        said = ", ".join(f"{name} {value:.1f} %" for name, value in last.items())
        drawn = chart.lines(
            series,
            alt=f"Accuracy over the epochs of training; at the end: {said}",
            x="epochs",
            y="accuracy (%)",
            y_range=(0.0, 102.0),
            marks=phases if len(phases) <= 8 else (),
            x_from=0.0,
        )
        parts.append(
            figure(drawn, "Accuracy while it was trained. Validation images choose the epoch, test images do not.")
        )
    loss = chart.Series(name="training loss", points=_over(placed, "loss", 1.0), colour=3)
    if loss.points:
        alt = f"Training loss over epochs, from {loss.points[0][1]:.3g} to {loss.points[-1][1]:.3g}"
        parts.append(
            figure(
                chart.lines([loss], alt=alt, x="epochs", y="loss", x_from=0.0, height=220), "The objective's own loss."
            )
        )
    return section("training", "Training", *parts) if parts else None


def _placed(result: CompressResult) -> list[tuple[float, Mapping[str, Any]]]:
    """Records and the epochs that had passed; counted one by one where the records do not say."""
    try:
        return list(timed(result))
    except DAMAGE:
        return [(float(place), record) for place, record in enumerate(result.history, 1)]


def _over(placed: list[tuple[float, Mapping[str, Any]]], key: str, scale: float) -> list[tuple[float, float]]:
    found = [(epoch, number(record.get(key))) for epoch, record in placed if "event" not in record]
    return [(epoch, scale * value) for epoch, value in found if value is not None and number(epoch) is not None]


def _phases(placed: list[tuple[float, Mapping[str, Any]]]) -> list[tuple[float, str]]:
    """Where each phase ends, but for the last."""
    ends = {plain(record.get("phase"), 24): epoch for epoch, record in placed if "steps" in record}
    return [(epoch, f"end of {name}") for name, epoch in list(ends.items())[:-1]]


def searches(result: CompressResult) -> Html | None:
    """What the strategy looked at and decided; None where the history holds nothing of the kind."""
    parts = [*_candidates(candidate_records(result)), *_masks(search_records(result)), *_events(result)]
    return section("search", "What was searched and decided", *parts) if parts else None


def _candidates(records: list[Mapping[str, Any]]) -> list[Html]:
    """Every network that a search over architectures looked at, and the best of them."""
    judged = [r for r in records if number(r.get("val_robust")) is not None and number(r.get("reward")) is not None]
    if not judged:
        return []
    seen = points(judged, "val_robust", scale=100.0)
    best = points(list(accumulate(judged, _better)), "val_robust", scale=100.0)
    drawn = chart.lines(
        [
            chart.Series(name="each candidate", points=seen, look="dots", colour=0),
            chart.Series(name="best by reward so far", points=best, look="steps", colour=1),
        ],
        alt=f"{len(judged)} candidates; the best by reward has {best[-1][1]:.1f} % under PGD after a brief recovery",
        x="networks looked at",
        y="accuracy (%)",
    )
    rows = []
    for place, record in sorted(enumerate(judged, 1), key=lambda placed: -float(placed[1]["reward"]))[:BEST]:
        cells = (short(record.get(key)) for key in ("config", "bypassed"))
        clean, robust = (number(record.get(key)) for key in ("val_clean", "val_robust"))
        shares = ("-" if share is None else f"{100 * share:.1f}" for share in (clean, robust))
        macs = number(record.get("macs"))
        rows.append((str(place), *shares, f"{record['reward']:.3f}", "-" if macs is None else human(macs), *cells))
    columns = ("number", "clean %", "PGD %", "reward", "MACs", "configuration", "blocks that left")
    return [
        tag("h3", "Candidates"),
        figure(
            drawn, "Candidates after a brief recovery, on validation images: what the search went by, not a result."
        ),
        table(columns, rows, caption=f"The best {len(rows)} of {len(judged)} by reward", text=(5, 6)),
    ]


def _better(a: Mapping[str, Any], b: Mapping[str, Any]) -> Mapping[str, Any]:
    return b if b["reward"] > a["reward"] else a


def _masks(records: list[Mapping[str, Any]]) -> list[Html]:
    """The course of a search for a mask: one small chart for each thing that was recorded."""
    drawn: list[Html] = []
    for key, (label, scale) in SEARCHES.items():
        course = points(records, key, scale=scale)
        if course:
            alt = f"{label} over {len(course)} epochs of the search, at last {course[-1][1]:.4g}"
            line = chart.Series(name=label, points=course, colour=0)
            drawn.append(figure(chart.lines([line], alt=alt, x="epoch of the search", y="", height=190), f"{label}."))
    return [tag("h3", "The search for a mask"), *drawn] if drawn else []


def _events(result: CompressResult) -> list[Html]:
    """Everything else that was recorded, in brief: edits, cuts, decisions."""
    events = [record for record in result.history if "event" in record and record["event"] != "candidate"]
    if not events:
        return []
    counts = Counter(plain(record["event"], 40) for record in events)
    rows = [
        (
            plain(record["event"], 40),
            plain(record.get("phase", ""), 40),
            "; ".join(f"{plain(k, 40)}: {short(v)}" for k, v in record.items() if k not in ("event", "phase")),
        )
        for record in events[:LISTED]
    ]
    more = f" (the first {LISTED} of {len(events)})" if len(events) > LISTED else ""
    listed = ", ".join(f"{name} {count}" for name, count in counts.most_common(12))
    shown = table(("event", "phase", "what was recorded"), rows, text=(0, 1, 2))
    return [tag("h3", "Decisions"), join([tag("p", f"Recorded events: {listed}.")]), fold(f"Events{more}", shown)]
