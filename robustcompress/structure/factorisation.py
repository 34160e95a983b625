"""How layers are factorised: the proof that the network computes what it then should, the structure, and the doing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from robustcompress.errors import InputError, Problems, first_line, nearest
from robustcompress.structure.auxiliary import expose, tensors_of
from robustcompress.structure.copies import copied, undrawn
from robustcompress.structure.factors import FIRST, LAST, RANKS, Factorised, complaint, factorise, held_by, product
from robustcompress.structure.groups import Axis, ChannelGroup, Factorise, inside
from robustcompress.structure.naming import keep_names
from robustcompress.structure.surgery import Twin, inner, replace_parameter
from robustcompress.structure.survey import Survey, survey

Factors = Mapping[str, Factorised]
"""By the names of the layers whose place they take."""

_REFUSED = "the factorisation was refused"
_TOLERANCE = 1e-9
"""Of outputs in double precision, relative to their largest: a sum in another order is off by some 1e-14."""


def check_factors(model: nn.Module, wanted: Sequence[Factorise], most: int | None = None) -> None:
    """Raise one InputError that names every layer that cannot be factorised as asked, with the reason.

    Args:
        model: Holds the layers.
        wanted: The factorisations, which are carried out at once.
        most: How many numbers the network may then hold; None for any.
    """
    problems, modules = Problems(_REFUSED), dict(model.named_modules())
    layers = [name for name, module in modules.items() if type(module) in (nn.Conv2d, nn.Linear)]
    for edit in wanted:
        if reason := _not_one(edit):
            problems.add(reason)
        elif edit.kind not in RANKS:
            problems.add(f"kind={edit.kind!r} does not exist{nearest(edit.kind, RANKS)}")
        elif edit.module not in modules:
            problems.add(f"there is no layer {edit.module!r}{nearest(edit.module, layers)}")
        elif isinstance(modules[edit.module], Factorised):
            problems.add(f"{edit.module}: it was factorised already")
        elif reason := complaint(modules[edit.module], edit.kind, edit.ranks):
            problems.add(f"{edit.module}: {reason}")
    named = [edit.module for edit in wanted if not _not_one(edit)]
    if len(set(named)) < len(named):
        problems.add("a layer is named twice")
    problems.raise_if_any()
    if most is not None:
        numbers = sum(parameter.numel() for parameter in model.parameters())
        for edit in wanted:
            layer = modules[edit.module]
            numbers += held_by(layer, edit.kind, edit.ranks) - layer.get_parameter("weight").numel()
        if numbers > most:
            raise InputError(
                f"with these factors the network would hold {numbers} numbers; at most {most} are believed"
            )


def _not_one(edit: object) -> str:
    """Why this is no factorisation, whatever the model; empty where it is one."""
    if not isinstance(edit, Factorise):
        return f"{edit!r}: give Factorise(layer, kind, ranks)"
    if not isinstance(edit.module, str) or not isinstance(edit.kind, str):
        return f"{edit!r}: layer and kind are names"
    return "" if isinstance(edit.ranks, tuple) else f"{edit.module}: ranks={edit.ranks!r}: give a tuple, such as (4,)"


@torch.no_grad()
def prove_factors(model: nn.Module, image_shape: Sequence[int], auxiliary: Sequence[str], made: Factors) -> None:
    """Prove that the network with the factors computes what it computes with their products in place of its layers.

    Args:
        model: Not touched.
        image_shape: (C, H, W).
        auxiliary: Layers that only training calls.
        made: The factors, by layer; copied.

    Raises:
        InputError: It does not: its code does more with a layer than to call it.
    """
    whole = copy.deepcopy(model).double()
    parts = copy.deepcopy(whole)
    for name, factors in made.items():
        twin = copy.deepcopy(factors).double()
        weight = whole.get_submodule(name).get_parameter("weight")
        weight.copy_(product(twin).to(weight))
        put(parts, name, twin)
    device = next(whole.parameters()).device
    images = torch.rand((2, *image_shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    for training in (False, True):
        try:
            expected, found = (_run(net, images, auxiliary, training=training) for net in (whole, parts))
        except Exception as error:  # the model's own code may raise anything where a layer is not what it was
            raise InputError(f"{_REFUSED}: the model does not run with it ({first_line(error, 120)})") from error
        alike = len(expected) == len(found) and all(map(_near, expected, found))
        if not alike:
            raise InputError(f"{_REFUSED}: the model uses the weights of {', '.join(made)} beside calling the layers")


def _run(net: nn.Module, images: Tensor, auxiliary: Sequence[str], *, training: bool) -> tuple[Tensor, ...]:
    expose(net.eval(), auxiliary)
    net.train(training)
    with undrawn(net):
        torch.manual_seed(0)
        return tensors_of(net(images))


def _near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= _TOLERANCE * max(1.0, float(one.abs().max())))


def survey_factorised(model: nn.Module, example: Tensor, made: Factors, before: Mapping[str, ChannelGroup]) -> Survey:
    """The structure of a network with factors in it; groups that it had keep their names.

    Args:
        model: Without the factors; not touched.
        example: One input batch `[N, 3, H, W]`.
        made: The factors, by layer.
        before: The groups that it has.

    Raises:
        InputError: A group is not the same any more, or could no longer be edited.
    """
    twin = copied(model, lambda tensor: tensor.detach().clone())
    for name, factors in made.items():
        put(twin, name, copy.deepcopy(factors))
    ends = {Axis(f"{name}.{FIRST}", "in") for name in made} | {Axis(f"{name}.{LAST}", "out") for name in made}

    def moved(axis: Axis) -> Axis:
        if axis.module not in made:
            return axis
        return Axis(f"{axis.module}.{FIRST if axis.side == 'in' else LAST}", axis.side)

    def fresh(axis: Axis) -> bool:
        return inside(axis.module, made) and axis not in ends

    return keep_names(survey(twin, example), before, moved=moved, fresh=fresh, title=_REFUSED)


def make_factors(model: nn.Module, wanted: Sequence[Factorise], *, blank: bool = False) -> dict[str, Factorised]:
    """The factors that take the place of layers, by the layers' names; `blank` ones of arbitrary values."""
    return {
        edit.module: factorise(model.get_submodule(edit.module), edit.kind, edit.ranks, blank=blank) for edit in wanted
    }


def carry_out_factors(model: nn.Module, followers: Iterable[Twin], made: Factors) -> None:
    """Put factors in the place of layers, in a network and in everything that follows it.

    Optimizers forget the layers' weights and train the factors in their stead, without momentum at first; biases go on
    as they are. Twins, such as averages, begin anew from the network's factors: those of another weight are other
    factors, of which no average makes sense.

    Args:
        model: The network.
        followers: Optimizers and twins.
        made: The factors, by layer.
    """
    gone = [model.get_submodule(name).get_parameter("weight") for name in made]
    for name, factors in made.items():
        put(model, name, factors)
    for twin in followers:
        if isinstance(twin, torch.optim.Optimizer):
            for factors, old in zip(made.values(), gone, strict=True):
                replace_parameter(twin, old, [module.get_parameter("weight") for module in factors])
        else:
            for name, factors in made.items():
                held = inner(twin).get_submodule(name)
                like = held.get_parameter("weight")
                new = copy.deepcopy(factors).to(like).train(held.training).requires_grad_(like.requires_grad)
                new.get_submodule(LAST).register_parameter("bias", held._parameters["bias"])
                put(inner(twin), name, new)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, wherever the model holds it."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, held in list(parent._modules.items()):
            if held is old:
                parent._modules[child] = module
