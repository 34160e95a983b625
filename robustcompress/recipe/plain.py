"""Recipes as plain data: read from YAML, and laid over each other."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustcompress.errors import InputError
from robustcompress.untrusted import check_plain, read_text

LARGEST = 1 << 17
"""Bytes of a recipe."""

MOST_VALUES = 10_000
"""Values in a recipe; a few aliases of aliases would make billions."""

NAMED = ("model", "strategy", "objective", "finetune")
"""Keys whose value is a name, or a mapping with a name and options."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        InputError: There is no such file, it is no YAML, or it holds something else.
    """
    try:
        value = parse_yaml(read_text(Path(path), LARGEST))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path} is no YAML of a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{path} must hold keys and values, such as 'model: resnet8'")
    return value


def parse_yaml(text: str) -> Any:
    """Read YAML that holds plain values: no tags, no key twice, and no more of them than a recipe has.

    Raises:
        ValueError: It is none.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice: of two wishes, one would be forgotten without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := [key for key, count in keys.items() if count > 1]:
                raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        value = loader.construct_document(node)
        check_plain(value)
    except (yaml.YAMLError, RecursionError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError("it is nested too deep" if isinstance(error, RecursionError) else str(error)) from error
    return value


def _count(node: Any, counts: dict[int, int]) -> int:
    """How many values a node comes to, each alias counted anew; ValueError where they are too many, or never end."""
    if counts.get(id(node)) == 0:
        raise ValueError("an alias stands within what it stands for")
    if id(node) not in counts:
        counts[id(node)] = 0
        parts = node.value if isinstance(node.value, list) else ()
        below = [part for item in parts for part in (item if isinstance(item, tuple) else (item,))]
        counts[id(node)] = 1 + sum(_count(part, counts) for part in below)
    if counts[id(node)] > MOST_VALUES:
        raise ValueError(f"it comes to more than {MOST_VALUES} values")
    return counts[id(node)]


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
