"""How each key of a recipe is read: strictly, and with the nearest name for every unknown one."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from robustcompress.bounded import check_model
from robustcompress.budget import Budget
from robustcompress.certify import checked_settings
from robustcompress.errors import InputError, Problems, ResultError, nearest
from robustcompress.models import ModelSpec
from robustcompress.robust import ThreatModel, attack_by_name
from robustcompress.robust.objectives import Objective, objective_from_json
from robustcompress.strategies import Strategy, make_strategy
from robustcompress.train import Recipe

CERTIFY_KEYS = ("method", "sigma", "n0", "n", "alpha", "eps", "images")
DATA_KEYS = (
    "source",
    "root",
    "image_size",
    "train_limit",
    "test_limit",
    "val_fraction",
    "seed",
    "extra",
    "extra_ratio",
    "pseudo_label",
    "stream",
    "workers",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How the compact network is judged.

    Attributes:
        attacks: Names, as `attack_by_name` reads them.
        images: Test images that are attacked; None for all.
        autoattack_images: How many of those AutoAttack judges; None for all.
        curve: Radii of the security curve, each attacked by PGD-20; none by default.
        curve_images: Test images of the curve; None for as many as `images`.
        certify: What is proven of it: arguments of `certify()` (method, sigma, n0, n, alpha, eps), and how many
            `images` (all by default); None for nothing. An eps that is not given is the threat's.
    """

    attacks: tuple[str, ...] = ("clean", "pgd-20", "autoattack")
    images: int | None = None
    autoattack_images: int | None = None
    curve: tuple[float, ...] = ()
    curve_images: int | None = None
    certify: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        problems = Problems("the evaluation cannot be run")
        for key in ("attacks", "curve"):
            if not isinstance(getattr(self, key), tuple):
                problems.add(f"{key}={getattr(self, key)!r}: must be a list")
        problems.raise_if_any()
        for name in self.attacks:
            problems.attempt(lambda name=name: attack_by_name(name))  # type: ignore[misc]
        if self.autoattack_images is not None and "autoattack" not in self.attacks:
            problems.add(f"autoattack_images={self.autoattack_images!r}: 'autoattack' is not among the attacks")
        for radius in self.curve:
            problems.attempt(lambda radius=radius: ThreatModel("linf", radius), also=(TypeError,))  # type: ignore[misc]
        for key in ("images", "autoattack_images", "curve_images"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                problems.add(f"{key}={value!r}: must be a positive whole number, or null for all")
        if self.certify is not None:
            _check_certify(self.certify, problems)
        problems.raise_if_any()


def _check_certify(options: object, problems: Problems) -> None:
    if not isinstance(options, Mapping):
        problems.add(f"certify={options!r}: give keys and values, such as {{method: smoothing, sigma: 0.25}}")
        return
    for key in options:
        if key not in CERTIFY_KEYS:
            problems.add(f"certify: key {key!r} does not exist{nearest(str(key), CERTIFY_KEYS)}")
    images = options.get("images")
    if images is not None and (not isinstance(images, int) or isinstance(images, bool) or images < 1):
        problems.add(f"certify: images={images!r}: must be a positive whole number, or null for all")
    given = {key: value for key, value in options.items() if key in CERTIFY_KEYS and key not in ("images", "method")}
    method = options.get("method", "smoothing")
    if method != "smoothing":
        given.setdefault("eps", 0.1)  # the threat's, which is not known here
    checked_settings(problems, method, **given)


def _named(value: Any, what: str) -> tuple[str, dict[str, Any]]:
    """A thing with options, written as its name or as a mapping with the key "name"."""
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise InputError(f"{what}={value!r}: give a name, or a mapping with 'name' and options")
    return value["name"], {key: option for key, option in value.items() if key != "name"}


_REFUSED = (
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    LookupError,
    AttributeError,
    ArithmeticError,
    MemoryError,
)
"""What torchvision's factories raise where they do not take an argument."""


def _model(value: Any) -> ModelSpec:
    name, options = _named(value, "model")
    nested = options.pop("kwargs", {})
    spec = ModelSpec(name, {**nested, **options})
    if spec.imports_code:
        raise InputError(
            f"model {name!r} would import code: a recipe names built-in models, torchvision's and timm's only"
        )
    _build(json.dumps(spec.to_json(), sort_keys=True))
    return spec


@functools.lru_cache(maxsize=64)
def _build(spec: str) -> None:
    """Build a model once to hear what is wrong with its arguments; a grid names the same one in every cell."""
    found = ModelSpec.from_json(json.loads(spec))
    try:
        check_model(found)
    except InputError:
        raise
    except (ResultError, *_REFUSED) as error:
        raise InputError(f"model {found.name!r} with {found.kwargs}: {error}") from error


def _strategy(value: Any) -> Strategy:
    name, options = _named(value, "strategy")
    return make_strategy(name, **options)


def _objective(value: Any, what: str = "objective") -> Objective:
    name, options = _named(value, what)
    read = {key: value if key == "hierarchy" else _fraction(value) for key, value in options.items()}
    return objective_from_json({"name": name, **read})


def _finetune(value: Any) -> Objective:
    return _objective(value, "finetune")


def _teacher(value: Any) -> str | tuple[ModelSpec, str]:
    """The directory of a result, or a mapping with a model and the file of its weights; read when the run begins."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, Mapping) or set(value) != {"model", "weights"} or not isinstance(value["weights"], str):
        raise InputError(
            f"teacher={value!r}: give the directory of a result, or a mapping with 'model' and 'weights' (a "
            "safetensors file)"
        )
    return _model(value["model"]), value["weights"]


def _threat(value: Any) -> ThreatModel:
    if isinstance(value, Mapping):
        options = {key: _fraction(option) if key == "eps" else option for key, option in value.items()}
        return ThreatModel(**_options(ThreatModel, options, "threat"))
    return ThreatModel("linf", _fraction(value))


def _budget(value: Any) -> Budget:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Budget(macs=value) if number else Budget(**_options(Budget, value, "budget"))


def _data(value: Any) -> dict[str, Any]:
    options = {"source": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        raise InputError(f"data={value!r}: give a name, a directory, or a mapping with 'source'")
    problems = Problems("data cannot be read")
    for key in options:
        if key not in DATA_KEYS:
            problems.add(f"key {key!r} does not exist{nearest(str(key), DATA_KEYS)}")
    problems.raise_if_any()
    return dict(options)


def _training(value: Any) -> Recipe:
    options, texts = _options(Recipe, value, "training"), ("optimizer", "augment", "bf16")
    return Recipe(**{key: option if key in texts else _number(option) for key, option in options.items()})


def _evaluation(value: Any) -> Evaluation:
    options = _options(Evaluation, value, "evaluate")
    if isinstance(options.get("curve"), tuple):
        options["curve"] = tuple(_fraction(radius) for radius in options["curve"])
    if isinstance(options.get("certify"), Mapping):
        options["certify"] = {
            key: option if key == "method" else _number(_fraction(option)) for key, option in options["certify"].items()
        }
    return Evaluation(**options)


def _options(kind: Any, value: Any, what: str) -> dict[str, Any]:
    """Arguments of a dataclass, with lists as tuples.

    Raises:
        InputError: It is no mapping, or holds a key that the dataclass does not have.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{what}={value!r}: give keys and values")
    known = [entry.name for entry in fields(kind)]
    problems = Problems(f"{what} cannot be used")
    for key in value:
        if key not in known:
            problems.add(f"key {key!r} does not exist{nearest(str(key), known)}")
    problems.raise_if_any()
    return {key: tuple(option) if isinstance(option, list) else option for key, option in value.items()}


def _fraction(value: Any) -> Any:
    """Read "8/255" as a number; leave everything else as it is."""
    above, slash, below = value.partition("/") if isinstance(value, str) else ("", "", "")
    try:
        return float(above) / float(below) if slash else value
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{value!r} is no number; write 8/255 or 0.03") from None


def _number(value: Any) -> Any:
    """Read "1e-3" as a number, which YAML takes for a text; leave everything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


READERS: dict[str, Callable[[Any], Any]] = {
    "model": _model,
    "strategy": _strategy,
    "data": _data,
    "budget": _budget,
    "threat": _threat,
    "objective": _objective,
    "finetune": _finetune,
    "teacher": _teacher,
    "training": _training,
    "evaluate": _evaluation,
}
