"""One picture of several searches: how their masks settled, how sharp the loss was there, what the masks were worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from robustcompress.errors import InputError
from robustcompress.plots import COLOURS, GREY, new_figure
from robustcompress.result import CompressResult

Searches = Mapping[str, list[Mapping[str, Any]]]
Panel = Callable[[Any], None]


def plot_search(results: Mapping[str, CompressResult], path: str | Path) -> Path:
    """Draw the searches of results side by side; a panel for which nothing was recorded is left out.

    Of a search over architectures (rcnas): what each candidate withstood, and the best so far. Of a search for scores,
    panels over its epochs: distance between the masks of consecutive epochs; largest eigenvalue of the
    robust loss in the gates, and rise of the loss within the ball of S2AP (both with `diagnose=True`); loss before and
    after the ascents of S2AP; accuracy of the mask on validation images (with `diagnose=True`). Beside them, as bars,
    that accuracy after the cut, before fine-tuning.

    Args:
        results: By the names to show; those that searched nothing have no line.
        path: The picture; its suffix says the format (.png, .pdf, .svg).

    Returns:
        The path.

    Raises:
        InputError: No result has anything to show, or the format or the directory does not exist.
    """
    searches = {name: search_records(result) for name, result in results.items()}
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(results)}
    panels = _panels(results, searches, colours)
    if not panels:
        raise InputError(
            f"there is no search to draw in {', '.join(results) or 'no results'}: give results of strategies that "
            "learn scores or look at candidates, such as hydra, s2ap or rcnas"
        )
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    figure, path = new_figure(path, (4.6 * columns, 3.5 * rows + 0.4))
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, draw in zip(places, panels, strict=False):
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
    for axes in places[len(panels) :]:
        axes.remove()
    shown = [name for name, result in results.items() if searches[name] or _shows_more(result)]
    _legend(figure, shown, colours)
    figure.savefig(path, dpi=130)
    return path


def search_records(result: CompressResult) -> list[Mapping[str, Any]]:
    """The records of the epochs in which masks were searched for."""
    return [record for record in result.history if "epoch" in record and "hamming" in record]


def candidate_records(result: CompressResult) -> list[Mapping[str, Any]]:
    """The records of the networks that a search over architectures looked at, in their order."""
    return [record for record in result.history if record.get("event") == "candidate"]


def _panels(results: Mapping[str, CompressResult], searches: Searches, colours: Mapping[str, str]) -> list[Panel]:
    def recorded(*keys: str) -> bool:
        return any(key in record for records in searches.values() for record in records for key in keys)

    panels: list[Panel] = []
    if looked := {name: found for name, result in results.items() if (found := candidate_records(result))}:
        panels.append(lambda axes: _candidates(axes, looked, colours))
    if recorded("hamming"):
        panels.append(lambda axes: _distance(axes, searches, colours))
    if recorded("top_eigenvalue"):
        panels.append(lambda axes: _curvature(axes, searches, colours))
    if recorded("sharpness"):
        panels.append(lambda axes: _sharpness(axes, searches, colours))
    if recorded("loss_before"):
        panels.append(lambda axes: _ascents(axes, searches, colours))
    if recorded("mask_clean", "mask_robust"):
        panels.append(lambda axes: _masks(axes, searches, colours))
    cut = {name: record for name, result in results.items() if (record := _before_finetuning(result)) is not None}
    if cut:
        panels.append(lambda axes: _bars(axes, cut, colours))
    return panels


def _candidates(axes: Any, looked: Mapping[str, list[Mapping[str, Any]]], colours: Mapping[str, str]) -> None:
    """Every candidate as a dot, and a line through what the best by reward had."""
    from matplotlib.ticker import MaxNLocator

    for name, records in looked.items():
        numbers = range(1, len(records) + 1)
        axes.scatter(numbers, [100 * r["val_robust"] for r in records], color=colours[name], s=12, alpha=0.45, lw=0)
        best = list(accumulate(records, _better))
        axes.step(numbers, [100 * r["val_robust"] for r in best], where="post", color=colours[name], linewidth=1.8)
    axes.set(xlabel="networks looked at", ylabel="PGD-10 accuracy after recovery (%)", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Candidates, and the best so far (validation)", fontsize=11)


def _better(a: Mapping[str, Any], b: Mapping[str, Any]) -> Mapping[str, Any]:
    return b if b["reward"] > a["reward"] else a


def _distance(axes: Any, searches: Searches, colours: Mapping[str, str]) -> None:
    for name, records in searches.items():
        _line(axes, records, "hamming", colours[name], scale=100)
    _finish(axes, searches, "Mask bits that changed in an epoch", "Hamming distance (% of bits)")
    axes.set_ylim(0, None)


def _curvature(axes: Any, searches: Searches, colours: Mapping[str, str]) -> None:
    key = "top_eigenvalue"
    values = [record[key] for records in searches.values() for record in records if key in record]
    for name, records in searches.items():
        _line(axes, records, key, colours[name])
    if min(values) > 0:
        axes.set_yscale("log")
        if max(values) < 10 * min(values):
            _plain_ticks(axes)
    else:
        axes.set_yscale("symlog", linthresh=max(1e-12, max(abs(value) for value in values) / 100))
    _finish(axes, searches, "Curvature of the robust loss in the gates", "largest eigenvalue")


def _plain_ticks(axes: Any) -> None:
    """Within one decade a logarithmic axis would bear one label or none."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _sharpness(axes: Any, searches: Searches, colours: Mapping[str, str]) -> None:
    axes.axhline(0, color=GREY, linewidth=0.8)
    for name, records in searches.items():
        _line(axes, records, "sharpness", colours[name])
    _finish(axes, searches, "Sharpness: rise of the loss in the ball of S2AP", "L(s + z) - L(s)")


