"""Where a result comes from, and how to make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustcompress.data.sources import NAMES
from robustcompress.publish.markup import Html, facts, plain, section, tag
from robustcompress.publish.reading import pathless, short
from robustcompress.result import RESULT, CompressResult
from robustcompress.untrusted import read_json


def provenance(result: CompressResult, directory: Path | None) -> Html:
    """Data, seeds, versions, hardware, settings."""
    from robustcompress import __version__

    data, settings = result.data, result.settings
    sizes = ", ".join(f"{short(data[key])} {key}" for key in ("train", "val", "test") if key in data)
    report = result.report
    versions = settings.get("versions")
    return section(
        "provenance",
        "Provenance",
        facts(
            {
                "data": f"{plain(data['name'])} ({sizes})" if sizes else plain(data["name"]),
                "data, SHA-256": tag("code", plain(data["sha256"], 64)),
                "weights, SHA-256": _weights(directory),
                "images judged, SHA-256": tag("code", plain(report.images_sha256, 64)) if report is not None else None,
                "seed of the run": str(result.seed),
                "seed of the attacks": str(report.seed) if report is not None else None,
                "trained on": short(settings.get("device")),
                "versions": short(versions) if isinstance(versions, Mapping) else None,
                "training": short(settings.get("recipe")),
                "widths are multiples of": short(settings.get("round_to")),
                "began with given weights": short(settings.get("pretrained")),
                "this page": f"written by robustcompress {__version__} from the saved record; accuracies are the "
                "record's, and were not measured again for it unless it says so",
            }
        ),
    )


def _weights(directory: Path | None) -> Html | None:
    """The hash that the saved record gives its weights; `load` has compared it with the file."""
    path = None if directory is None else directory / RESULT
    if path is None or not path.is_file():
        return None
    try:
        found = read_json(path).get("weights_sha256")
    except (OSError, ValueError, AttributeError):
        return None
    return tag("code", plain(found, 64)) if found is not None else None


def reproduction(result: CompressResult, name: str) -> Html:
    """A recipe that makes the result again, or why there is none; and how to judge it again."""
    yaml, missing = recipe_of(result), obstacles(result)
    parts = [
        tag("p", "Save as ", tag("code", "recipe.yaml"), ", then:"),
        tag("pre", tag("code", "robustcompress run recipe.yaml --out again"), tabindex="0"),
        tag("pre", tag("code", yaml), tabindex="0"),
        tag("p", "The data are the same when their SHA-256 is that of the provenance above."),
    ]
    known = result.data["name"] in NAMES
    where = "" if result.data["name"] == "digits" else f" --data {result.data['name'] if known else 'DIR'}"
    again = plain(f"robustcompress evaluate {shlex.quote(name)}{where} --attacks clean,fgsm,pgd-20,autoattack", 1000)
    return section(
        "reproduce",
        "How to make it again",
        [tag("p", what, class_="note") for what in missing],
        parts if yaml else None,
        tag("p", "To judge the saved network again:"),
        tag("pre", tag("code", again), tabindex="0"),
    )


def obstacles(result: CompressResult) -> list[str]:
    """What a recipe cannot say, a sentence each."""
    found = []
    if result.spec is None or result.spec.imports_code:
        found.append(
            "The reference is a network of the author's own, which a recipe cannot name: it takes the author's code."
        )
    if result.settings.get("pretrained"):
        found.append("The reference began with given weights, which a recipe cannot name.")
    if result.data["name"] not in NAMES:
        found.append("The data are the author's own: name their directory under data.")
    return found


def recipe_of(result: CompressResult) -> str:
    """The result's settings as a recipe for `robustcompress run`; "" where its reference cannot be named in one.

    What the run itself recorded is preferred. Otherwise the recipe is put together from the settings, with the data
    drawn by the seed of the run, as `robustcompress compress` does.
    """
    import yaml

    if result.spec is None or result.spec.imports_code:
        return ""
    recorded = result.settings.get("run")
    if isinstance(recorded, Mapping):
        value: dict[str, Any] = dict(recorded)
    else:
        value = {
            "model": {"name": result.spec.name, **result.spec.to_json()["kwargs"]},
            "strategy": dict(result.strategy),
            "data": _data(result),
            "budget": dict(result.budget),
            "threat": {"norm": result.threat.norm, "eps": result.threat.eps, "bounds": list(result.threat.bounds)},
            "objective": result.settings.get("objective"),
            "finetune": result.settings.get("finetune"),
            "teacher": _teacher(result),
            "training": result.settings.get("recipe"),
            "evaluate": _evaluation(result),
            "epochs": result.settings.get("epochs"),
            "round_to": result.settings.get("round_to"),
            "seed": result.seed,
        }
    kept = {key: item for key, item in value.items() if item is not None and item != ""}
    try:
        said = yaml.safe_dump(
            json.loads(json.dumps(pathless(kept))), sort_keys=False, width=100, default_flow_style=None
        )
    except (TypeError, ValueError, RecursionError):
        return ""
    return plain(said, 20_000)


def _data(result: CompressResult) -> dict[str, Any]:
    data = result.data
    found: dict[str, Any] = {"source": data["name"] if data["name"] in NAMES else "DIR", "seed": result.seed}
    train, val, test = (data.get(key) for key in ("train", "val", "test"))
    if isinstance(train, int) and isinstance(val, int):
        found["train_limit"] = train + val  # as many as there were, or fewer
    if isinstance(test, int) and test > 0:
        found["test_limit"] = test
    if result.image_shape[1] != 32:
        found["image_size"] = result.image_shape[1]
    extra = data.get("extra")
    if isinstance(extra, Mapping):
        found |= {"extra": extra.get("name"), "extra_ratio": extra.get("ratio")}
        if (by := extra.get("labels")) != "file":
            found["pseudo_label"] = "teacher" if by == "teacher" else "DIR"
    return found


def _teacher(result: CompressResult) -> str | None:
    """A place to fill in, where somebody else than the reference taught."""
    told = result.settings.get("teacher")
    return "DIR" if isinstance(told, Mapping) and told.get("source") != "reference" else None


def _evaluation(result: CompressResult) -> dict[str, Any] | None:
    if result.report is None:
        return None
    found: dict[str, Any] = {
        "attacks": [attack.name for attack in result.report.attacks],
        "images": result.report.n,
    }
    for attack in result.report.attacks:
        if attack.name == "autoattack":
            found["autoattack_images"] = attack.n
    return found
