"""What a network computes before its logits, found without knowing the network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustcompress.errors import InputError
from robustcompress.robust.attacks import eval_mode


def still(model: nn.Module, x: Tensor) -> Tensor:
    """One pass in the mode the model is in, that moves no running statistics: logits [N, K] with their graph."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _eager():
        logits: Tensor = functional_call(model, buffers, (x,))
    return logits


def classifier_of(model: nn.Module, x: Tensor) -> nn.Module:
    """The layer that writes the logits: the last to run of those that have weights and one output a class.

    Args:
        model: Maps images to logits. One pass over two of `x` in eval mode, without gradients.
        x: Images, [N, C, H, W].

    Raises:
        InputError: No layer but the network as a whole writes one channel a class.
    """
    images, ran = x[:2], list[tuple[nn.Module, Tensor]]()

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0] is not images and isinstance(output, Tensor):
            ran.append((module, output))

    handles = [module.register_forward_hook(note) for module in model.modules() if _is_layer(module)]
    try:
        with torch.no_grad(), eval_mode(model), _eager():
            classes = model(images).shape[1]
    finally:
        for handle in handles:
            handle.remove()
    for module, output in reversed(ran):
        if output.dim() >= 2 and output.shape[_channel_dim(module)] == classes:
            return module
    raise InputError(
        f"no layer of this network writes its {classes} logits, so that it has no features before them: "
        "leave out the regularisers 'separability' and 'boundary'"
    )


def features(model: nn.Module, x: Tensor, classifier: nn.Module) -> Tensor:
    """What the classifier is given, averaged over places: float32 [N, D], with its graph, by a pass as in `still`."""
    heard: list[Tensor] = []

    def listen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        heard.append(_pooled(inputs[0], module))

    with classifier.register_forward_pre_hook(listen):
        still(model, x)
    return heard[-1].float()


def shifted(model: nn.Module, x: Tensor, classifier: nn.Module, shift: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits, [N, K], of a pass as in `still` whose features are moved on their way to the classifier.

    Args:
        model: Maps images to logits.
        x: Images, [N, C, H, W].
        classifier: From `classifier_of`.
        shift: Is given the features, [N, D], and says what is added to them, at every place alike.
    """

    def move(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        given = inputs[0]
        by = shift(_pooled(given, module).float()).to(given.dtype)
        shape = [1] * given.dim()
        shape[0], shape[_channel_dim(module)] = by.shape
        return (given + by.view(shape), *inputs[1:])

    with classifier.register_forward_pre_hook(move):
        return still(model, x)


def _pooled(given: Tensor, classifier: nn.Module) -> Tensor:
    places = [d for d in range(1, given.dim()) if d != _channel_dim(classifier) % given.dim()]
    return given.mean(places) if places else given


def _is_layer(module: nn.Module) -> bool:
    """Whether a module has weights and no layers within (those of torch may have parametrizations within)."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return True
    return any(p.dim() > 1 for p in module.parameters(recurse=False)) and not any(True for _ in module.children())


def _channel_dim(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else -1


def _eager() -> AbstractContextManager[object]:
    # Compiled passes hear no hooks that came later, and have no second derivative. Where nothing was compiled, the
    # compiler is not imported either: that takes seconds.
    compiled = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