def _ascents(axes: Any, searches: Searches, colours: Mapping[str, str]) -> None:
    for name, records in searches.items():
        _line(axes, records, "loss_before", colours[name], marker="o", style="--")
        _line(axes, records, "loss_after", colours[name], marker="^")
    _finish(axes, searches, "Training loss under the ascents", "robust loss")
    _key(axes, {"at s + z": {"marker": "^"}, "at s": {"marker": "o", "linestyle": "--"}})


def _masks(axes: Any, searches: Searches, colours: Mapping[str, str]) -> None:
    for name, records in searches.items():
        _line(axes, records, "mask_clean", colours[name], scale=100, style="--")
        _line(axes, records, "mask_robust", colours[name], scale=100)
    _finish(axes, searches, "The mask as it is searched (validation)", "accuracy (%)")
    axes.set_ylim(0, 102)
    _key(axes, {"clean": {"linestyle": "--"}, "PGD-10": {}})


def _bars(axes: Any, cut: Mapping[str, Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Clean beside robust accuracy; the robust one is filled, and both are written on their bars."""
    for place, (name, record) in enumerate(cut.items()):
        looks = {"edgecolor": colours[name], "linewidth": 1.5, "width": 0.38}
        clean, robust = 100 * record["val_clean"], 100 * record["val_robust"]
        bars = (
            axes.bar(place - 0.2, clean, facecolor="none", **looks),
            axes.bar(place + 0.2, robust, facecolor=colours[name], **looks),
        )
        for bar in bars:
            axes.bar_label(bar, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(cut)), list(cut), fontsize=9)
    if len(cut) > 4:
        axes.tick_params(axis="x", labelrotation=30)
    axes.set(ylim=(0, 108), xlim=(-0.6, len(cut) - 0.4), ylabel="accuracy (%)")
    axes.set_title("The mask before fine-tuning (validation)", fontsize=11)
    from matplotlib.patches import Patch

    handles = [Patch(facecolor="none", edgecolor=GREY, label="clean"), Patch(facecolor=GREY, label="PGD-10")]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper right")


def _line(
    axes: Any,
    records: list[Mapping[str, Any]],
    key: str,
    colour: str,
    *,
    scale: float = 1.0,
    marker: str = "o",
    style: str = "-",
) -> None:
    points = [(record["epoch"], scale * record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, linewidth=1.6)


def _finish(axes: Any, searches: Searches, title: str, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max(record["epoch"] for records in searches.values() for record in records)
    axes.set(xlim=(0.7, last + 0.3), xlabel="epoch of the search", ylabel=label)
    if last < 3:  # the locator gives up on so short an axis
        axes.set_xticks(range(1, last + 1))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=11)


def _key(axes: Any, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Say, without colour, what the kinds of lines of one panel are."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=GREY, markersize=4, label=label, **look) for label, look in looks.items()]
    axes.legend(handles=handles, frameon=False, fontsize=8)


def _legend(figure: Any, names: list[str], colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colours[name], linewidth=4, label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)


def _shows_more(result: CompressResult) -> bool:
    return bool(candidate_records(result)) or _before_finetuning(result) is not None


def _before_finetuning(result: CompressResult) -> Mapping[str, Any] | None:
    found = [record for record in result.history if record.get("event") == "mask" and "val_robust" in record]
    return found[-1] if found else None
