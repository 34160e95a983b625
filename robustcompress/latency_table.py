"""Latency of another device: networks to be timed there, and what came back."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.budget import human, measure
from robustcompress.durable import draft_of, ground
from robustcompress.errors import InputError, Problems
from robustcompress.export import export_onnx
from robustcompress.export.timing import Stopwatch
from robustcompress.latency import LatencyModel, Layer, fit, layers_of, sample_widths
from robustcompress.latency import measure as script
from robustcompress.reach import default_rounding
from robustcompress.robust.attacks import eval_mode
from robustcompress.shapes import Widths, floor_widths, steps_of
from robustcompress.structure import StructuralEditor
from robustcompress.untrusted import parse_json, read_text

NETWORKS = 20
"""How many networks are written by default: as many as a limit on latency has measured on the own machine."""

LEAST = 6
"""With fewer there is nothing to leave out while a fit is judged."""

FILES = "networks.json"

_LARGEST = 1 << 24  # bytes of such a table


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """What a device measured. Made by `read_latency_table`.

    Attributes:
        name: The name of the reference, for people.
        image_shape: (C, H, W).
        layers: Hash of the reference's layers: the table is of no use for another network.
        macs: The reference's multiply-adds, for people.
        widths: By network, of every group; the first is the reference, the second the narrowest.
        ms: Milliseconds of each.
        device: What measured: processor, system, onnxruntime, provider, threads.
        sha256: Of the file.
    """

    name: str
    image_shape: tuple[int, int, int]
    layers: str
    macs: int
    widths: tuple[Widths, ...]
    ms: tuple[float, ...]
    device: Mapping[str, Any]
    sha256: str

    def fitted(self, layers: Sequence[Layer], image_shape: Sequence[int]) -> LatencyModel:
        """The predictor for a network.

        Args:
            layers: What `layers_of` found in the reference.
            image_shape: (C, H, W) of its images.

        Raises:
            InputError: The table is about another network, or other images.
        """
        if layers_hash(layers, image_shape) != self.layers:
            size = "x".join(map(str, self.image_shape))
            raise InputError(
                f"the latency table is about another network ({self.name}, {human(self.macs)} multiply-adds for "
                f"{size}): write networks of this one, with its classes and image size, and measure them"
            )
        return fit(layers, self.widths, self.ms)

    def told(self) -> dict[str, Any]:
        """What a result should say of it."""
        return {
            "table": self.sha256,
            "device": dict(self.device),
            "networks": len(self.ms),
            "measured_at_the_end": False,
        }


def export_latency(
    model: nn.Module,
    directory: str | Path,
    *,
    image_shape: Sequence[int] = (3, 32, 32),
    num_classes: int | None = None,
    round_to: int | None = None,
    networks: int = NETWORKS,
    name: str | None = None,
) -> Path:
    """Write a directory whose networks are to be timed on the device that shall run the compact one.

    It holds the networks as ONNX files, `networks.json`, and `measure.py`, which needs onnxruntime and numpy only and
    writes `times.json`: what `compress(latency_table=...)` reads.

    Args:
        model: The reference that will be compressed; not touched. Its weights do not matter.
        directory: Must not exist; directories above it are made.
        image_shape: (C, H, W) of the images that it will be compressed for.
        num_classes: Of the data that it will be compressed for, where its classifier has others.
        round_to: Of what widths will be multiples; as `compress` chooses where None.
        networks: How many, at least 6; fewer are written where several fall together.
        name: Of the reference, for people.

    Raises:
        InputError: The directory exists, a number cannot be used, or the network cannot be edited or exported.
    """
    directory = Path(directory)
    problems = Problems("the networks cannot be written")
    shape = tuple(image_shape)
    if directory.exists():
        problems.add(f"{directory} exists: choose another directory")
    elif not ground(directory).is_dir():
        problems.add(f"{ground(directory)} is no directory: choose another place")
    if len(shape) != 3 or not all(type(side) is int and side > 0 for side in shape):
        problems.add(f"image_shape={image_shape!r}: give (3, height, width)")
    for key, value, least in (
        ("num_classes", num_classes, 2),
        ("round_to", round_to, 1),
        ("networks", networks, LEAST),
    ):
        if value is not None and (type(value) is not int or value < least):
            problems.add(f"{key}={value!r}: give a whole number, at least {least}")
    problems.raise_if_any()
    example = torch.zeros(2, *shape)
    twin = copy.deepcopy(model).to("cpu", torch.float32).eval()
    editor = StructuralEditor(twin, example)
    with eval_mode(twin), torch.no_grad():
        outputs = twin(example).shape[1]
    if num_classes is not None and num_classes != outputs:
        editor.resize_output(num_classes)
    step = round_to or default_rounding(editor)
    floor = {**editor.widths, **floor_widths(editor, step)}
    # One more, for the widest network is the reference here and counts once.
    sampled = sample_widths(editor.widths, floor, editor.widths, steps=steps_of(editor, step), count=networks + 1)
    if len(sampled) < LEAST:
        raise InputError(
            f"too few networks of different widths at round_to={step} ({len(sampled)}, {LEAST} are needed): give a "
            "smaller round_to"
        )
    stopwatch = Stopwatch(editor, (shape[0], shape[1], shape[2]))
    with draft_of(directory) as draft:
        files = [f"{number:02}.onnx" for number in range(len(sampled))]
        for file, widths in zip(files, sampled, strict=True):
            export_onnx(stopwatch.resized(widths), draft / file, image_shape=shape, verify=False)
        record = {
            "format": 1,
            "name": name or type(model).__name__,
            "image_shape": list(shape),
            "layers": layers_hash(layers_of(editor, example), shape),
            "macs": measure(twin, example).macs,
            "round_to": step,
            "files": files,
            "widths": sampled,
        }
        (draft / FILES).write_text(json.dumps(record, indent=1) + "\n")
        shutil.copyfile(str(script.__file__), draft / "measure.py")
        draft.replace(directory)
    return directory


def read_latency_table(path: str | Path) -> LatencyTable:
    """Read what `measure.py` wrote.

    Raises:
        InputError: There is no such file, or it is no table of latencies.
    """
    path = Path(path)
    try:
        text = read_text(path, _LARGEST)
        record = parse_json(text, nan=True)  # a time that is none is said to be one below
        networks = record["networks"]
        widths = tuple({str(name): _positive(width) for name, width in row.items()} for row in networks["widths"])
        ms = tuple(float(value) for value in record["ms"])
        channels, height, width = (_positive(side) for side in networks["image_shape"])
        if record["format"] != 1 or networks["format"] != 1:
            raise ValueError(f"format {record['format']} is newer than this version reads")
        if len(ms) != len(widths) or len(ms) < LEAST:
            raise ValueError(f"{len(ms)} times of {len(widths)} networks, at least {LEAST} are needed")
        if not all(math.isfinite(value) and value > 0 for value in ms):
            raise ValueError("a time is not positive")
        if any(row.keys() != widths[0].keys() for row in widths):
            raise ValueError("the networks have other groups")
        return LatencyTable(
            name=str(networks["name"]),
            image_shape=(channels, height, width),
            layers=str(networks["layers"]),
            macs=_positive(networks["macs"]),
            widths=widths,
            ms=ms,
            device={str(key): value for key, value in dict(record["device"]).items()},
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        )
    except OSError as error:
        raise InputError(f"latency_table={str(path)!r} cannot be read ({error.strerror}): give times.json") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"latency_table={str(path)!r} is no table of latencies ({error}): give the times.json that measure.py wrote"
        ) from error


def layers_hash(layers: Sequence[Layer], image_shape: Sequence[int]) -> str:
    """What two references must share for one table to be about both."""
    return hashlib.sha256(json.dumps([repr(list(layers)), list(image_shape)]).encode()).hexdigest()


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no positive whole number")
    return value
