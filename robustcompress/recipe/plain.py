"""Recipes as plain data: read from YAML, and laid over each other."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustcompress.errors import InputError

NAMED = ("model", "strategy", "objective", "finetune")
"""Keys whose value is a name, or a mapping with a name and options."""


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
        if isinstance(before, str) and isinstance(value, Mapping) and "name" not in value and key in NAMED:
            before = {"name": before}  # "grape" is short for {name: grape}
        if (
            isinstance(before, dict)
            and isinstance(value, Mapping)
            and ("name" not in value or value["name"] == before.get("name"))
        ):
            result[key] = merged(before, value)
        else:
            result[key] = copy.deepcopy(value)
    return result
