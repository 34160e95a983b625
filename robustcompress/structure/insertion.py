"""How a part is inserted: the proof that nothing changes, the structure that comes out, and the doing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from robustcompress.errors import InputError, Problems, nearest
from robustcompress.structure.copies import copied
from robustcompress.structure.groups import Axis, ChannelGroup, Insert, inside
from robustcompress.structure.layout import Layout
from robustcompress.structure.naming import keep_names
from robustcompress.structure.parts import LAYER, NAMES, PARTS, Extended, Part, hidden_width, make_part, put_behind
from robustcompress.structure.sites import Site, Sites
from robustcompress.structure.surgery import Twin, adopt_parameters, inner
from robustcompress.structure.survey import Survey, survey
from robustcompress.structure.trace import trace

Wanted = tuple[str, str, int | None]
"""A block, the kind of a part for it, and its hidden channels; None for as many as such a part begins with."""

_REFUSED = "the insertion was refused"
_PROBE = "probe"


@dataclass(frozen=True, slots=True)
class Insertion:
    """A part that is to be inserted.

    Attributes:
        edit: The edit.
        site: Where the part will stand.
        part: It, on the CPU, in single precision.
    """

    edit: Insert
    site: Site
    part: Part


def places_for_parts(model: nn.Module, example: torch.Tensor, auxiliary: Sequence[str]) -> tuple[str, ...]:
    """The blocks in which parts can be inserted, in the model's order: of blocks inside blocks, the innermost.

    Args:
        model: Not touched.
        example: One input batch `[N, 3, H, W]`.
        auxiliary: Layers that only training calls.
    """
    sites = Sites(model, example.shape[1:], auxiliary)
    blocks = sites.innermost
    # What came second in a shape is not always channels: all are tried at once, and the trace tells.
    twin, probes = copied(model, lambda tensor: tensor.detach().clone()), list[str]()
    for block in blocks:
        site = sites.site(block)
        assert isinstance(site, Site)
        probe = make_part("se", site.channels, 1, torch.Generator()).to(example.device, example.dtype)
        probes.append(put_behind(twin, site.layer, _PROBE, probe))
    layout = trace(twin, example) if probes else None
    return tuple(
        block for block, probe in zip(blocks, probes, strict=True) if layout is not None and _followed(layout, probe)
    )


def _followed(layout: Layout, part: str) -> bool:
    """Whether all channels that a part is given are known."""
    runs = layout.axes.get(Axis(f"{part}.squeeze", "in"), ())
    return bool(runs) and all(run.group is not None for run in runs)


def plan_parts(sites: Sites, wanted: Sequence[Wanted], generator: torch.Generator) -> list[Insertion]:
    """New parts and their places, with which the network is proven to compute what it computes without.

    Args:
        sites: Of the network.
        wanted: What to insert.
        generator: What the parts' weights are drawn from.

    Raises:
        InputError: A kind or a block that does not exist, a block that has no place for a part, or has or had it
            already: all are named. Or the network does not compute the same.
    """
    problems, plan = Problems(_REFUSED), list[Insertion]()
    found = [sites.site(block) for block, _, _ in wanted]
    taken = {(site.layer, kind) for site in found if isinstance(site, Site) for kind in site.kinds}
    for (block, kind, width), site in zip(wanted, found, strict=True):
        if kind not in PARTS:
            problems.add(f"kind={kind!r} does not exist{nearest(str(kind), PARTS)}")
        if isinstance(site, str):
            problems.add(site)
        elif (site.layer, kind) in taken:
            problems.add(f"{block}: a part of kind {kind!r} ({NAMES[kind]}) was inserted there already")
        elif kind in PARTS:
            taken.add((site.layer, kind))
            edit = Insert(block, kind, hidden_width(kind, site.channels) if width is None else width)
            plan.append(Insertion(edit, site, make_part(kind, site.channels, edit.width, generator)))
    problems.raise_if_any()
    if complaint := sites.complaint([(new.site, new.edit.kind, new.part) for new in plan]):
        raise InputError(f"{_REFUSED}: {', '.join(dict.fromkeys(new.edit.module for new in plan))}: {complaint}")
    return plan


def survey_with(
    model: nn.Module, example: torch.Tensor, plan: Sequence[Insertion], before: Mapping[str, ChannelGroup]
) -> Survey:
    """The structure of a network with parts in it; groups that it had keep their names.

    Args:
        model: Without the parts; not touched.
        example: One input batch `[N, 3, H, W]`.
        plan: The parts.
        before: The groups that it has.

    Raises:
        InputError: The channels that a part is given cannot be followed, or a group could no longer be edited.
    """
    wrapped = {new.site.layer for new in plan if not isinstance(model.get_submodule(new.site.layer), Extended)}
    twin = copied(model, lambda tensor: tensor.detach().clone())
    parts = _put(twin, plan)
    found = survey(twin, example)
    problems = Problems(_REFUSED)
    for new, part in zip(plan, parts, strict=True):
        if not _followed(found.layout, part):
            problems.add(
                f"{new.edit.module}: what its residual branch gives has its channels elsewhere than in dimension 1, or "
                "they cannot be followed"
            )
    problems.raise_if_any()
    return keep_names(
        found,
        before,
        moved=lambda axis: _moved(axis, wrapped),
        fresh=lambda axis: inside(axis.module, parts),
        title=_REFUSED,
    )


def carry_out(model: nn.Module, followers: Iterable[Twin], plan: Sequence[Insertion]) -> None:
    """Insert parts in a network, and in everything that follows it.

    Args:
        model: The network.
        followers: Optimizers take the parts' parameters on; twins get the same parts.
        plan: What to insert.
    """
    names = _put(model, plan)
    for twin in followers:
        if isinstance(twin, torch.optim.Optimizer):
            for new, name in zip(plan, names, strict=True):
                beside = [
                    p for n, p in model.named_parameters() if inside(n, [new.edit.module]) and not inside(n, names)
                ]
                adopt_parameters(twin, list(model.get_submodule(name).parameters()), beside, list(model.parameters()))
        else:
            _put(inner(twin), plan)


def _put(model: nn.Module, plan: Sequence[Insertion]) -> list[str]:
    names = []
    for new in plan:
        layer = model.get_submodule(new.site.layer)
        like = next(layer.parameters(), next(model.parameters()))
        trained = any(parameter.requires_grad for parameter in model.parameters())  # not in a frozen average
        part = copy.deepcopy(new.part).to(like.device, like.dtype).train(layer.training).requires_grad_(trained)
        names.append(put_behind(model, new.site.layer, new.edit.kind, part))
    return names


def _moved(axis: Axis, wrapped: Iterable[str]) -> Axis:
    """Where an axis lies once the layers that are named here have a container."""
    for layer in wrapped:
        if inside(axis.module, [layer]):
            return Axis(f"{layer}.{LAYER}{axis.module.removeprefix(layer)}", axis.side)
    return axis
