"""A narrow network from scratch: the reference's own initialisation, at other widths.

Channels cut out of a freshly initialised wide network keep weights that were scaled for the wide one's fans. `plant`
gives each layer the scale that its own initialisation has at the new width, so that what is trained afterwards began
like a network that was built narrow. Ours: the rules are the usual ones (Glorot and Bengio 2010; He et al. 2015;
torch's defaults), which of them a layer follows is read from its weights.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from robustcompress.models.factory import initialise
from robustcompress.session import Session
from robustcompress.structure.parts import parts_of


@dataclass(frozen=True, slots=True)
class Law:
    """Standard deviation of initial weights: `sqrt(gain / fan)`, or `gain` itself where there is no fan.

    Attributes:
        fan: "in", "out", "sum" (of both), or "none".
        gain: The variance times the fan, or a constant standard deviation.
    """

    fan: str
    gain: float

    def std(self, shape: torch.Size) -> float:
        """What a weight `[out, in, ...]` of this shape begins with."""
        fan_in, fan_out = _fans(shape)
        if self.fan == "none":
            return self.gain
        return math.sqrt(self.gain / {"in": fan_in, "out": fan_out, "sum": fan_in + fan_out}[self.fan])


LAWS = (
    *(Law("in", 2.0), Law("in", 1.0), Law("in", 1 / 3)),  # He for ReLU, LeCun, and torch's default (a uniform)
    *(Law("out", 2.0), Law("out", 1.0)),
    *(Law("sum", 2.0), Law("sum", 4.0)),  # Glorot, and with the gain of ReLU
    *(Law("none", 0.01), Law("none", 0.02)),
)
"""Tried in this order where two explain a network equally well."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a layer's weight was like when it was drawn.

    Attributes:
        shape: `[out, in, ...]`.
        rms: Root mean square.
        uniform: Whether it has no tails: a uniform distribution, not a normal one.
    """

    shape: torch.Size
    rms: float
    uniform: bool


Weights = dict[str, Drawn]
"""By layer."""


def plant(session: Session, widths: Mapping[str, int]) -> None:
    """Make the model a freshly initialised network of these widths, narrower or wider than it is now.

    A reference that was never trained keeps what its factory drew: the first channels of each group stay (any channels
    of a random layer are a random sample; the largest would be none), and every convolution and linear weight is
    rescaled by the ratio of its law (see `find_laws`) at the new and the old shape. A layer that is longer on any side
    is drawn anew at that scale. Tensors of one value, such as batch-norm scales begun at zero, keep that value. Biases
    drawn as torch draws them by default are drawn anew.

    The weights of a trained reference are not used: one that is said to be pretrained, or whose batch norms have
    counted batches, is initialised again at the new widths by each module's `reset_parameters()`, and a built-in model
    then as its factory does. Frozen parameters are left alone either way.

    Args:
        session: Before any training; draws from `session.generator`.
        widths: Per editable group; groups that are not named stay as wide as they are.
    """
    model = session.model
    trained = session.goal.pretrained or _has_counted(model)
    weights, constants, biases = _weights(model), _constants(model), _default_biases(model)
    for group in session.editor.editable:
        width = widths.get(group.name, group.width)
        if width < group.width:
            session.editor.prune(group.name, range(width))
        elif width > group.width:
            session.editor.grow(group.name, width - group.width, init="kaiming")
    if trained:
        session.say("trained from scratch: the reference's weights are not used")
        _reinitialise(session)
    else:
        _rescale(model, weights, session.generator)
        _refresh(model, constants, biases, session.generator)
    macs, params = session.cost_model.predict(session.editor.widths)
    session.record(
        {"phase": "plant", "event": "plant", "widths": session.editor.widths, "macs": macs, "params": params}
    )


def find_laws(model: nn.Module, weights: Weights) -> dict[str, Law]:
    """Say which law each layer's initial weights follow.

    A layer's own weights cannot tell fan in from fan out where both are equal, so the laws are ranked by how many
    layers of the same kind (convolutions, linear layers) they explain, and each layer takes the best-ranked law that
    explains it. One that none explains takes the best-ranked law, since only the ratio between two widths is used.

    Args:
        model: The network, of any width.
        weights: What to explain.
    """
    kinds: dict[bool, list[str]] = defaultdict(list)
    for name in weights:
        kinds[isinstance(model.get_submodule(name), nn.Linear)].append(name)
    found: dict[str, Law] = {}
    for names in kinds.values():
        errors = {law: {name: _error(law, weights[name]) for name in names} for law in LAWS}
        explained = {law: [n for n in names if errors[law][n] <= _tolerance(weights[n].shape)] for law in LAWS}
        ranking = sorted(LAWS, key=lambda law: (-len(explained[law]), sum(errors[law].values())))
        default = ranking[0] if explained[ranking[0]] else LAWS[0]
        for name in names:
            found[name] = next((law for law in ranking if name in explained[law]), default)
    return found


def _fans(shape: torch.Size) -> tuple[int, int]:
    """Fan in and fan out as `torch.nn.init` counts them."""
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def _error(law: Law, drawn: Drawn) -> float:
    return abs(math.log(drawn.rms / law.std(drawn.shape)))


def _tolerance(shape: torch.Size) -> float:
    """Three standard errors of the spread of so many normal numbers, and 2 %."""
    return 3 / math.sqrt(2 * math.prod(shape)) + 0.02


def _dense(model: nn.Module) -> list[tuple[str, nn.Module]]:
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, layers)]


def _weights(model: nn.Module) -> Weights:
    """Every trainable weight that was drawn at random."""
    found: Weights = {}
    for name, module in _dense(model):
        weight = module.get_parameter("weight").detach()
        if module.get_parameter("weight").requires_grad and not _is_constant(weight):
            rms = float(weight.double().square().mean().sqrt())
            uniform = float(weight.abs().max()) <= 1.02 * math.sqrt(3) * rms + 3 * rms / math.sqrt(weight.numel())
            found[name] = Drawn(weight.shape, rms, uniform)
    return found


def _constants(model: nn.Module) -> dict[str, float]:
    return {n: float(p.detach().flatten()[0]) for n, p in model.named_parameters() if _is_constant(p.detach())}


def _is_constant(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())


def _default_biases(model: nn.Module) -> dict[str, torch.Size]:
    """Layers whose bias lies where torch draws it by default (uniform within 1 / sqrt(fan in)), with their shapes."""
    found = {}
    for name, module in _dense(model):
        bias, shape = module.bias, module.get_parameter("weight").shape
        if not isinstance(bias, nn.Parameter) or not bias.requires_grad or _is_constant(bias.detach()):
            continue
        if float(bias.detach().abs().max()) <= 1.0001 / math.sqrt(_fans(shape)[0]):
            found[name] = shape
    return found


def _has_counted(model: nn.Module) -> bool:
    counts = (m.num_batches_tracked for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(count is not None and int(count) > 0 for count in counts)


@torch.no_grad()
def _rescale(model: nn.Module, weights: Weights, generator: torch.Generator) -> None:
    for name, law in find_laws(model, weights).items():
        drawn, weight = weights[name], model.get_submodule(name).get_parameter("weight")
        scale = law.std(weight.shape) / law.std(drawn.shape)
        if all(now <= then for now, then in zip(weight.shape, drawn.shape, strict=True)):
            weight.mul_(scale)
        elif drawn.uniform:
            weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * math.sqrt(3) * drawn.rms * scale)
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator) * drawn.rms * scale)


@torch.no_grad()
def _refresh(
    model: nn.Module, constants: dict[str, float], biases: dict[str, torch.Size], generator: torch.Generator
) -> None:
    for name, value in constants.items():
        model.get_parameter(name).fill_(value)
    for name, shape in biases.items():
        module = model.get_submodule(name)
        bias, now = module.get_parameter("bias"), module.get_parameter("weight").shape
        if now != shape:
            drawn = torch.rand(len(bias), generator=generator) * 2 - 1
            bias.copy_(drawn / math.sqrt(_fans(now)[0]))


@torch.no_grad()
def _reinitialise(session: Session) -> None:
    model = session.model
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    kept: list[str] = []
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**31 - 1, (), generator=session.generator)))
        for name, module in reversed(list(model.named_modules())):  # a module of its own mind has the last word
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                kept += [
                    f"{name}.{n}".lstrip(".") for n, p in module.named_parameters(recurse=False) if p.requires_grad
                ]
        if hasattr(model, "built_by"):
            initialise(model)
            for part in parts_of(model):  # of which the factory does not know that they begin as the identity
                model.get_submodule(part).reset_parameters()  # type: ignore[operator]
    for name, values in frozen.items():
        model.get_parameter(name).copy_(values)
    if kept:
        session.say(
            f"warning: {', '.join(kept)} cannot be initialised again (no reset_parameters) and keep their values"
        )
