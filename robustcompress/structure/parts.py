"""What can be inserted into the residual branch of a block, and where it then stands.

A part is given what the branch gives, `[N, C, H, W]`, and gives as much back. Each is `x + f(x)` with an `f` that
begins at zero, so that a network computes the same with it until it is trained; what scales `f` gets a gradient in the
first step, and the rest of `f` from the second one on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from robustcompress.structure.factors import LAST, Factorised

LEAST_HIDDEN = 8
"""No part begins with fewer hidden channels, unless what it is given has fewer."""

LAYER = "layer"
"""The name of what a part stands behind, in their container."""


class SqueezeExcite(nn.Module):
    """Residual squeeze-and-excitation: every channel is scaled by what all channels are like on average.

    `x + x * tanh(excite(relu(squeeze(mean of x over the image))))`: squeeze-and-excitation (Hu et al. 2018), with 1x1
    convolutions for its linear layers and a reduction of 16. That it is added to what it scales is from the public code
    of RobustResNet (Huang et al. 2023, arXiv 2212.11005): `out + SE(BN(out))`, with a sigmoid. The hyperbolic tangent
    is ours: the gate `1 + tanh` begins at exactly 1 and reaches from 0 to 2, where theirs reaches from 1 to 2. Their
    batch norm in front is left out.

    Args:
        channels: C of `[N, C, H, W]`.
        hidden: Width between squeeze and excite.
    """

    reduction = 16

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Be the identity again; the first layer resets itself."""
        nn.init.zeros_(self.excite.weight)
        assert self.excite.bias is not None
        nn.init.zeros_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of `[N, C, H, W]`."""
        hidden = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x + x * torch.tanh(self.excite(hidden))


class InnerResidual(nn.Module):
    """Residual in residual: a small residual branch within the branch.

    `x + expand(relu(norm(squeeze(relu(x)))))`, a 3x3 convolution to a quarter of the channels and a 1x1 convolution
    back. What the robust block type of RC-NAS (Wang et al. 2024, arXiv 2406.06792) consists of is not public; this is
    reconstructed from its name and from the hierarchical block of RobustResNet, whose convolutions hand on sums, and is
    neither of the two.

    Args:
        channels: C of `[N, C, H, W]`.
        hidden: Width of the inner branch.
    """

    reduction = 4

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.expand = nn.Conv2d(hidden, channels, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Be the identity again; the first layers reset themselves."""
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the inner branch makes of `[N, C, H, W]`."""
        inner: Tensor = self.expand(torch.relu(self.norm(self.squeeze(torch.relu(x)))))
        return x + inner


class Extended(nn.Sequential):
    """A layer, and behind it the parts that were inserted there: `layer`, then each by the name of its kind."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of parts it holds or once held, in order."""
        return tuple(name for name in self._modules if name != LAYER)


Part = SqueezeExcite | InnerResidual

PARTS: Mapping[str, Callable[[int, int], Part]] = {"se": SqueezeExcite, "rir": InnerResidual}
"""What can be inserted, by the name of its kind; each is made of channels and hidden channels."""

NAMES = {"se": "squeeze-excite", "rir": "residual in residual"}

_REDUCTIONS = {"se": SqueezeExcite.reduction, "rir": InnerResidual.reduction}


def hidden_width(kind: str, channels: int) -> int:
    """How many hidden channels a part of this kind begins with, behind so many channels."""
    return min(channels, max(LEAST_HIDDEN, channels // _REDUCTIONS[kind]))


def make_part(kind: str, channels: int, hidden: int, generator: torch.Generator) -> Part:
    """A new part; its random weights are torch's defaults, seeded by one draw from `generator`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31 - 1, (), generator=generator)))
        return PARTS[kind](channels, hidden)


def parts_of(model: nn.Module) -> dict[str, str]:
    """The parts in a network: the kind of each by its name, in the model's order."""
    return {
        f"{name}.{child}".lstrip("."): child
        for name, module in model.named_modules()
        if isinstance(module, Extended)
        for child, part in module.named_children()
        if isinstance(part, Part)
    }


def containers_of(model: nn.Module) -> list[str]:
    """The names of everything that parts stand in."""
    return [name for name, module in model.named_modules() if isinstance(module, Extended)]


def original_name(model: nn.Module, name: str) -> str:
    """What a layer was called before it was factorised, or parts were put behind it: groups keep the name."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent) if parent else None
    kept = isinstance(holder, Extended) and child == LAYER
    kept |= isinstance(holder, Factorised) and child == LAST
    return original_name(model, parent) if kept else name


def put_behind(model: nn.Module, layer: str, kind: str, part: Part) -> str:
    """Put a part behind a layer, or behind the parts that stand there already, wherever the model holds it.

    Args:
        model: The network, or a twin with the same module names.
        layer: Name of the layer, or of its container.
        kind: Of the part.
        part: On the layer's device, in its mode.

    Returns:
        The part's name.
    """
    old = model.get_submodule(layer)
    if isinstance(old, Extended):
        old.add_module(kind, part)
        return f"{layer}.{kind}"
    container = Extended(OrderedDict([(LAYER, old), (kind, part)])).train(old.training)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old and parent is not container:
                parent._modules[child] = container
    return f"{layer}.{kind}"
