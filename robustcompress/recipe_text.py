"""The recipe that lies beside a result, as text; and what no recipe can say, said as such."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from robustcompress.data import TEACHER
from robustcompress.data.sources import NAMES
from robustcompress.untrusted import shown

MISSING = "MISSING: "
"""Begins a value in whose place a recipe cannot hold what the run had."""


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe as YAML, whose first lines say how to run it and what has to be given for that."""
    import yaml

    lines = ["How this result was made. On the CPU `robustcompress run recipe.yaml --out DIR` makes the same again."]
    wanted = list(missing(recipe))
    if wanted:
        lines.append("First give what no recipe can hold, with --set KEY=VALUE:")
        lines += [f"  {path}: {what}" for path, what in wanted]
    head = "".join(f"# {shown(' '.join(line.split(chr(10))), 500)}\n" for line in lines)
    plain = json.loads(json.dumps(recipe))
    text: str = yaml.safe_dump(plain, sort_keys=False, width=100, default_flow_style=None, allow_unicode=True)
    return head + text


def without_places(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe in whose values no directory of this machine is left, as a result keeps it."""
    value: dict[str, Any] = json.loads(json.dumps(recipe))
    data = value.get("data")
    if isinstance(data, dict):
        data.pop("root", None)
        if isinstance(source := data.get("source"), str) and source not in NAMES:
            data["source"] = missing_place("the directory with the images", source)
        if isinstance(extra := data.get("extra"), str):
            data["extra"] = missing_place("the file with more images", extra)
        if isinstance(label := data.get("pseudo_label"), str) and label != TEACHER:
            data["pseudo_label"] = missing_place("the result that labels them", label)
    teacher = value.get("teacher")
    if isinstance(teacher, str):
        value["teacher"] = missing_place("the result that teaches", teacher)
    elif isinstance(teacher, dict) and isinstance(teacher.get("weights"), str):
        teacher["weights"] = missing_place("the teacher's weights", teacher["weights"])
    for key, what in (("weights", "the first weights"), ("latency_table", "the other device's times")):
        if isinstance(place := value.get(key), str):
            value[key] = missing_place(what, place)
    strategy = value.get("strategy")
    if isinstance(strategy, dict) and isinstance(policy := strategy.get("policy"), str):
        strategy["policy"] = missing_place("the policy", policy)
    return value


def missing(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Where a recipe says that something is missing, as the path of the key, and what that is."""
    if isinstance(value, str) and value.startswith(MISSING):
        yield path, value.removeprefix(MISSING)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from missing(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from missing(item, f"{path}[{number}]")


def missing_place(what: str, place: str) -> str:
    """What stands in a recipe for a place of another machine."""
    return place if place.startswith(MISSING) else f"{MISSING}{what} ({Path(place).name})"
