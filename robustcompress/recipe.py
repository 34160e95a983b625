"""Runs as YAML: one file says everything that a run depends on, and nothing in it can name code to call."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from robustcompress.api import compress
from robustcompress.budget import Budget
from robustcompress.data import DataSplits, load_data
from robustcompress.errors import InputError, Problems, RobustCompressError, nearest
from robustcompress.models import ModelSpec
from robustcompress.result import CompressResult
from robustcompress.robust import RobustReport, ThreatModel, attack_by_name, evaluate
from robustcompress.robust.objectives import PGDAT, Objective, objective_from_json
from robustcompress.strategies import Strategy, make_strategy
from robustcompress.train import Recipe

DATA_KEYS = ("source", "root", "image_size", "train_limit", "test_limit", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How the compact network is judged.

    Attributes:
        attacks: Names, as `attack_by_name` reads them.
        images: Test images that are attacked; None for all.
        autoattack_images: How many of those AutoAttack judges; None for all.
        curve: Radii of the security curve, each attacked by PGD-20; none by default.
        curve_images: Test images of the curve; None for as many as `images`.
    """

    attacks: tuple[str, ...] = ("clean", "pgd-20", "autoattack")
    images: int | None = None
    autoattack_images: int | None = None
    curve: tuple[float, ...] = ()
    curve_images: int | None = None

    def __post_init__(self) -> None:
        problems = Problems("the evaluation cannot be run")
        for name in self.attacks:
            _attempt(problems, lambda name=name: attack_by_name(name))  # type: ignore[misc]
        for key in ("images", "autoattack_images", "curve_images"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                problems.add(f"{key}={value!r}: must be a positive whole number, or null for all")
        problems.raise_if_any()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecipe:
    """One run: the arguments of `compress()`, and how its result is judged.

    Attributes:
        model: The reference.
        strategy: How to compress.
        data: Arguments of `load_data`.
        budget: What the result may cost.
        threat: What it must withstand.
        objective: Loss of every phase.
        training: Optimizer, learning rate, averaging and the like.
        evaluate: How the result is judged.
        epochs: Passes over the training images; None for the default.
        round_to: Multiple of which widths are; None for the default.
        seed: Seeds weights and training.
        about: What the run is for, in a sentence.
    """

    model: ModelSpec
    strategy: Strategy
    data: Mapping[str, Any] = field(default_factory=lambda: {"source": "digits"})
    budget: Budget = Budget(macs=0.5)
    threat: ThreatModel = ThreatModel("linf", 8 / 255)
    objective: Objective = field(default_factory=PGDAT)
    training: Recipe = field(default_factory=Recipe)
    evaluate: Evaluation = field(default_factory=Evaluation)
    epochs: float | None = None
    round_to: int | None = None
    seed: int = 0
    about: str = ""

    @classmethod
    def read(cls, path: str | Path) -> RunRecipe:
        """Read a YAML file.

        Raises:
            InputError: It cannot be read, or says something that does not exist; everything wrong is listed.
        """
        try:
            return cls.from_mapping(read_yaml(path))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any]) -> RunRecipe:
        """Build a recipe from plain data: what a YAML file holds, or `to_json` wrote.

        Raises:
            InputError: Listing all that is wrong, with the nearest name for every unknown one.
        """
        problems = Problems("the recipe cannot be used")
        known = [entry.name for entry in fields(cls)]
        for key in value:
            if key not in known:
                problems.add(f"key {key!r} does not exist{nearest(str(key), known)}")
        for key in ("model", "strategy"):
            if value.get(key) is None:
                problems.add(f"key {key!r} is missing")
        made: dict[str, Any] = {}
        for key, make in _READERS.items():
            if value.get(key) is not None:
                made[key] = _attempt(problems, lambda make=make, key=key: make(value[key]))  # type: ignore[misc]
        for key, kinds, kind in (
            ("epochs", (int, float), "a number"),
            ("round_to", (int,), "a whole number"),
            ("seed", (int,), "a whole number"),
            ("about", (str,), "a text"),
        ):
            found = value.get(key)
            if found is not None and (isinstance(found, bool) or not isinstance(found, kinds)):
                problems.add(f"{key}={found!r}: must be {kind}")
            elif found is not None:
                made[key] = found
        problems.raise_if_any()
        return cls(**made)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON, from which `from_mapping` makes an equal one."""
        value = {
            "model": self.model.to_json(),
            "strategy": self.strategy.to_json(),
            "data": dict(self.data),
            "budget": self.budget.to_json(),
            "threat": self.threat.to_json(),
            "objective": self.objective.to_json(),
            "training": self.training.to_json(),
            "evaluate": asdict(self.evaluate),
            "epochs": self.epochs,
            "round_to": self.round_to,
            "seed": self.seed,
            "about": self.about,
        }
        parsed: dict[str, Any] = json.loads(json.dumps(value))
        return parsed

    def load_data(self) -> DataSplits:
        """Load the images; the split is drawn by the data's own seed, so that runs with other seeds share it."""
        options = dict(self.data)
        return load_data(options.pop("source", None), **options)

    def run(self, data: DataSplits | None = None, **options: Any) -> CompressResult:
        """Compress, without a report (see `judge`).

        Args:
            data: What `load_data` returned, to load it once for many runs.
            options: Further arguments of `compress()`: device, out, progress, ...
        """
        data = data or self.load_data()
        spec = ModelSpec(self.model.name, {"num_classes": data.num_classes, **self.model.kwargs})
        return compress(
            spec,
            self.strategy,
            data=data,
            budget=self.budget,
            threat=self.threat,
            objective=self.objective,
            epochs=self.epochs,
            recipe=self.training,
            round_to=self.round_to,
            attacks=(),
            seed=self.seed,
            **options,
        )

    def judge(self, result: CompressResult, data: DataSplits, **options: Any) -> RobustReport:
        """Attack the test images as the recipe says; `options` go to `evaluate()`."""
        judged = self.evaluate
        return evaluate(
            result.model,
            data.test,
            self.threat,
            attacks=judged.attacks,
            max_images=judged.images,
            autoattack_images=judged.autoattack_images,
            **options,
        )

    def security_curve(self, result: CompressResult, data: DataSplits, **options: Any) -> list[dict[str, float]]:
        """PGD-20 accuracy at each radius of the curve: `{"eps", "n", "accuracy"}`; `options` go to `evaluate()`."""
        points = []
        for eps in self.evaluate.curve:
            threat = ThreatModel(self.threat.norm, eps)
            report = evaluate(
                result.model,
                data.test,
                threat,
                attacks=("clean", "pgd-20"),
                max_images=self.evaluate.curve_images or self.evaluate.images,
                **options,
            )
            found = report.result("pgd-20")
            points.append({"eps": eps, "n": found.n, "accuracy": found.accuracy})
        return points


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        InputError: There is no such file, it is no YAML, or it holds something else.
    """
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{path} must hold keys and values, such as 'model: resnet8'")
    return value


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `changes` over `base`, mapping by mapping; a mapping that names another thing replaces the whole."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        before = result.get(key)
        same = (
            isinstance(before, dict)
            and isinstance(value, Mapping)
            and value.get("name", ...)
            in (
                before.get("name"),
                ...,
            )
        )
        result[key] = merged(before, value) if same and isinstance(before, dict) else copy.deepcopy(value)
    return result


def _attempt(problems: Problems, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (RobustCompressError, TypeError) as error:
        problems.add(str(error))
        return None


def _named(value: Any, what: str) -> tuple[str, dict[str, Any]]:
    """A thing with options, written as its name or as a mapping with the key "name"."""
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise InputError(f"{what}={value!r}: give a name, or a mapping with 'name' and options")
    return value["name"], {key: option for key, option in value.items() if key != "name"}


def _model(value: Any) -> ModelSpec:
    name, options = _named(value, "model")
    nested = options.pop("kwargs", {})
    spec = ModelSpec(name, {**nested, **options})
    if spec.imports_code:
        raise InputError(f"model {name!r} would import code: a recipe names built-in or torchvision models only")
    _build(json.dumps(spec.to_json(), sort_keys=True))
    return spec


@functools.lru_cache(maxsize=64)
def _build(spec: str) -> None:
    """Build a model once to hear what is wrong with its arguments; a grid names the same one in every cell."""
    ModelSpec.from_json(json.loads(spec)).build()


def _strategy(value: Any) -> Strategy:
    name, options = _named(value, "strategy")
    return make_strategy(name, **options)


def _objective(value: Any) -> Objective:
    name, options = _named(value, "objective")
    return objective_from_json({"name": name, **{k: _fraction(v) for k, v in options.items()}})


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


def _evaluation(value: Any) -> Evaluation:
    options = _options(Evaluation, value, "evaluate")
    if isinstance(options.get("curve"), tuple):
        options["curve"] = tuple(_fraction(radius) for radius in options["curve"])
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


_READERS: dict[str, Callable[[Any], Any]] = {
    "model": _model,
    "strategy": _strategy,
    "data": _data,
    "budget": _budget,
    "threat": _threat,
    "objective": _objective,
    "training": lambda value: Recipe(**_options(Recipe, value, "training")),
    "evaluate": _evaluation,
}
