"""What a call of `compress()` depends on, as the recipe that makes the same again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from robustcompress.checkpoint import fingerprint
from robustcompress.recipe_text import MISSING, missing_place, without_places
from robustcompress.resolve import Request, epochs_for


def recipe_of_request(request: Request) -> dict[str, Any]:
    """The recipe of a call of `compress()`, before it is carried out: plain data, as `RunRecipe.from_mapping` reads it.

    What cannot be said (a network or images given as objects), and what is a place on this machine, is a text that
    begins with `MISSING`: a result may be sent to others.
    """
    value: dict[str, Any] = {
        "model": _model(request),
        "strategy": _strategy(request),
        "data": _data(request),
        "budget": request.budget.to_json(),
        "threat": request.threat.to_json(),
        "objective": request.objective.to_json(),
        "training": request.recipe.to_json(),
        "evaluate": {
            "attacks": [spec.name for spec in request.attacks],
            "images": request.test_images,
            "autoattack_images": None,
            "curve": [],
            "curve_images": None,
            "certify": None,
        },
        "epochs": request.epochs or epochs_for(request.data),
        "round_to": request.round_to,
        "seed": request.seed,
        "about": "",
    }
    if request.finetune is not None:
        value["finetune"] = request.finetune.to_json()
    if request.teacher is not None:
        value["teacher"] = f"{MISSING}who taught ({_short(request.teacher.told)}): the directory of a saved result"
    if request.pretrained:
        value["pretrained"] = True
    if not _fresh(request):
        value["weights"] = f"{MISSING}a safetensors file of the weights that the network began with; null for new ones"
    if request.latency_table is not None:
        value["latency_table"] = f"{MISSING}the times.json with the SHA-256 {request.latency_table.sha256}"
    parsed: dict[str, Any] = json.loads(json.dumps(value))
    return parsed


def _model(request: Request) -> Any:
    spec = request.spec
    if spec is None:
        return f"{MISSING}a network of the author's own, given as an object ({type(request.model).__name__})"
    if spec.imports_code:
        return f"{MISSING}a network of the author's own ({spec.name}), whose code a recipe does not import"
    return spec.to_json()


def _strategy(request: Request) -> Any:
    options = request.strategy.to_json()
    if isinstance(policy := options.get("policy"), str):
        return options | {"policy": missing_place("the policy", policy)}
    return options


def _data(request: Request) -> Any:
    asked = request.data.asked
    if asked is None:
        return {"source": f"{MISSING}images that were given as objects, with the SHA-256 {request.data.sha256}"}
    return without_places({"data": dict(asked)})["data"]


def _fresh(request: Request) -> bool:
    """Whether the network began with the weights that its factory gives it under the run's seed."""
    spec = request.spec
    if spec is None or spec.imports_code:
        return not request.pretrained  # then the network is what is missing
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        twin = spec.build().float()
    return fingerprint(twin)["initial weights"] == fingerprint(request.model)["initial weights"]


def _short(told: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in told.items() if isinstance(value, str))
