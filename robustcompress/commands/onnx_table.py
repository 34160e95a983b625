"""An ONNX file as tables for the terminal; part of `robustcompress inspect`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustcompress.artefact.describe import OnnxDescription, describe_onnx
from robustcompress.budget import human
from robustcompress.terminal import Output, table

_SHOWN = 12  # types of nodes; large networks have few more


def inspect_onnx(path: Path) -> Output:
    """Describe a file."""
    file = describe_onnx(path)
    parts: list[Any] = [table(str(path), ("what", "value"), _rows(file), left=("what", "value"))]
    rows = _accuracies(file.metadata)
    if rows:
        columns = ("attack", "accuracy %", "95 % interval", "n", "of", "suite")
        parts.append(table("Accuracies that it states", columns, rows, left=("attack", "of", "suite")))
    elif file.metadata:
        parts.append("it states no accuracy: evaluate the result, or the file, before you rely on it")
    return Output(document=file.to_json(), parts=tuple(parts))


def _rows(file: OnnxDescription) -> list[tuple[str, str]]:
    said = file.metadata
    frequent = [f"{count} {kind}" for kind, count in list(file.nodes.items())[:_SHOWN]]
    if len(file.nodes) > _SHOWN:
        frequent.append(f"{sum(list(file.nodes.values())[_SHOWN:])} others")
    data = f" (with {', '.join(file.data)})" if file.data else ""
    rows = [
        ("input", "; ".join(file.inputs)),
        ("output", "; ".join(file.outputs)),
        ("opset", f"{file.opset}" + "".join(f", and {domain}" for domain in file.domains)),
        ("size", f"{human(file.bytes)}B{data}"),
        ("nodes", f"{sum(file.nodes.values())}: {', '.join(frequent)}"),
        ("precision", file.precision),
        ("numbers", ", ".join(f"{human(count)} {kind}" for kind, count in file.weights.items())),
        ("zeros", f"{100 * file.zeros:.1f} % of matrices and kernels"),
        ("pixels", _pixels(said)),
        ("classes", _classes(said.get("classes"))),
        ("threat", _threat(said.get("threat"))),
        ("strategy", _named(said.get("strategy"))),
        ("costs", _costs(said)),
        ("data", _named(said.get("data"))),
        ("weights", str(said.get("weights", ""))),
        ("calibration", _calibration(said.get("quantization"))),
        ("versions", ", ".join(f"{what} {said[key]}" for what, key in _VERSIONS if key in said)),
        ("written by", file.producer),
        ("also says", "; ".join(f"{key} = {value[:60]}" for key, value in file.foreign.items())),
    ]
    return [(what, value) for what, value in rows if value]


_VERSIONS = (("robustcompress", "version"), ("torch", "torch"), ("onnx", "onnx"))


def _pixels(said: Mapping[str, Any]) -> str:
    if "layout" not in said:
        return ""
    kind = f"{said['layout']}, {said.get('input_range', '?')}, normalised {said.get('normalisation', '?')}"
    return kind if said.get("resize", "none") == "none" else f"{kind}; resized inside: {said['resize']}"


def _classes(names: Any) -> str:
    if not isinstance(names, list):
        return ""
    return f"{len(names)}: {', '.join(str(name) for name in names[:10])}{', ...' if len(names) > 10 else ''}"


def _threat(threat: Any) -> str:
    return str(threat.get("label", threat)) if isinstance(threat, dict) else ""


def _named(record: Any) -> str:
    if not isinstance(record, dict):
        return "" if record is None else str(record)[:60]
    options = ", ".join(f"{key}={str(value)[:16]}" for key, value in list(record.items())[:6] if key != "name")
    return f"{record.get('name', '?')}{f' ({options})' if options else ''}"


def _costs(said: Mapping[str, Any]) -> str:
    before, after = (said.get(f"cost_{when}") for when in ("before", "after"))
    if not isinstance(after, dict) or not isinstance(before, dict):
        return ""
    pairs = [
        f"{human(after[key])} {what} (of {human(before[key])})"
        for key, what in (("macs", "MACs"), ("params", "parameters"))
        if isinstance(after.get(key), int) and isinstance(before.get(key), int)
    ]
    return ", ".join(pairs)


def _calibration(record: Any) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("calibration"), dict):
        return ""
    told = record["calibration"]
    said = f"{record.get('to')} for {record.get('target')}, {told.get('images')} {told.get('kind')} images"
    said += f" of {told.get('data')}" + (f", {told['method']}" if "method" in told else "")
    kept = record.get("kept_float") or []
    return said + (f"; float stay {', '.join(str(name) for name in kept)}" if kept else "")


def _accuracies(said: Mapping[str, Any]) -> list[tuple[str, ...]]:
    smaller = said.get("precision", "float32") != "float32"
    rows: list[tuple[str, ...]] = []
    for key, of in (("accuracy", "this file" if smaller else "the network"), ("accuracy_float", "the float network")):
        for record in said.get(key) or ():
            try:
                interval = f"{100 * record['low']:.1f} to {100 * record['high']:.1f}"
                suite = record.get("suite") or ""
                suite = suite if isinstance(suite, str) else json.dumps(suite)[:60]
                rows.append(
                    (str(record["attack"]), f"{100 * record['accuracy']:.2f}", interval, str(record["n"]), of, suite)
                )
            except (KeyError, TypeError, AttributeError):  # somebody else's record
                continue
    return rows
