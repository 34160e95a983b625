"""`robustcompress list`: every name that the other commands take."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from robustcompress.data import NAMES
from robustcompress.models import list_timm_models
from robustcompress.models.registry import BUILT_IN, list_torchvision_models
from robustcompress.models.timm_models import timm_is_installed
from robustcompress.robust.objectives import OBJECTIVES, PGDAT, PLUS, REGULARISERS, Objective, required_options
from robustcompress.strategies import STRATEGIES
from robustcompress.terminal import Output, table

NAME = "list"
SUMMARY = "list models, strategies, data sets, attacks and objectives"
DESCRIPTION = """\
List every name that the other commands take, with one line each; the networks of timm, which are many, where asked for:
`robustcompress list timm`."""
EXAMPLES = """\
examples:
  robustcompress list
  robustcompress list strategies
  robustcompress list models --json
  robustcompress list timm"""

ATTACKS = {
    "clean": "no attack",
    "fgsm": "one step along the sign of the gradient (Goodfellow et al. 2015)",
    "pgd-20": "20 projected steps from a random start (Madry et al. 2018); any number of steps",
    "pgd-10x5": "the same with 5 restarts",
    "pgd-20-margin": "the same on the margin between logits; also -kl",
    "apgd-fast": "short targeted APGD runs on what stands, 150 gradient passes an image at most; or apgd-fast-400",
    "autoattack": "APGD-CE, APGD-T, FAB-T and Square in turn (Croce and Hein 2020): robust accuracy proper, and slow",
}
DATA = {
    "digits": "scikit-learn's handwritten digits, 1,797 real images, embedded: nothing to fetch",
    "cifar10": "60,000 photos in 10 classes, 32x32",
    "cifar100": "60,000 photos in 100 classes, 32x32",
    "svhn": "99,289 house numbers, 32x32",
    "mnist": "70,000 handwritten digits, 28x28, shown as 32x32",
    "fashion_mnist": "70,000 pieces of clothing, 28x28, shown as 32x32",
}
DIRECTORY = "or a directory: train/ and test/ with a folder a class, or a folder a class directly"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("what", nargs="?", choices=(*LISTS, "timm"), help="one of these alone (default: all but timm)")


def run(arguments: argparse.Namespace) -> Output:
    """List what was asked for."""
    chosen = [arguments.what] if arguments.what else list(LISTS)
    found = {what: _timm() if what == "timm" else LISTS[what]() for what in chosen}
    parts: list[Any] = []
    for what, entries in found.items():
        rows = [(str(entry["name"]), _line(entry)) for entry in entries]
        parts.append(table(what, (what, "what it is"), rows, left=(what, "what it is")))
    return Output(document=found, parts=tuple(parts))


def _line(entry: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in entry.get("options", {}).items())
    return str(entry["summary"]) + (f"\noptions: {options}" if options else "")


def _models() -> list[dict[str, Any]]:
    entries = [{"name": name, "summary": _summary(factory)} for name, factory in BUILT_IN.items()]
    entries += [
        {"name": f"torchvision:{name}", "summary": "torchvision's, with fresh weights"}
        for name in list_torchvision_models()
    ]
    timm = "one of timm's: `robustcompress list timm`"
    missing = "" if timm_is_installed() else "; not installed: pip install 'robustcompress[timm]'"
    return [
        *entries,
        {"name": "timm:NAME", "summary": timm + missing},
        {"name": "package.module:factory", "summary": "a function of yours that returns an nn.Module"},
    ]


def _timm() -> list[dict[str, Any]]:
    return [{"name": f"timm:{name}", "summary": "timm's, with fresh weights"} for name in list_timm_models()]


def _strategies() -> list[dict[str, Any]]:
    return [
        {"name": name, "summary": _summary(kind), "direction": kind.direction, "options": _options(kind)}
        for name, kind in STRATEGIES.items()
    ]


def _objectives() -> list[dict[str, Any]]:
    kinds = OBJECTIVES.values()
    listed = [
        {"name": kind.name, "summary": _summary(kind), "options": _needs(kind) | _options(kind)} for kind in kinds
    ]
    for extra in REGULARISERS.values():
        options = {f"{extra.name}_{key}": value for key, value in _options(extra).items()}
        summary = f"any objective may be followed by this penalty: {_summary(extra)}"
        listed.append({"name": f"{PGDAT.name}{PLUS}{extra.name}", "summary": summary, "options": options})
    return listed


def _data() -> list[dict[str, Any]]:
    entries = [{"name": name, "summary": DATA[name]} for name in NAMES]
    return [*entries, {"name": "DIR", "summary": DIRECTORY}]


def _attacks() -> list[dict[str, Any]]:
    return [{"name": name, "summary": summary} for name, summary in ATTACKS.items()]


def _summary(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _options(kind: type) -> dict[str, Any]:
    if not is_dataclass(kind):
        return {}
    return {field.name: field.default for field in fields(kind) if field.default is not MISSING}


def _needs(kind: type[Objective]) -> dict[str, Any]:
    return {name: "(needed)" for name in required_options(kind)}


LISTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "models": _models,
    "strategies": _strategies,
    "data": _data,
    "attacks": _attacks,
    "objectives": _objectives,
}
