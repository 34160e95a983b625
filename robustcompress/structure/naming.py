"""Names that last: groups of a network that was rebuilt in places are called what they were called before."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from robustcompress.errors import InputError, Problems
from robustcompress.structure.groups import Axis, ChannelGroup
from robustcompress.structure.survey import Survey


def keep_names(
    found: Survey,
    before: Mapping[str, ChannelGroup],
    *,
    moved: Callable[[Axis], Axis],
    fresh: Callable[[Axis], bool],
    title: str,
) -> Survey:
    """The structure of a rebuilt network, in which groups that were there before keep their names.

    Args:
        found: The structure, as it was traced anew.
        before: The groups before.
        moved: Where an axis of before lies now.
        fresh: Whether an axis of now was not there before.
        title: What the error says first.

    Raises:
        InputError: A group is not there any more, has gained or lost layers, or could no longer be edited.
    """
    known: dict[frozenset[Axis], list[str]] = {}
    for name, group in before.items():
        known.setdefault(frozenset(map(moved, group.members)), []).append(name)
    names: dict[str, str] = {}
    for name, group in found.layout.groups.items():
        own = frozenset(axis for axis in group.members if not fresh(axis))
        if own:
            same = known.get(own)
            names[name] = same.pop(0) if same else ""
    lost = [name for same in known.values() for name in same]
    if lost or "" in names.values():
        raise InputError(f"{title}: with it {', '.join(lost) or 'a group'} would change with other layers than now")
    renamed = {names.get(name, name): reason for name, reason in found.broken.items()}
    kept = Survey(found.layout.renamed(names), renamed)
    after, problems = kept.groups(kept.layout.widths()), Problems(title)
    for name, group in before.items():
        if group.editable and not after[name].editable:
            problems.add(f"with it group {name!r} could no longer be edited: {after[name].reason}")
    problems.raise_if_any()
    return kept
