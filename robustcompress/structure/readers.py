"""Layers that read channels in ways of their own: what a forward that is not torch's must still obey.

That removing a channel equals silencing the weights that read it is proven for every layer (see `verify`). Of torch's
own layers two things more are known: they make nothing of a channel that is zero, so that a closed gate is a removed
channel; and weights of opposite sign, or weights shared out among copies, add up to what they were, so that growth
changes no output. Of others both are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from robustcompress.errors import first_line
from robustcompress.structure.copies import copied
from robustcompress.structure.gates import Gates
from robustcompress.structure.groups import NEW, Edit
from robustcompress.structure.initial import fill
from robustcompress.structure.layout import Layout
from robustcompress.structure.surgery import apply_gathers, plan_edit
from robustcompress.structure.watch import Watch


def foreign_readers(model: nn.Module, layout: Layout, names: Iterable[str]) -> dict[str, list[str]]:
    """By group, those of its readers whose class is not torch's own, as words; groups without any are left out."""
    found: dict[str, list[str]] = {}
    for name in names:
        for axis in layout.groups[name].readers:
            kind = type(model.get_submodule(axis.module))
            if not kind.__module__.startswith("torch.nn."):
                found.setdefault(name, []).append(f"{axis.module} ({kind.__name__})")
    return found


@torch.no_grad()
def misread(
    net: nn.Module,
    layout: Layout,
    kept: Mapping[str, Sequence[int]],
    image: torch.Tensor,
    silence: Callable[[], None],
    tolerance: float,
) -> str:
    """What a reader does that torch's own would not; empty when nothing.

    Args:
        net: The network with random weights; left as `silence` leaves it.
        layout: Its structure.
        kept: By group, the channels that gates leave open.
        image: What to look at, `[N, 3, H, W]`.
        silence: Zeroes in `net` the weights that read channels which are not kept.
        tolerance: Relative difference allowed in what a layer writes.
    """
    grown, watch = copied(net, torch.clone), Watch(net, layout)
    watch.note(lambda: _under_gates(net, layout, kept, image))
    silence()
    watch.compare(lambda: net(image))
    if not watch.worst[0] <= tolerance:
        return "forward() makes something of a channel that is zero"
    watch = Watch(grown, layout)
    watch.note(lambda: grown(image))
    _add_newcomers(grown, layout, [name for name in kept if layout.groups[name].exact], watch)
    try:
        watch.compare(lambda: grown(image))
    except Exception as error:  # of a forward that cannot do with a width, in words of its own
        return assumes(error)
    if not watch.worst[0] <= tolerance:
        return (
            "forward() changes when weights of new channels cancel each other, or copies share one; if it was taught, "
            "have what it reads with begin at 0 (LayerKind.fill)"
        )
    return ""


def assumes(error: Exception) -> str:
    """Words for a forward that raised at another width."""
    return f"forward() assumes its width ({first_line(error, 120)})"


def _under_gates(net: nn.Module, layout: Layout, kept: Mapping[str, Sequence[int]], image: torch.Tensor) -> object:
    widths, scores = layout.widths(), {}
    for name, keep in kept.items():
        bits = image.new_zeros(widths[name])
        bits[list(keep)] = 1
        scores[name] = nn.Parameter(bits)
    with Gates(net, layout, widths, scores):
        return net(image)


def _add_newcomers(net: nn.Module, layout: Layout, names: Iterable[str], watch: Watch) -> None:
    """Each group gains a copy that shares its readers' weights, a pair that cancels, and a channel that is not read."""
    widths, generator = layout.widths(), torch.Generator().manual_seed(3)
    for name in names:
        edit = Edit(name, (*range(widths[name]), 0, NEW, NEW, NEW), "pair", share=True)
        watch.edited(name, edit.sources, widths)
        tensors = plan_edit(net, layout, widths, edit)
        apply_gathers(net, layout, widths, edit, tensors)
        widths[name] = len(edit.sources)
        fill(net, layout, widths, edit, tensors, generator)
