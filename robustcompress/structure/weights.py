"""Masks on single weights: learnable while they are searched for, then fixed while the surviving weights train."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustcompress.errors import InputError, Problems
from robustcompress.structure.kinds import weights_of
from robustcompress.structure.masks import MaskRule, ScoreMasks


def maskable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions, linear and taught layers by name: what sparsity is counted over.

    Biases and norms are none of them (as in HYDRA, Sehwag et al. 2020, and in the figures of the field); in a taught
    layer, what is read with, and what begins at random (see `LayerKind.fill`).

    Raises:
        InputError: Two layers share one weight, which cannot be masked for one of them.
    """
    found: dict[str, nn.Parameter] = {}
    owners: dict[int, str] = {}
    problems = Problems("single weights of this model cannot be masked")
    for name, module in model.named_modules():
        for tensor in weights_of(module):
            weight = getattr(module, tensor)
            if not isinstance(weight, nn.Parameter):
                continue
            if id(weight) in owners:
                problems.add(f"{name} shares its weight with {owners[id(weight)]}; give each layer its own")
            owners[id(weight)] = name
            found[f"{name}.{tensor}" if name else tensor] = weight
    problems.raise_if_any()
    return found


def count_weights(model: nn.Module) -> tuple[int, int]:
    """How many weights of convolutions, linear and taught layers there are, and how many of them are not zero."""
    weights: dict[int, Tensor] = {}  # by identity: all are held meanwhile, so that none takes another's
    for module in model.modules():
        for tensor in weights_of(module):
            weight = getattr(module, tensor)
            weights[id(weight)] = weight
    return sum(w.numel() for w in weights.values()), sum(int(w.count_nonzero()) for w in weights.values())


class _Masked(nn.Module):
    """What a layer computes with in place of its weight."""

    def __init__(self, gates: WeightGates, name: str) -> None:
        super().__init__()
        self._source = [gates]  # in a list: it must not become part of the network
        self._name = name

    def forward(self, weight: Tensor) -> Tensor:
        """The weight under its mask."""
        return weight * self._source[0]._mask(self._name).to(weight.dtype)


class WeightGates(ScoreMasks):
    """Multiplies weights by gate values while the context is open.

    Args:
        model: The network; `torch.nn.utils.parametrize` stands in its layers until exit.
        scores: By name of the weight (see `maskable_weights`), its first scores, of its shape; each becomes a parameter
            on the model's device.
        rule: Turns scores into gate values; the scores themselves by default.

    Raises:
        InputError: A weight that does not exist, or scores of another shape.
    """

    def __init__(self, model: nn.Module, scores: Mapping[str, Tensor], rule: MaskRule | None = None) -> None:
        weights, problems = maskable_weights(model), Problems("the gates were refused")
        for name, values in scores.items():
            if name not in weights:
                problems.add(f"there is no weight {name!r} of a convolution or linear layer")
            elif values.shape != weights[name].shape:
                problems.add(f"{name!r} needs scores of shape {list(weights[name].shape)}, not {list(values.shape)}")
        problems.raise_if_any()
        made = {
            name: nn.Parameter(values.detach().to(weights[name].device, torch.float32, copy=True))
            for name, values in scores.items()
        }
        super().__init__(model, made, rule)
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._orders: dict[str, list[str]] = {}

    def _attach(self) -> None:
        self._handle = self._model.register_forward_pre_hook(self._forget)
        for name in self.scores:
            owner, _, tensor = name.rpartition(".")
            module = self._model.get_submodule(owner)
            self._orders[name] = list(module._parameters)
            parametrize.register_parametrization(module, tensor, _Masked(self, name), unsafe=True)

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        for name in reversed(self.scores):  # of several weights in one layer, the last to go in comes out first
            owner, _, tensor = name.rpartition(".")
            module = self._model.get_submodule(owner)
            if parametrize.is_parametrized(module, tensor):
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
                for key in self._orders[name]:  # the weight came back last, and optimizers go by the order
                    module._parameters[key] = module._parameters.pop(key)


class Sparsity:
    """Fixed masks on the weights of a network: zeros that stay zeros while the rest trains.

    The weights are set to zero once; while the context is open, their gradients are masked where they arise, so that
    whatever uses them (optimizers, clipping, weight perturbation) leaves the zeros alone. Optimizers and averages made
    from the network before `set_masks` would bring old values back: make them afterwards.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = maskable_weights(model)
        self._masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self._weights.items()}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def masks(self) -> dict[str, Tensor]:
        """By name of the weight, what is kept."""
        return dict(self._masks)

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Take these masks, and zero what they reject.

        Raises:
            InputError: Not one mask for each weight, of its shape.
        """
        shapes = {name: weight.shape for name, weight in self._weights.items()}
        if {name: mask.shape for name, mask in masks.items()} != shapes:
            raise InputError(f"give one mask a weight, of its shape: {', '.join(shapes)}")
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._masks[name] = masks[name].to(weight.device, torch.bool, copy=True)
                weight.masked_fill_(~self._masks[name], 0.0)

    def state_dict(self) -> dict[str, Any]:
        """The masks."""
        return dict(self._masks)

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Take masks back."""
        self.set_masks(state_dict)

    def __enter__(self) -> Self:
        """Begin to hold the zeros."""

        def hold(name: str) -> torch.utils.hooks.RemovableHandle:
            def masked(gradient: Tensor) -> Tensor:
                return gradient * self._masks[name].to(gradient.dtype)

            handle: torch.utils.hooks.RemovableHandle
            handle = self._weights[name].register_hook(masked)  # type: ignore[no-untyped-call]
            return handle

        # A frozen weight takes no gradient, and no hook.
        self._handles = [hold(name) for name, weight in self._weights.items() if weight.requires_grad]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go; the zeros stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
