"""Which blocks return what they are given while their residual branch is silent, whatever the weights are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustcompress.structure.branch import silent
from robustcompress.structure.copies import copied

TOLERANCE = 1e-9
"""Relative difference allowed in double precision; a sum with zero is exact, so this is for rounding elsewhere."""

DRAWS = 12
"""How often all weights are drawn anew. Each draw has about even chances to show that a narrow block is no identity."""

GAIN = 16.0
"""How much larger all weights are in every second draw: bounds such as ReLU6's show there."""

LARGEST = 80.0
"""Decimal digits that all gains together may add: double precision ends at 308."""


class Candidate(NamedTuple):
    """A block that may be the identity.

    Attributes:
        branch: The parameters that silence everything but its shortcut.
        given: Shape of its input, the batch first.
    """

    branch: frozenset[str]
    given: tuple[int, ...]


@torch.no_grad()
def identities(network: nn.Module, images: Tensor, candidates: Mapping[str, Candidate]) -> frozenset[str]:
    """Name the candidates that are the identity for every draw of all weights.

    One draw would take for granted what its weights happen to do: behind scales that are all positive nothing is
    negative, until they are trained. Each block is asked where it stands, during the one pass of a draw, and once for
    an input that is nowhere zero: a narrow network may give it nothing else.

    Args:
        network: In double precision and eval mode; not touched.
        images: What it is given.
        candidates: By the module's name; each is called once in a pass, with one tensor.
    """
    network = copied(network, lambda tensor: tensor.detach().clone())  # also of what a forward left behind
    left = dict(candidates)
    asking = False

    def ask(name: str, block: nn.Module, given: Tensor) -> None:
        nonlocal asking
        if asking or name not in left:  # asked, a block calls the blocks within it
            return
        asking = True
        with silent(block, left[name].branch):
            if not equal(block(given.clone()), given):  # it may write to its input
                del left[name]
        asking = False

    def at(name: str, block: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return block.register_forward_pre_hook(lambda _, args: ask(name, block, args[0]))

    generator = torch.Generator().manual_seed(0)
    for name, candidate in candidates.items():
        positive = torch.rand(candidate.given, generator=generator, dtype=torch.float64)
        ask(name, network.get_submodule(name), positive.to(images.device))
    layers = sum(1 for module in network.modules() if any(True for _ in module.parameters(recurse=False)))
    gain = min(GAIN, 10 ** (LARGEST / max(1, layers)))
    handles = [at(name, network.get_submodule(name)) for name in left]
    for draw in range(DRAWS):
        if not left:
            break
        draw_anew(network, gain if draw % 2 else 1.0, seed=draw + 1)
        with torch.random.fork_rng(devices=[]):
            network(images)
    for handle in handles:
        handle.remove()
    return frozenset(left)


def equal(found: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors have one shape, and the same values but for rounding."""
    if found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


@torch.no_grad()
def draw_anew(network: nn.Module, gain: float, seed: int) -> None:
    """Give a network random parameters and statistics, of either sign.

    Args:
        network: In double precision.
        gain: Factor on all its parameters.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor, scale: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * scale)

    for parameter in network.parameters():
        draw(parameter, gain * ((2 / max(1, parameter[0].numel())) ** 0.5 if parameter.dim() > 1 else 1.0))
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            draw(module.running_mean, 1.0)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
