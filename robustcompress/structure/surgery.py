"""One record, many twins: carries an edit out on a network, its optimizers, and every copy that must keep its shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from robustcompress.structure.attention import set_heads
from robustcompress.structure.groups import NEW, Axis, Edit, Side
from robustcompress.structure.kinds import fan_dim, gather, kind_of, set_width, slots_of
from robustcompress.structure.layer_kind import First
from robustcompress.structure.layout import Layout

Twin = nn.Module | torch.optim.Optimizer
"""What follows a network's edits: an optimizer, an average of its weights, a copy of it."""


@dataclass(frozen=True, slots=True)
class TensorEdit:
    """The gather of one tensor along one dimension.

    Attributes:
        owner: Qualified name of the module that owns the tensor ("" for a plain parameter of the root).
        tensor: The tensor's name in its owner.
        dim: The dimension that is gathered.
        index: Int64 `[new length]`, old positions or -1.
        scale: `[new length]` factors, or None; only for readers of shared copies.
        axis: The axis this tensor lies on.
        first: How fresh entries begin (see `LayerKind.fill`).
        fan: The dimension along which each entry is a sum of its own: what it is over says how large random values are.
    """

    owner: str
    tensor: str
    dim: int
    index: torch.Tensor
    scale: torch.Tensor | None
    axis: Axis
    first: First
    fan: int = 0

    @property
    def side(self) -> Side:
        """Whether the tensor writes, reads, or passes the channels."""
        return self.axis.side


@dataclass(frozen=True, slots=True)
class Replaced:
    """A parameter that gave way to another, and the gather that leads from one to the other."""

    old: nn.Parameter
    new: nn.Parameter
    edit: TensorEdit


def plan_edit(model: nn.Module, layout: Layout, widths: Mapping[str, int], edit: Edit) -> list[TensorEdit]:
    """List the gathers that carry `edit` out: readers first, so that new writer rows also span new columns."""
    group = layout.groups[edit.group]
    share = _sharing(edit) if edit.share else None
    tensors: list[TensorEdit] = []
    sources = torch.tensor(edit.sources, dtype=torch.long)
    for axis in group.readers + group.passers + group.writers:
        index = layout.index(axis, edit.group, sources, widths)
        if axis.side == "param":
            owner, _, name = axis.module.rpartition(".")
            tensors.append(TensorEdit(owner, name, layout.param_dims[axis.module], index, None, axis, "mean"))
            continue
        scale = None
        if share is not None and axis.side == "in":
            new_widths = {**widths, edit.group: len(edit.sources)}
            owners = layout.owners(axis, edit.group, new_widths)
            scale = torch.where(owners >= 0, share[owners.clamp_min(0)], 1.0)
        module = model.get_submodule(axis.module)
        kind = kind_of(module)
        assert kind is not None
        for name, dim in slots_of(module, axis.side):
            first = kind.first(name, getattr(module, name), dim)
            tensors.append(TensorEdit(axis.module, name, dim, index, scale, axis, first, fan_dim(kind, name)))
    return tensors


def _sharing(edit: Edit) -> torch.Tensor:
    sources = torch.tensor(edit.sources)
    _, which, counts = torch.unique(sources, return_inverse=True, return_counts=True)
    return torch.where(sources == NEW, 1.0, 1.0 / counts[which].double())


def numbers_after(model: nn.Module, plan: Sequence[TensorEdit]) -> int:
    """How many numbers the parameters will hold once a plan is carried out; nothing is allocated."""
    shapes: dict[tuple[str, str], list[int]] = {}
    count = sum(parameter.numel() for parameter in model.parameters())
    for tensor in plan:
        key = tensor.owner, tensor.tensor
        if key not in shapes:
            shapes[key] = list(getattr(model.get_submodule(tensor.owner), tensor.tensor).shape)
            count -= math.prod(shapes[key])
        shapes[key][tensor.dim] = len(tensor.index)
    return count + sum(math.prod(shape) for shape in shapes.values())


