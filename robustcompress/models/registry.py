"""Models by name: built, and written down as plain data."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from robustcompress.errors import InputError, nearest
from robustcompress.models import attention, densenet, mobilenet, resnet, vgg, vit, wrn
from robustcompress.models.timm_models import PRETRAINED, TIMM, build_timm

Factory = Callable[..., nn.Module]

OURS = "robustcompress"
TORCHVISION = "torchvision"

BUILT_IN: dict[str, Factory] = {
    "resnet8": resnet.resnet8,
    "resnet20": resnet.resnet20,
    "resnet32": resnet.resnet32,
    "resnet44": resnet.resnet44,
    "resnet56": resnet.resnet56,
    "resnet18": resnet.resnet18,
    "preact_resnet18": resnet.preact_resnet18,
    "wrn_16_4": wrn.wrn_16_4,
    "wrn_28_4": wrn.wrn_28_4,
    "wrn_28_10": wrn.wrn_28_10,
    "vgg16_bn": vgg.vgg16_bn,
    "mobilenet_v2": mobilenet.mobilenet_v2,
    "densenet121": densenet.densenet121,
    "vit_tiny": vit.vit_tiny,
    "vit_micro": vit.vit_micro,
}

# These two have classifiers that only training uses unless told not to, and warn unless told how to initialise.
TORCHVISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A factory and its arguments: enough to build the same architecture again, without its weights.

    Attributes:
        name: `robustcompress:NAME`, `torchvision:NAME`, `timm:NAME` or `package.module:factory`.
        kwargs: Keyword arguments of the factory, plain JSON values.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def imports_code(self) -> bool:
        """Whether `build` imports a module that this package does not know (`package.module:factory`)."""
        return ":" in self.name and _split(self.name)[0] not in (OURS, TORCHVISION, TIMM)

    def build(self) -> nn.Module:
        """Return a new model with fresh weights.

        A spec read from a file that you do not trust can name any importable function: look at
        `imports_code` first.

        Raises:
            InputError: The name or an argument does not exist.
        """
        return build_model(self.name, **self.kwargs)[0]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `json.dump`."""
        kwargs = {key: list(v) if isinstance(v, tuple) else v for key, v in self.kwargs.items()}
        return {"name": self.name, "kwargs": kwargs}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelSpec:
        """Read back what `to_json` wrote.

        Raises:
            InputError: `value` is no such record.
        """
        name, kwargs = value.get("name"), value.get("kwargs", {})
        if not isinstance(name, str) or not isinstance(kwargs, dict) or set(value) - {"name", "kwargs"}:
            raise InputError(f"not a model record: {dict(value)!r}; expected {{'name': str, 'kwargs': dict}}")
        return cls(name, {key: tuple(v) if isinstance(v, list) else v for key, v in kwargs.items()})


def list_models() -> tuple[str, ...]:
    """Return the names of the built-in models."""
    return tuple(BUILT_IN)


def list_torchvision_models() -> tuple[str, ...]:
    """Return the names of torchvision's image classifiers (imports torchvision)."""
    import torchvision

    return tuple(torchvision.models.list_models(module=torchvision.models))


