"""Damage: bytes, plain data, and the formats that are made of them, spoilt by chance and by people who know them.

Every function takes a `random.Random`, so that a case is its seed and its number.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

DEEP, GREAT = "@deep@", "@great@"
"""Stand in a tree for what Python itself could not write: 10,000 levels, and a number of 5,000 digits."""

NAMES = ("../../etc/passwd", "/etc/passwd", "..", "", ".", "a/b", "con\x00trol", "\x1b]0;title\x07\x1b[2J", "\ud800")
NUMBERS = (0, -1, 1, 3, 2**31, 2**63, 10**15, -(10**18), 10**400, 1e308, -0.0, 5e-324)
STRANGE = (None, True, False, "", "x", [], {}, [[]], {"a": 1}, ["x"], [1, 2], [None], "NaN", "1e400", "8/255")


def some_bytes(rng: Random, content: bytes) -> bytes:
    """Damage as disks, transfers and blind fuzzers do it."""
    size = len(content)
    at = rng.randrange(size + 1)
    span = rng.choice((1, 2, 8, 64, max(1, size // 3)))
    kind = rng.randrange(9)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.randbytes(span) + content[at:]
    if kind == 2:
        return content[:at] + content[at + span :]
    if kind == 3:
        return content[:at] + bytes(min(span, size - at)) + content[at + span :]
    if kind == 4:
        return content[: at + span] + content[at:]
    if kind == 5:
        return rng.choice((b"", b"\x00" * 4096, b"\xff" * 64, content[::-1], b"PK\x03\x04", b"\x80\x04cos\nsystem\n."))
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 32)) if size else 0):
        place = rng.randrange(size)
        changed[place] = changed[place] ^ (1 << rng.randrange(8)) if kind < 8 else rng.randrange(256)
    return bytes(changed)


def anything(rng: Random) -> Any:
    """A value that nobody expects."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(NAMES)
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice((float("nan"), float("inf"), -float("inf"), GREAT))
    if kind == 4:
        return rng.choice(
            ("A" * 200_000, "{" * 50, "%s%n{0.__class__}", [0] * 20_000, {str(n): n for n in range(3000)})
        )
    return DEEP if kind == 5 and rng.random() < 0.5 else copy.deepcopy(rng.choice(STRANGE))


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a tree."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += paths(item, (*path, key))
    return found