@torch.no_grad()
def apply_gathers(
    model: nn.Module,
    layout: Layout,
    widths: Mapping[str, int],
    edit: Edit,
    plan: list[TensorEdit] | None = None,
) -> list[Replaced]:
    """Gather every tensor of the group in place of itself; fresh entries are zero until they are given values.

    Args:
        model: The network, or a twin with the same module names.
        layout: Its structure.
        widths: The widths of all groups before the edit.
        edit: What to do.
        plan: What `plan_edit` says of it, where that is known already.

    Returns:
        The parameters that were replaced, in order; one replaced twice (a layer that reads and writes its own group)
        is listed twice.
    """
    layers = [
        (axis, model.get_submodule(axis.module)) for axis in layout.groups[edit.group].members if axis.side != "param"
    ]
    kinds = {axis: kind_of(module) for axis, module in layers}
    modules = {axis.module: module for axis, module in layers}
    replaced: list[Replaced] = []
    for tensor in plan_edit(model, layout, widths, edit) if plan is None else plan:
        owner = modules.get(tensor.owner)
        owner = model.get_submodule(tensor.owner) if owner is None else owner
        old = getattr(owner, tensor.tensor)
        data = _gathered(old, tensor)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(data, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            if old.grad is not None:
                new.grad = gather(old.grad, tensor.dim, tensor.index)
            setattr(owner, tensor.tensor, new)
            replaced.append(Replaced(old, new, tensor))
        else:
            setattr(owner, tensor.tensor, data)
    new_widths = {**widths, edit.group: len(edit.sources)}
    for axis, module in layers:
        kind = kinds[axis]
        assert kind is not None
        set_width(module, kind, axis.side, layout.axis_width(axis, new_widths))
    for name, attribute in layout.counts.get(edit.group, ()):
        setattr(model.get_submodule(name), attribute, len(edit.sources))
    if edit.group in layout.attention:
        set_heads(model.get_submodule(layout.attention[edit.group]), len(edit.sources))
    return replaced


def _gathered(old: torch.Tensor, tensor: TensorEdit) -> torch.Tensor:
    data = gather(old.detach(), tensor.dim, tensor.index)
    if tensor.scale is not None:
        shape = [1] * data.dim()
        shape[tensor.dim] = -1
        data = data * tensor.scale.to(data).view(shape)
    return data


@torch.no_grad()
def copy_fresh(twin: nn.Module, model: nn.Module, edits: list[TensorEdit]) -> None:
    """Give the fresh entries of `twin` the values they have in `model`, so that both began alike."""
    for tensor in edits:
        fresh = (tensor.index < 0).nonzero().flatten()
        if len(fresh) == 0:
            continue
        target = getattr(twin.get_submodule(tensor.owner), tensor.tensor)
        source = getattr(model.get_submodule(tensor.owner), tensor.tensor)
        fresh = fresh.to(target.device)
        target.index_copy_(tensor.dim, fresh, source.to(target).index_select(tensor.dim, fresh))


@torch.no_grad()
def migrate_optimizer(optimizer: torch.optim.Optimizer, replaced: list[Replaced]) -> None:
    """Put the new parameters in the place of the old; old moments are kept bit for bit, new channels start at zero.

    Args:
        optimizer: Any optimizer whose state tensors have the shape of their parameter (SGD, Adam, AdamW...).
        replaced: What `apply_gathers` returned.
    """
    for step in replaced:
        for param_group in optimizer.param_groups:
            param_group["params"] = [step.new if p is step.old else p for p in param_group["params"]]
        if step.old not in optimizer.state:
            continue
        index = _first_occurrences(step.edit.index)
        optimizer.state[step.new] = {
            key: gather(value, step.edit.dim, index)
            if isinstance(value, torch.Tensor) and value.shape == step.old.shape
            else value
            for key, value in optimizer.state.pop(step.old).items()
        }


def resize_followers(
    followers: Iterable[Twin],
    model: nn.Module,
    layout: Layout,
    widths: Mapping[str, int],
    edit: Edit,
    plan: list[TensorEdit],
    replaced: list[Replaced],
) -> None:
    """Carry out on optimizers and twins what was carried out on a network.

    Args:
        followers: Who follows it.
        model: The network, edited.
        layout: Its structure.
        widths: The widths of all groups before the edit.
        edit: What was done.
        plan: What `plan_edit` said of it.
        replaced: What `apply_gathers` returned.
    """
    for twin in followers:
        if isinstance(twin, torch.optim.Optimizer):
            migrate_optimizer(twin, replaced)
        else:
            apply_gathers(inner(twin), layout, widths, edit, plan)
            copy_fresh(inner(twin), model, plan)


def inner(twin: nn.Module) -> nn.Module:
    """The network within an average; a plain twin itself."""
    found: nn.Module = twin.module if isinstance(twin, AveragedModel) else twin
    return found


def _first_occurrences(index: torch.Tensor) -> torch.Tensor:
    """Keep each source once: a copy of a channel starts without the moments of its original."""
    seen: set[int] = set()
    kept: list[int] = []
    for source in index.tolist():
        kept.append(-1 if source in seen else source)
        seen.add(source)
    return torch.tensor(kept, dtype=torch.long)


def remove_module(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Put the identity in the place of a module, wherever the model holds it.

    Args:
        model: The network, or a twin with the same module names.
        name: The module's name.

    Returns:
        The parameters that are no longer in the model.
    """
    old = model.get_submodule(name)
    identity = nn.Identity().train(old.training)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                parent._modules[child] = identity
    left = {id(parameter) for parameter in model.parameters()}
    return [parameter for parameter in old.parameters() if id(parameter) not in left]


def remove_everywhere(model: nn.Module, followers: Iterable[Twin], name: str) -> None:
    """As `remove_module`, in a network and in everything that follows it."""
    gone = remove_module(model, name)
    for twin in followers:
        if isinstance(twin, torch.optim.Optimizer):
            drop_parameters(twin, gone)
        else:
            remove_module(inner(twin), name)


def drop_parameters(optimizer: torch.optim.Optimizer, gone: Iterable[nn.Parameter]) -> None:
    """Have an optimizer forget parameters; those of all others, and their order, stay as they are."""
    lost = {id(parameter): parameter for parameter in gone}
    for param_group in optimizer.param_groups:
        param_group["params"] = [parameter for parameter in param_group["params"] if id(parameter) not in lost]
    for parameter in lost.values():
        optimizer.state.pop(parameter, None)


def replace_parameter(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: Sequence[nn.Parameter]) -> None:
    """Have an optimizer train several parameters where it trained one, with its settings and no moments at first."""
    for param_group in optimizer.param_groups:
        listed = [[p] if p is not old else list(new) for p in param_group["params"]]
        param_group["params"] = [p for several in listed for p in several]
    optimizer.state.pop(old, None)


def adopt_parameters(
    optimizer: torch.optim.Optimizer,
    new: Iterable[nn.Parameter],
    beside: Sequence[nn.Parameter],
    others: Sequence[nn.Parameter],
) -> None:
    """Have an optimizer train new parameters, each with the settings of one alike: a matrix, or a vector.

    Decay and learning rate differ between parameter groups. A new parameter joins the group of the last one of its
    block that is alike, else of any of its block, else of any of the network that is alike, or of any at all. An
    optimizer that trains nothing of the network, such as that of gates, takes on none.

    Args:
        optimizer: Its other parameters, and their states, stay as they are.
        new: What it is to train.
        beside: The parameters of the block that they are in.
        others: Those of the network.
    """
    home = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for parameter in new:
        if not parameter.requires_grad:
            continue
        alike = [[p for p in known if (p.dim() > 1) == (parameter.dim() > 1)] for known in (beside, others)]
        for known in (alike[0], beside, alike[1], others):
            if numbers := [home[id(p)] for p in known if id(p) in home]:
                optimizer.param_groups[numbers[-1]]["params"].append(parameter)
                break