def build_model(name: str, *, num_classes: int | None = None, **kwargs: Any) -> tuple[nn.Module, ModelSpec]:
    """Build a model by name, with fresh weights.

    Args:
        name: A built-in name; a torchvision name (a name that both have, such as resnet18, is the built-in:
            write `torchvision:resnet18` for the other, `robustcompress:resnet18` to be explicit);
            `timm:resnet26`, where timm is installed; or `package.module:factory`, which imports that module, also
            from the working directory, and nothing else.
        num_classes: Number of logits. None leaves it to the factory. A factory without that argument is
            called without it.
        kwargs: Further arguments of the factory.

    Returns:
        The model, and the spec that builds it again.

    Raises:
        InputError: No such model or argument, and the nearest name is offered; or timm is not installed.
    """
    origin, bare = _split(name)
    if not origin:
        origin = OURS if name in BUILT_IN else TORCHVISION
        if origin == TORCHVISION and name not in list_torchvision_models():
            hint = nearest(name, [*BUILT_IN, *list_torchvision_models()])
            raise InputError(
                f"model {name!r} does not exist{hint}; built-in: {', '.join(BUILT_IN)}; "
                "further: any torchvision classifier, timm's as 'timm:NAME', or 'package.module:factory'"
            )
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    if origin == OURS:
        if bare not in BUILT_IN:
            raise InputError(f"built-in model {bare!r} does not exist{nearest(bare, BUILT_IN)}")
        model = _call(BUILT_IN[bare], name, kwargs)
        return model, _built_in_spec(model)
    if origin == TORCHVISION:
        if bare not in list_torchvision_models():
            raise InputError(f"torchvision has no classifier {bare!r}{nearest(bare, list_torchvision_models())}")
        if kwargs.get("weights") is not None:
            raise InputError(
                f"weights={kwargs['weights']!r}: weights are not downloaded here; load them into the model"
            )
        kwargs = TORCHVISION_DEFAULTS.get(bare, {}) | {key: v for key, v in kwargs.items() if key != "weights"}
        return build_torchvision(bare, kwargs), ModelSpec(f"{TORCHVISION}:{bare}", kwargs)
    if origin == TIMM:
        model = build_timm(bare, kwargs)
        return model, ModelSpec(name, {key: v for key, v in kwargs.items() if key not in PRETRAINED})
    with _working_directory_first():
        factory = _import_factory(origin, bare)
        parameters = inspect.signature(factory).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not takes_any and "num_classes" not in parameters:
            kwargs.pop("num_classes", None)
        return _call(factory, name, kwargs), ModelSpec(name, kwargs)


def _split(name: str) -> tuple[str, str]:
    """Where a model comes from, and its name there; one reading for building and for judging what building imports."""
    if name.count(":") > 1:
        raise InputError(
            f"model {name!r} has more than one colon; write 'torchvision:NAME', 'timm:NAME' or 'package.module:factory'"
        )
    origin, _, bare = name.rpartition(":")
    return origin, bare


def _built_in_spec(model: nn.Module) -> ModelSpec:
    name, kwargs = model.built_by  # type: ignore[misc]
    return ModelSpec(f"{OURS}:{name}", dict(kwargs))


def build_torchvision(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Build one of torchvision's classifiers without weights; InputError for an argument it does not take.

    Attention comes with heads that can be removed (see `open_attention`).
    """
    import torchvision

    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, **kwargs)
    except TypeError as error:
        raise InputError(f"torchvision:{name} refuses {kwargs}: {error}") from error
    return attention.open_attention(model)


def _call(factory: Factory, name: str, kwargs: dict[str, Any]) -> nn.Module:
    signature = inspect.signature(factory)
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        accepted = list(signature.parameters)
        unknown = [key for key in kwargs if key not in accepted]
        hint = nearest(unknown[0], accepted) if unknown else f" (it takes: {', '.join(accepted)})"
        raise InputError(f"model {name!r}: {error}{hint}") from None
    model = factory(**kwargs)
    if not isinstance(model, nn.Module):
        raise InputError(f"model {name!r} returned {type(model).__name__}, not an nn.Module")
    return model


def _import_factory(module_name: str, attribute: str) -> Factory:
    if "/" in module_name or module_name.endswith(".py"):
        dotted = module_name.removesuffix(".py").replace("/", ".").strip(".")
        raise InputError(f"{module_name!r} is a file; name its module: '{dotted}:{attribute}'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A package that the caller's own module fails to import is that module's error, not a wrong name.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"importing {module_name!r} failed: {error}") from error
        raise InputError(
            f"no module {module_name!r} is importable from here; a model is a built-in name, a torchvision "
            "name, 'timm:NAME' or 'package.module:factory' (install the package, or run where it lies)"
        ) from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        options = [key for key, v in vars(module).items() if callable(v) and not key.startswith("_")]
        raise InputError(f"module {module_name!r} has no factory {attribute!r}{nearest(attribute, options)}")
    checked: Factory = factory
    return checked


@contextlib.contextmanager
def _working_directory_first() -> Iterator[None]:
    # An installed console script has its own directory, not the working one, at the head of the path.
    here = os.getcwd()  # noqa: PTH109
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
