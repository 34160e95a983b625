"""The stages of a network: what lies at one resolution, and which of its blocks can leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from robustcompress.robust.attacks import eval_mode
from robustcompress.session import Session
from robustcompress.shapes import Network
from robustcompress.structure.groups import inside


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups and blocks that a search changes together.

    Attributes:
        name: Such as "16x16", or a group's name where it is a stage by itself.
        groups: Editable groups whose widths one multiplier scales.
        blocks: Blocks that can leave, the first to leave first.
        stride: The resolution before it over its own.
        depth: How many blocks it has, or layers where it has no blocks, those that cannot leave among them.
        sites: Blocks whose type can be chosen, in the model's order.
    """

    name: str
    groups: tuple[str, ...]
    blocks: tuple[str, ...]
    stride: float
    depth: int
    sites: tuple[str, ...] = ()


def discover(session: Network, order: Sequence[str], sites: Sequence[str] = ()) -> tuple[Stage, ...]:
    """Divide a network into stages: by resolution where there are several, else each group by itself.

    Groups without a resolution of their own (squeeze and excitation, hidden linear layers) belong with the group before
    them. Blocks without one, such as those of a transformer, make up one more stage; the groups without a resolution
    are stages by themselves then.

    Args:
        session: The network under compression.
        order: The blocks that may leave, the first to leave first.
        sites: The blocks whose type may be chosen; those without a resolution of a stage belong with the first stage.
    """
    editable = [group.name for group in session.editor.editable]
    by_place = find_stages(session)
    places = _places(session, (*order, *sites)) if len(by_place) > 1 else {}
    placeless = tuple(name for name in order if places.get(name) not in by_place)
    stage_of = {group: place for place, groups in by_place.items() for group in groups} if len(by_place) > 1 else {}
    if stage_of and not placeless:
        now = next(iter(by_place))
        for name in editable:
            now = stage_of.setdefault(name, now)
    stages, height = [], float(session.goal.data.image_shape[1])
    for place in by_place if stage_of else ():
        groups = tuple(name for name in editable if stage_of.get(name) == place)
        blocks = tuple(name for name in order if places.get(name) == place)
        rows = float(place.split("x")[0])
        typed = tuple(name for name in sites if places.get(name) == place)
        stages.append(Stage(place, groups, blocks, height / rows, _depth(session, groups, blocks), typed))
        height = rows
    if placeless:
        stages.append(Stage("depth", (), placeless, 1.0, len(placeless)))
    stages += [Stage(name, (name,), (), 1.0, 1) for name in editable if name not in stage_of]
    if rest := tuple(name for name in sites if not any(name in stage.sites for stage in stages)):
        stages[0] = replace(stages[0], sites=(*stages[0].sites, *rest))
    return tuple(stages)


def _depth(session: Network, groups: Sequence[str], blocks: Sequence[str]) -> int:
    """Blocks that can leave, and one for those that cannot (a stage begins with one); else layers."""
    if blocks:
        return len(blocks) + 1
    return sum(len(session.editor.groups[name].writers) for name in groups)


@torch.no_grad()
def block_influence(model: nn.Module, blocks: Sequence[str], images: Tensor) -> dict[str, float]:
    """How much each block changes what it is given: mean of `|block(x) - x| / |x|` over images (Euclidean norms).

    A block of little influence is missed least (Men et al. 2024 rank the layers of language models so).

    Args:
        model: The network.
        blocks: Blocks that keep the shape of their input.
        images: `[N, C, H, W]`, on its device.
    """
    found: dict[str, float] = {}
    given: dict[str, Tensor] = {}

    def before(name: str, args: tuple[Tensor, ...]) -> None:
        given[name] = args[0].clone()  # a block may write to its input

    def after(name: str, output: Tensor) -> None:
        x = given.pop(name).flatten(1)
        found[name] = float(((output.flatten(1) - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)).mean())

    handles = []
    for name in blocks:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(lambda _, args, name=name: before(name, args)))
        handles.append(block.register_forward_hook(lambda _, __, output, name=name: after(name, output)))
    try:
        with eval_mode(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def first_to_leave(session: Session, images: Tensor) -> list[str]:
    """The blocks that can leave, that of the least influence first; a decision, for it looks at weights."""
    blocks = session.editor.bypassable

    def ranked() -> list[str]:
        influence = block_influence(session.model, blocks, images)
        return sorted(blocks, key=lambda name: influence[name])

    return session.decide("order in which blocks leave", ranked) if blocks else []


def alive(session: Network, groups: Iterable[str], without: Sequence[str]) -> list[str]:
    """The groups that reach beyond the blocks that leave."""
    members = {name: session.editor.groups[name].members for name in groups}
    return [name for name, axes in members.items() if not all(inside(axis.module, without) for axis in axes)]


def find_stages(session: Network) -> dict[str, list[str]]:
    """Editable groups by the resolution at which convolutions write them, the largest first.

    Groups that no convolution writes at a place of its own have no stage: hidden linear layers, and 1x1 convolutions on
    one position (squeeze and excitation).

    Returns:
        Group names by resolution, such as "16x16".
    """
    model = session.model
    seen: dict[str, tuple[int, ...]] = {}
    handles = []
    writers = {g.name: [axis.module for axis in g.writers] for g in session.editor.editable}

    def watch(name: str, module: nn.modules.conv._ConvNd) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if math.prod(module.kernel_size) > 1 or math.prod(args[0].shape[2:]) > 1:
                seen[name] = tuple(output.shape[2:])

        handles.append(module.register_forward_hook(hook))

    for name in {writer for names in writers.values() for writer in names}:
        module = model.get_submodule(name)
        if isinstance(module, nn.modules.conv._ConvNd):
            watch(name, module)
    _look(session, handles)
    places = {
        group: max((seen[n] for n in names if n in seen), key=math.prod, default=()) for group, names in writers.items()
    }
    stages: dict[str, list[str]] = {}
    for place in sorted(set(places.values()) - {()}, key=math.prod, reverse=True):
        stages["x".join(map(str, place))] = [group for group, found in places.items() if found == place]
    return stages


def _places(session: Network, modules: Sequence[str]) -> dict[str, str]:
    """At which resolution each module gives its output."""
    found: dict[str, str] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            if output.dim() == 4:
                found[name] = "x".join(map(str, output.shape[2:]))

        return hook

    _look(session, [session.model.get_submodule(name).register_forward_hook(hook_of(name)) for name in modules])
    return found


@torch.no_grad()
def _look(session: Network, handles: Sequence[RemovableHandle]) -> None:
    """Run the network once, on nothing, for hooks to see shapes; then they are gone."""
    parameter = next(session.model.parameters())
    example = torch.zeros(2, *session.goal.data.image_shape, device=parameter.device, dtype=parameter.dtype)
    try:
        with eval_mode(session.model):
            session.model(example)
    finally:
        for handle in handles:
            handle.remove()
