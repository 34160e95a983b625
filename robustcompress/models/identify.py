"""Models recognised: from an instance back to the name and arguments that build it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from robustcompress.errors import InputError
from robustcompress.models.image_size import image_size
from robustcompress.models.registry import (
    BUILT_IN,
    OURS,
    TORCHVISION,
    TORCHVISION_DEFAULTS,
    ModelSpec,
    build_torchvision,
    list_torchvision_models,
)
from robustcompress.models.timm_models import TIMM, build_timm

# What callers may have passed to GoogLeNet or Inception.
_AUXILIARY: tuple[dict[str, Any], ...] = (
    {},
    {"aux_logits": True},
    {"aux_logits": True, "transform_input": True},
)


def identify(model: nn.Module) -> ModelSpec | None:
    """Find the spec that rebuilds the architecture of a built-in model, or one of torchvision's or timm's.

    Candidates are built without memory (on the meta device) with the number of classes read from the last
    layer, and compared with `model` in every parameter name and shape, every layer's printed settings and
    every plain attribute.

    Returns:
        The spec, or None when no factory gives exactly this architecture (edited, subclassed or of another
        origin).
    """
    num_classes = _num_outputs(model)
    if num_classes is None or any("forward" in vars(module) for module in model.modules()):
        return None
    built_by = getattr(model, "built_by", None)
    if built_by is not None:
        name, kwargs = built_by
        if name not in BUILT_IN:
            return None
        kwargs = {**kwargs, "num_classes": num_classes}
        with torch.device("meta"):
            twin = BUILT_IN[name](**kwargs)
        return ModelSpec(f"{OURS}:{name}", kwargs) if _same(model, twin) else None
    if type(model).__module__.startswith("timm.models."):
        return _identify_timm(model, num_classes)
    if not type(model).__module__.startswith("torchvision.models."):
        return None
    return _identify_torchvision(model, num_classes)


def _identify_torchvision(model: nn.Module, num_classes: int) -> ModelSpec | None:
    import torchvision

    module = type(model).__module__
    signature = _tensor_count(model)
    for name in list_torchvision_models():
        if torchvision.models.get_model_builder(name).__module__ != module:
            continue
        defaults = TORCHVISION_DEFAULTS.get(name, {})
        for change in _AUXILIARY if defaults else ({},):
            kwargs = {**defaults, **change, "num_classes": num_classes}
            # RegNet computes its widths with tensors, which have no values on the meta device: unknown.
            with contextlib.suppress(NotImplementedError), torch.device("meta"):
                twin = build_torchvision(name, kwargs)
                if _tensor_count(twin) != signature or not _same(model, twin):
                    continue
                return ModelSpec(f"{TORCHVISION}:{name}", kwargs)
    return None


def _identify_timm(model: nn.Module, num_classes: int) -> ModelSpec | None:
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not isinstance(name, str):
        return None
    made_for = image_size(model)
    kwargs: dict[str, Any] = {"num_classes": num_classes}
    # Some settings are computed with tensors, which have no values on the meta device: unknown then.
    with contextlib.suppress(NotImplementedError, InputError), torch.device("meta"):
        twin = build_timm(name, kwargs)
        if made_for.argument and image_size(twin) != made_for:
            kwargs[made_for.argument] = (made_for.height, made_for.width)
            twin = build_timm(name, kwargs)
        return ModelSpec(f"{TIMM}:{name}", kwargs) if _same(model, twin) else None
    return None


def _tensor_count(model: nn.Module) -> int:
    return len(model.state_dict(keep_vars=True))


def _same(model: nn.Module, twin: nn.Module) -> bool:
    if type(model) is not type(twin):
        return False
    ours, theirs = model.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        return False
    return _settings(model) == _settings(twin)


def _settings(model: nn.Module) -> list[tuple[object, ...]]:
    """Name, class, printed settings and plain attributes of every layer: a changed stride shows here."""
    return [
        (
            name,
            type(module),
            module.extra_repr(),
            {k: v for k, v in vars(module).items() if isinstance(v, int | float | str) and k != "training"},
        )
        for name, module in model.named_modules()
    ]


def _num_outputs(model: nn.Module) -> int | None:
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Linear):
            return module.out_features
        if isinstance(module, nn.Conv2d):
            return module.out_channels
    return None
