"""The mixed tangent kernel: how training on attacked images moves a network's outputs on clean ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustcompress.robust.attacks import eval_mode

Parameters = Mapping[str, Tensor]
_TINY = 1e-20


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """By name, detached, the parameters that are not frozen now: what tangents are taken with respect to."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def draw_direction(outputs: int, *, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A unit vector `[outputs]`, uniform on the sphere: logits times it are a network of one output.

    The kernel of that output is, on average over directions, the trace of the K x K blocks divided by K.

    Args:
        outputs: How many logits there are.
        device: Where the vector is wanted.
        generator: Its randomness, of any device; torch's global one where None.
    """
    drawn: Tensor = torch.randn(
        outputs, device=generator.device if generator is not None else device, generator=generator
    )
    unit: Tensor = drawn / torch.linalg.vector_norm(drawn)
    return unit.to(device)


def tangents(model: nn.Module, x: Tensor, direction: Tensor, parameters: Parameters) -> dict[str, Tensor]:
    """The gradient of one output of each image with respect to each parameter, in eval mode.

    In train mode the images of a batch share its statistics, and no image has a gradient of its own.
    Differentiable in whatever else the network reads (gate values, scores behind a straight-through mask); parameters
    and running statistics are constants. What the network computes with may be masked by hooks or parametrizations.

    Args:
        model: Maps images `[N, C, H, W]` to logits `[N, K]`, each image by itself; its mode is as before afterwards.
        x: Images, `[N, C, H, W]`.
        direction: `[K]`; the output is the logits times this.
        parameters: By name in `model.named_parameters()`, the point where to differentiate.

    Returns:
        By name, `[N, *shape of the parameter]`: N P floats in all, in float32 also under autocast.
    """

    def output(point: dict[str, Tensor], image: Tensor) -> Tensor:
        chosen: Tensor = functional_call(model, point, (image.unsqueeze(0),))[0] @ direction
        return chosen

    per_image: Callable[..., dict[str, Tensor]] = vmap(grad(output), in_dims=(None, 0))
    # Fused attention has no second derivative, and none by image; the plain form has both.
    with eval_mode(model), _full_precision(x.device), sdpa_kernel(SDPBackend.MATH):
        return per_image({name: p.detach() for name, p in parameters.items()}, x)


def tangent_kernel(model: nn.Module, x: Tensor, x_adv: Tensor, direction: Tensor, parameters: Parameters) -> Tensor:
    """`J(x) J(x_adv)^T`, J the Jacobian of one output: rows at clean images, columns at attacked ones.

    Under gradient flow on attacked images the outputs on clean ones move by this kernel times the loss's gradient
    (Shi et al., AISTATS 2022, as reconstructed; with `x_adv = x` it is the empirical neural tangent kernel of Jacot et
    al. 2018). Holds 2 n P floats, and a graph several times as large where gradients are asked for.

    Args:
        model: As in `tangents`.
        x: Images, `[N, C, H, W]`.
        x_adv: Images, `[M, C, H, W]`.
        direction: As in `tangents`.
        parameters: As in `tangents`.

    Returns:
        `[N, M]`.
    """
    found = tangents(model, torch.cat([x, x_adv]), direction, parameters)
    with _full_precision(x.device):
        flat = (torch.split(jacobian.flatten(1), [len(x), len(x_adv)]) for jacobian in found.values())
        return torch.stack([clean @ attacked.T for clean, attacked in flat]).sum(0)


def relative_square(found: Tensor, wanted: Tensor) -> Tensor:
    """`||found - wanted||^2 / ||wanted||^2`, a scalar: how far off, whatever the scale."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(_TINY)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    # Differences of kernels would drown in bfloat16's three digits.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
