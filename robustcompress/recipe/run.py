"""`RunRecipe`: one run, from data to AutoAttack."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.api import carry_out
from robustcompress.budget import Budget
from robustcompress.certify import CertificateReport, certify
from robustcompress.data import DataSplits, load_data
from robustcompress.errors import InputError, Problems, nearest
from robustcompress.models import ModelSpec
from robustcompress.recipe.plain import read_yaml
from robustcompress.recipe.reading import READERS, Evaluation
from robustcompress.recipe_text import missing
from robustcompress.resolve import Request, resolve
from robustcompress.result import CompressResult
from robustcompress.robust import RobustReport, ThreatModel, evaluate
from robustcompress.robust.objectives import PGDAT, Objective
from robustcompress.strategies import Strategy
from robustcompress.train import Recipe
from robustcompress.untrusted import load_state, read_tensors


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
        finetune: Loss of the fine-tuning after a cut; None for the objective.
        teacher: Whom a distillation learns from: the directory of a result, or a model and its safetensors file.
        weights: Safetensors file of the weights that the network begins with; None for new ones.
        pretrained: Whether those are robust already: pruning strategies skip their pretraining.
        latency_table: Times that another device measured (`times.json`), for a limit on latency.
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
    finetune: Objective | None = None
    teacher: str | tuple[ModelSpec, str] | None = None
    weights: str | None = None
    pretrained: bool = False
    latency_table: str | None = None
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
        value = read_yaml(path)
        try:
            return cls.from_mapping(value)
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
        wanted = list(missing(value))
        for path, what in wanted:
            problems.add(f"{path} is missing: {what}; give it with --set {path}=VALUE")
        if wanted:
            problems.raise_if_any()
        for key in ("model", "strategy"):
            if value.get(key) is None:
                problems.add(f"key {key!r} is missing")
        made: dict[str, Any] = {}
        for key, make in READERS.items():
            if value.get(key) is not None:
                made[key] = problems.attempt(lambda make=make, key=key: make(value[key]), also=(TypeError,))  # type: ignore[misc]
        for key, kinds, kind in (
            ("epochs", (int, float), "a number"),
            ("round_to", (int,), "a whole number"),
            ("seed", (int,), "a whole number"),
            ("about", (str,), "a text"),
            ("weights", (str,), "the name of a safetensors file"),
            ("latency_table", (str,), "the name of a times.json"),
            ("pretrained", (bool,), "true or false"),
        ):
            found = value.get(key)
            if found is not None and (isinstance(found, bool) is not (bool in kinds) or not isinstance(found, kinds)):
                problems.add(f"{key}={found!r}: must be {kind}")
            elif found is not None:
                made[key] = found
        judged, threat = made.get("evaluate"), made.get("threat")
        if judged is not None and judged.certify is not None and threat is not None and threat.norm != "linf":
            method = judged.certify.get("method", "smoothing")
            if method != "smoothing" and judged.certify.get("eps") is None:
                problems.add(f"evaluate.certify: method {method!r} needs an eps, as the threat is {threat.label()}")
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
        for key in ("weights", "latency_table"):
            if getattr(self, key) is not None:
                value[key] = getattr(self, key)
        if self.pretrained:
            value["pretrained"] = True
        if self.finetune is not None:
            value["finetune"] = self.finetune.to_json()
        if isinstance(self.teacher, tuple):
            value["teacher"] = {"model": self.teacher[0].to_json(), "weights": self.teacher[1]}
        elif self.teacher is not None:
            value["teacher"] = self.teacher
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
        started, progress = time.monotonic(), options.pop("progress", True)
        return carry_out(self.request(data, **options), progress=progress, started=started)

    def request(self, data: DataSplits | None = None, **options: Any) -> Request:
        """What `run` carries out, checked.

        Args:
            data: As for `run`.
            options: Further arguments of `compress()` but `progress`.

        Raises:
            InputError: Listing all that cannot work.
        """
        data = data or self.load_data()
        spec = ModelSpec(self.model.name, {"num_classes": data.num_classes, **self.model.kwargs})
        given: dict[str, Any] = {"device": "auto", "out": None, "test_images": 1000} | options
        return resolve(
            model=spec if self.weights is None else self._begun(spec),
            strategy=self.strategy,
            data=data,
            budget=self.budget,
            threat=self.threat,
            objective=self.objective,
            finetune=self.finetune,
            teacher=self.teacher,
            pretrained=self.pretrained,
            latency_table=self.latency_table,
            epochs=self.epochs,
            recipe=self.training,
            round_to=self.round_to,
            attacks=(),
            seed=self.seed,
            **given,
        )

    def _begun(self, spec: ModelSpec) -> nn.Module:
        """The network with the weights of the file."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = spec.build()
        try:
            load_state(model, read_tensors(Path(str(self.weights))))
        except (OSError, ValueError) as error:
            raise InputError(
                f"weights={self.weights!r} cannot be used ({error}): give {spec.name}'s state_dict as safetensors"
            ) from error
        return model

    def judge(self, result: CompressResult, data: DataSplits, **options: Any) -> RobustReport:
        """Attack the test images as the recipe says, and its budget; `options` go to `evaluate()`."""
        judged, demand = self.evaluate, self.budget.demand
        extra = () if demand is None or demand.attack in judged.attacks else (demand.attack,)
        return evaluate(
            result.model,
            data.test,
            self.threat,
            attacks=(*judged.attacks, *extra),
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

    def certify(self, result: CompressResult, data: DataSplits, **options: Any) -> CertificateReport | None:
        """Prove of the test images what the recipe asks for; None where it asks for nothing.

        Args:
            result: What `run` returned.
            data: Its test images are taken.
            options: Go to `certify()`.
        """
        if self.evaluate.certify is None:
            return None
        asked = {key: value for key, value in self.evaluate.certify.items() if value is not None}
        return certify(result, data, max_images=asked.pop("images", None), **asked, **options)
