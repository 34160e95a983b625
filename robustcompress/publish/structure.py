"""How wide each channel group is, and how wide it was."""

from __future__ import annotations

from robustcompress.budget import human
from robustcompress.errors import RobustCompressError
from robustcompress.publish import chart
from robustcompress.publish.markup import Html, figure, fold, note, plain, section, table, tag
from robustcompress.result import CompressResult
from robustcompress.structure import Bypass
from robustcompress.widths import GroupWidth, widths_of

DRAWN = 48
"""Groups that the picture has room for; the table has all."""

LISTED = 400


def structure(result: CompressResult) -> Html:
    """The widths as a picture and as a table."""
    title = "Widths, before and after"
    try:
        found = widths_of(result)
    except RobustCompressError as error:
        return section("widths", title, note(f"The network cannot be traced: {plain(error)}"))
    groups = [group for group in found.groups if group.kind != "output"]
    known = any(group.before is not None for group in groups)
    changed = [group for group in groups if group.before not in (None, group.width)]
    said = f"{len(groups)} channel groups; {len(changed)} of them have another width than in the reference."
    if not known:
        said = f"{len(groups)} channel groups. How wide they were is not known: the reference cannot be built by name."
    gone = [edit.module for edit in result.edits if isinstance(edit, Bypass)]
    return section(
        "widths",
        title,
        tag("p", said, " What is in one group can only change together."),
        tag("p", "Blocks that have left: ", tag("code", plain(", ".join(gone), 1000))) if gone else None,
        _picture(groups) if groups else None,
        fold("All groups as a table", _table(groups)),
    )


def _picture(groups: list[GroupWidth]) -> Html:
    chosen = groups
    if len(groups) > DRAWN:
        most = sorted(groups, key=lambda group: -abs((group.before or group.width) - group.width))[:DRAWN]
        chosen = [group for group in groups if group in most]
    rows = [
        (plain(group.name, 60), group.width * group.head_dim, _outline(group), _written(group), 0) for group in chosen
    ]
    alt = "Channels of each group: " + "; ".join(f"{plain(group.name, 60)} {_written(group)}" for group in chosen)
    part = "" if len(chosen) == len(groups) else f" Of {len(groups)} groups, the {DRAWN} that changed most."
    caption = f"Channels of each group, in the network's order; the outline is the reference.{part}"
    return figure(chart.bars(rows, alt=alt, x="channels"), caption)


def _outline(group: GroupWidth) -> float | None:
    return None if group.before is None else group.before * group.head_dim


def _written(group: GroupWidth) -> str:
    before = "" if group.before in (None, group.width) else f"{group.before} → "
    return f"{before}{group.width}" + (f" heads of {group.head_dim}" if group.head_dim > 1 else "")


def _table(groups: list[GroupWidth]) -> Html:
    rows = [
        (
            tag("code", group.name),
            group.kind,
            "-" if group.before is None else str(group.before),
            str(group.width),
            f"{100 * group.share:.1f}",
            human(group.macs),
            "yes" if group.editable else plain(group.reason, 160),
        )
        for group in groups[:LISTED]
    ]
    columns = ("group", "kind", "before", "after", "% of MACs", "MACs", "can be edited")
    return table(columns, rows, text=(0, 1, 6))
