"""What the editor can work with, checked before anything else, all complaints at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from robustcompress.errors import Problems, UnsupportedModelError, first_line
from robustcompress.structure.kinds import kind_of
from robustcompress.structure.teaching import misfits

_UNSUPPORTED: dict[type, str] = {
    nn.MultiheadAttention: (
        "torch's attention asserts its number of heads; call robustcompress.models.open_attention(model) first"
    ),
    nn.LocalResponseNorm: "local response norm mixes neighbouring channels and cannot be edited",
    nn.RNNBase: "recurrent layers cannot be edited",
    nn.Embedding: "embeddings cannot be edited",
    nn.Bilinear: "bilinear layers cannot be edited",
    nn.modules.lazy.LazyModuleMixin: "run one batch through the model first, so that lazy layers take their shape",
}


def check_supported(model: nn.Module) -> None:
    """Raise one error that names every layer which cannot be edited.

    Args:
        model: The network.

    Raises:
        UnsupportedModelError: Listing each layer with its reason and the remedy.
    """
    problems = Problems(f"{type(model).__name__} cannot be edited")
    _check_wrapping(model, problems)
    problems.raise_if_any(UnsupportedModelError)
    names_of: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        label = f"{name or 'the model'} ({type(module).__name__})"
        for layer_type, reason in _UNSUPPORTED.items():
            if isinstance(module, layer_type):
                problems.add(f"{label}: {reason}")
        kind = kind_of(module)
        if kind is not None and (reason := kind.refuse(module)):
            problems.add(f"{label}: {reason}")
        for misfit in misfits(module):
            problems.add(f"{label}: {misfit}")
        if parametrize.is_parametrized(module) or hasattr(module, "weight_g") or hasattr(module, "weight_orig"):
            problems.add(f"{label}: weight is parametrised; remove the parametrisation (or weight/spectral norm) first")
        for parameter_name, parameter in module.named_parameters(recurse=False):
            names_of[id(parameter)].append(f"{name}.{parameter_name}".lstrip("."))
            if parameter.dtype not in (torch.float32, torch.float64):
                problems.add(f"{label}: parameters are {parameter.dtype}; call model.float() first")
    for names in names_of.values():
        if len(names) > 1:
            problems.add(f"{', '.join(names)}: one parameter serves several layers; untie them first")
    if not names_of:
        problems.add("it has no parameters")
    problems.raise_if_any(UnsupportedModelError)


def _check_wrapping(model: nn.Module, problems: Problems) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        problems.add("it is a TorchScript module; pass the Python module it was made from")
    elif hasattr(model, "_orig_mod"):
        problems.add("it is compiled; pass the module that was given to torch.compile (model._orig_mod)")
    elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        problems.add("it is wrapped for parallel training; pass model.module")


def check_calls(twin: nn.Module, example: torch.Tensor, calls: Mapping[str, int]) -> tuple[str, ...]:
    """Raise one error about how often the network calls its layers.

    Args:
        twin: A copy of the network; it is run in training mode.
        example: One input batch.
        calls: How often each layer was called in eval mode.

    Returns:
        The layers that are called in training mode only.

    Raises:
        UnsupportedModelError: A layer is called more than once.
        Exception: Whatever the forward raises in training mode.
    """
    problems = Problems(f"{type(twin).__name__} cannot be edited")
    for name, count in calls.items():
        if count > 1:
            problems.add(f"{name}: the layer is called {count} times in one forward pass; give each call its own layer")
    problems.raise_if_any(UnsupportedModelError)
    trained = _called_in_training(twin, example)
    for name, count in trained.items():
        if count > 1:
            problems.add(f"{name}: the layer is called {count} times in training mode; give each call its own layer")
    problems.raise_if_any(UnsupportedModelError)
    return tuple(name for name in trained if name not in calls)


def check_exposed(
    twin: nn.Module, calls: Collection[str], auxiliary: Collection[str], exposed: Collection[str]
) -> None:
    """Raise one error about layers that are never called together.

    Args:
        twin: A copy of the network.
        calls: The layers that are called in eval mode.
        auxiliary: Those that are called in training mode only.
        exposed: Those that were called with only what holds auxiliary layers in training mode.

    Raises:
        UnsupportedModelError: Some of the others were not.
    """
    problems = Problems(f"{type(twin).__name__} cannot be edited")
    for name in auxiliary:
        if name not in exposed:
            problems.add(
                f"{name}: the layer is used in training mode only, and what switches it on is not among the modules "
                "that hold it; switch its branch off, or have the module that holds it decide by self.training"
            )
    for name in calls:
        if name not in exposed:
            problems.add(
                f"{name}: the layer is used in evaluation mode only, and others ({', '.join([*auxiliary][:2])}) in "
                "training mode only; have both modes call one of the two"
            )
    problems.raise_if_any(UnsupportedModelError)


@torch.no_grad()
def _called_in_training(twin: nn.Module, example: torch.Tensor) -> Counter[str]:
    called: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.update([name]))
        for name, module in twin.train().named_modules()
        if kind_of(module) is not None
    ]
    try:
        twin(example)
    finally:
        for handle in handles:
            handle.remove()
    return called


def on(example: torch.Tensor, error: Exception) -> str:
    """Words for a forward pass that raised."""
    return f"on an input of shape {tuple(example.shape)}: {first_line(error, 200)}"