def tree(rng: Random, value: Any) -> Any:
    """Plain data with one to three changes, of keys, of values or of structure."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = paths(value)
        if not places or rng.random() < 0.01:
            return anything(rng)
        path = rng.choice(places)
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        _change(rng, owner, path[-1])
    return value


def _change(rng: Random, owner: Any, key: Any) -> None:
    item, kind = owner[key], rng.randrange(8)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice((f"{key}x", str(key)[:-1], "__class__", *NAMES))] = owner.pop(key)
    elif kind == 1:
        owner.extend([item] * rng.choice((1, 5, 2000)))
    elif kind == 2 and isinstance(owner, dict):
        owner[rng.choice(("extra", "name", "format", *NAMES))] = anything(rng)
    elif kind == 3:
        owner[key] = rng.choice(([item], {"a": item}, str(item), [item, item]))
    elif kind == 4 and isinstance(item, int | float):
        owner[key] = rng.choice((item + 1, -item, item * 10**6, f"{item}", [item], -item - 1))
    elif kind == 4 and isinstance(item, str):
        owner[key] = rng.choice((item.upper(), item + "x", item[:-1], item * 1000, f" {item}", f"../{item}"))
    else:
        owner[key] = anything(rng)


def dumps(value: Any) -> str:
    """JSON as careless or hostile programs write it: NaN, endless nesting, numbers without end."""
    text = json.dumps(value)
    return text.replace(f'"{DEEP}"', "[" * 10_000 + "]" * 10_000).replace(f'"{GREAT}"', "9" * 5000)


def json_file(rng: Random, path: Path) -> str:
    """Damage a JSON file: mostly what it says, sometimes its bytes."""
    if rng.random() < 0.2:
        path.write_bytes(some_bytes(rng, path.read_bytes()))
        return f"bytes of {path.name}"
    text = dumps(tree(rng, json.loads(path.read_text())))
    if rng.random() < 0.03:  # a key twice
        text = text[:-1] + ", " + text[1:]
    path.write_text(text)
    return f"values of {path.name}"


def tensors_file(rng: Random, path: Path) -> str:
    """Damage a safetensors file: its header, or its bytes."""
    content = path.read_bytes()
    kind = rng.randrange(6)
    if kind == 0:
        path.write_bytes(some_bytes(rng, content))
        return f"bytes of {path.name}"
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    if kind == 1:
        entry["shape"] = rng.choice(([2**40], [2**32, 2**32], [], [0], [-1], [1, *entry["shape"]], [2**63, 0]))
    elif kind == 2:
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "C64", "F8_E5M2", "X", 3, None))
        if rng.random() < 0.5 and entry["dtype"] in ("I64", "F64"):
            entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // 8]
    elif kind == 3:
        start, stop = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([0, stop], [stop, start], [start, 2**60], [-8, 0], [start], [start, stop + 4])
        )
    elif kind == 4:
        other = rng.choice(names)
        header[rng.choice((*NAMES, other + "x", "__metadata__"))] = header.pop(other)
    else:
        header = tree(rng, header)
    said = dumps(header).encode("utf-8", "surrogatepass")
    wrong = rng.choice((len(said),) * 6 + (0, 2**40, len(content)))
    path.write_bytes(struct.pack("<Q", wrong) + said + body)
    return f"header of {path.name}"


def sha256(path: Path) -> str:
    """With it, damage passes for what was saved."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bomb() -> str:
    """A hundred bytes a line, and a billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(lines)


def merge_bomb() -> str:
    """The same by merged mappings."""
    lines = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    return "\n".join(lines)


HOSTILE_YAML: tuple[Callable[[], str], ...] = (
    bomb,
    merge_bomb,
    lambda: "model: !!python/object/apply:os.system ['touch owned']",
    lambda: "model: !!python/name:os.system",
    lambda: "strategy: !!binary aGVsbG8=",
    lambda: "about: 2001-12-14t21:59:43.10-05:00",
    lambda: "data: !!set {a, b}",
    lambda: "budget: &a {macs: *a}",
    lambda: "budget: &a [*a]",
    lambda: "model: " + "[" * 10_000,
    lambda: "model: " + "{a: " * 3000,
    lambda: "epochs: " + "9" * 6000,
    lambda: "seed: 1\nseed: 2",
    lambda: "? [a, b]\n: c",
    lambda: "1: 2",
    lambda: "--- {}\n--- {}",
    lambda: "about: |\n" + "  long\n" * 100_000,
    lambda: "\x00",
    lambda: 'about: "\\x1b[2J"',
    lambda: "budget: {macs: .nan}",
    lambda: "threat: {eps: .inf}",
    lambda: "training: {lr: 1e400}",
    lambda: "%YAML 9.9\n---\nseed: 1",
)


def yaml_file(rng: Random, path: Path) -> str:
    """Damage a recipe: its values, its lines, its bytes, or add what YAML is feared for."""
    import yaml

    text = path.read_text()
    kind = rng.randrange(6)
    if kind == 0:
        path.write_bytes(some_bytes(rng, path.read_bytes()))
        return "bytes of a recipe"
    if kind == 1:
        path.write_text(text + "\n" + rng.choice(HOSTILE_YAML)() + "\n")
        return "hostile YAML"
    if kind == 2:
        lines = text.splitlines()
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[at] = rng.choice((lines[other], "  " + lines[at], lines[at].strip(), "", lines[at] + ": x", "\t"))
        path.write_text("\n".join(lines))
        return "lines of a recipe"
    path.write_bytes(dumps(tree(rng, yaml.safe_load(text))).encode("utf-8", "surrogatepass"))  # JSON is YAML
    return "values of a recipe"
