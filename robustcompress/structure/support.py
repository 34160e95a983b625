"""What the editor can work with, checked before anything else, all complaints at once."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict

import torch
from torch import nn
from torch.nn.utils import parametrize

from robustcompress.errors import Problems, UnsupportedModelError
from robustcompress.structure.kinds import kind_of

_UNSUPPORTED: dict[type, str] = {
    nn.MultiheadAttention: (
        "torch's attention asserts its number of heads; call robustcompress.models.open_attention(model) first"
    ),
    nn.GroupNorm: "group norm mixes the channels it normalises and cannot be edited yet; use BatchNorm2d",
    nn.LocalResponseNorm: "local response norm mixes neighbouring channels and cannot be edited",
    nn.RNNBase: "recurrent layers cannot be edited",
    nn.Embedding: "embeddings cannot be edited",
    nn.Bilinear: "bilinear layers cannot be edited",
    nn.modules.instancenorm._InstanceNorm: "instance norm cannot be edited yet; use BatchNorm2d",
    nn.modules.lazy.LazyModuleMixin: "run one batch through the model first, so that lazy layers take their shape",
}


def check_supported(model: nn.Module, example: torch.Tensor) -> None:
    """Raise one error that names every layer which cannot be edited.

    Args:
        model: The network.
        example: One input batch; copies of the model are run on it, in eval and in training mode.

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
    _check_forward(model, example, problems)
    problems.raise_if_any(UnsupportedModelError)


def _check_wrapping(model: nn.Module, problems: Problems) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        problems.add("it is a TorchScript module; pass the Python module it was made from")
    elif hasattr(model, "_orig_mod"):
        problems.add("it is compiled; pass the module that was given to torch.compile (model._orig_mod)")
    elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        problems.add("it is wrapped for parallel training; pass model.module")


def _check_forward(model: nn.Module, example: torch.Tensor, problems: Problems) -> None:
    calls, output = _calls(model, example, problems, training=False)
    if output is None:
        return
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or len(output) != len(example):
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        problems.add(f"it returns {shape}; it must return logits of shape [batch, classes]")
    for name, count in calls.items():
        if count > 1:
            problems.add(f"{name}: the layer is called {count} times in one forward pass; give each call its own layer")
    problems.raise_if_any(UnsupportedModelError)
    trained, _ = _calls(model, example, problems, training=True)
    for name in trained:
        if name not in calls:
            problems.add(f"{name}: the layer is used in training mode only; switch its branch off (aux_logits=False)")


@torch.no_grad()
def _calls(
    model: nn.Module, example: torch.Tensor, problems: Problems, *, training: bool
) -> tuple[Counter[str], object | None]:
    """How often each layer is called in one forward pass of a copy, and what the model returns."""
    twin = copy.deepcopy(model).train(training)
    calls: Counter[str] = Counter()
    for name, module in twin.named_modules():
        if kind_of(module) is not None:
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    try:
        with torch.random.fork_rng(devices=[]):
            return calls, twin(example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        mode = "in training mode " if training else ""
        problems.add(
            f"it does not run {mode}on an input of shape {tuple(example.shape)}: {str(error).splitlines()[0][:200]}"
        )
        return calls, None
