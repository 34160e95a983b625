"""What is asked of an editor, checked before anything is done."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from robustcompress.errors import InputError, Problems, nearest
from robustcompress.structure.groups import NEW, AnyEdit, ChannelGroup, Edit, Insert
from robustcompress.structure.initial import INITS
from robustcompress.structure.layout import Layout
from robustcompress.structure.surgery import numbers_after, plan_edit


def check_resize(
    groups: Mapping[str, ChannelGroup], round_to: int, name: str, sources: tuple[int, ...], init: str | None
) -> None:
    """Raise one error about all that is wrong with replacing a group by a gather of itself.

    Args:
        groups: Those of the network, with their present widths.
        round_to: Widths must be multiples of this.
        name: The group.
        sources: Its new channels.
        init: How fresh ones begin; None where nothing is said.

    Raises:
        InputError: Something is.
    """
    problems = Problems("the edit was refused")
    if name not in groups:
        problems.add(f"there is no channel group {name!r}{nearest(name, groups)}")
    elif groups[name].reason:
        problems.add(f"group {name!r} cannot be edited: {groups[name].reason}")
    else:
        width = groups[name].width
        wrong = sorted({s for s in sources if s != NEW and not 0 <= s < width})
        if wrong:
            problems.add(f"group {name!r} has channels 0 to {width - 1}; there is no channel {wrong[0]}")
        if len(sources) < groups[name].min_width:
            problems.add(
                f"group {name!r} would have {len(sources)} channels left; keep at least {groups[name].min_width}"
            )
        if len(sources) % round_to:
            problems.add(f"group {name!r} would have {len(sources)} channels, no multiple of round_to={round_to}")
        if init == "clone" and all(s == NEW for s in sources):
            problems.add(f"group {name!r}: init='clone' needs at least one existing channel to copy")
    if init is not None and init not in INITS:
        problems.add(f"init={init!r} does not exist{nearest(init, INITS)}")
    problems.raise_if_any()


def check_size(model: nn.Module, layout: Layout, widths: Mapping[str, int], edit: AnyEdit, most: int | None) -> None:
    """Refuse an edit after which a network would hold more than `most` numbers, before anything is allocated.

    Args:
        model: The network.
        layout: Its structure.
        widths: The widths of all groups before the edit.
        edit: What is to be carried out.
        most: The limit; None for none.

    Raises:
        InputError: It would.
    """
    if most is None:
        return
    if isinstance(edit, Insert) and edit.width > max(widths.values(), default=0):
        raise InputError(f"a part of {edit.width} hidden channels in {edit.module!r} is wider than the whole network")
    if isinstance(edit, Edit) and len(edit.sources) > widths.get(edit.group, len(edit.sources)):
        numbers = numbers_after(model, plan_edit(model, layout, widths, edit))
        if numbers > most:
            raise InputError(
                f"with {len(edit.sources)} channels in {edit.group!r} the network would hold {numbers} numbers; at "
                f"most {most} are believed"
            )


def channels(numbers: Iterable[int]) -> tuple[int, ...]:
    """Channel numbers as plain integers; a mask or fractions would silently mean other channels."""
    listed = numbers.tolist() if isinstance(numbers, torch.Tensor) else list(numbers)
    for number in listed:
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise InputError(f"{number!r} is no channel number; for a boolean mask pass mask.nonzero().flatten()")
    return tuple(operator.index(number) for number in listed)
