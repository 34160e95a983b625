"""The networks of timm (PyTorch Image Models), by name and with fresh weights; the only file that imports timm."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

from robustcompress.errors import InputError, Problems, nearest
from robustcompress.models import attention

TIMM = "timm"

PRETRAINED = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments with which timm fetches weights, or reads them from a pickle."""


def list_timm_models() -> tuple[str, ...]:
    """Return the names of timm's architectures (imports timm).

    Raises:
        InputError: timm is not installed.
    """
    return tuple(_timm().list_models())


def timm_is_installed() -> bool:
    """Whether timm can be imported; it is not."""
    return find_spec(TIMM) is not None


def build_timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build one of timm's networks without weights; attention comes with heads that can be removed.

    Args:
        name: An architecture ("resnet26"), or one with the tag of weights ("resnet50.a1_in1k"), which then says no
            more than the image size and the number of classes that they were trained with.
        kwargs: What `timm.create_model` takes beside the name, except for what fetches weights.

    Raises:
        InputError: timm is not installed, or there is no such network or argument, or weights are asked for.
    """
    timm = _timm()
    problems = Problems(f"cannot build timm:{name}")
    architecture, _, tag = name.partition(".")
    if architecture not in timm.list_models():
        problems.add(f"timm has no model {architecture!r}{nearest(architecture, timm.list_models())}")
    elif tag and name not in (tagged := timm.list_models(f"{architecture}.*", pretrained=True)):
        tags = [known.partition(".")[2] for known in tagged]
        problems.add(
            f"{architecture} has no tag {tag!r}{nearest(tag, tags)}; leave it out: no weights are fetched here"
        )
    for key in PRETRAINED:
        if kwargs.get(key):
            problems.add(
                f"{key}={kwargs[key]!r}: weights are not downloaded here; build the network with timm and pass it, "
                "or load the weights into this one"
            )
    problems.raise_if_any()
    kwargs = {key: value for key, value in kwargs.items() if key not in PRETRAINED}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(f"timm:{name} refuses {kwargs}: {error}") from error
    return attention.open_attention(model)


def _timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != TIMM:
            raise InputError(f"importing timm failed: {error}") from error
        raise InputError("timm is not installed: pip install 'robustcompress[timm]'") from None
    module: ModuleType = timm
    return module
