"""What the caller asked for, completed from the result and checked as a whole before any work."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustcompress.errors import Problems, first_line
from robustcompress.export.ends import Ends
from robustcompress.export.metadata import FACTS, PREFIX
from robustcompress.robust import ThreatModel

LARGEST = 1_900_000_000
"""Bytes of weights that still fit one protobuf file, whose own limit is 2 GiB; more go to a second file."""

LOWEST_OPSET = 18
"""Asked for less, torch's exporter leaves 18 in the file and only logs it."""

DEFAULT_SHAPE = (3, 32, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A checked request.

    Attributes:
        model: A private copy: CPU, float32, eval mode, contiguous, no gradients.
        path: Where the file goes.
        image_shape: (C, H, W).
        classes: Their names, or None.
        threat: What the adversarial images of the parity check are made with, or None.
        metadata: What the caller and the result have to say, without prefix.
        opset: The operator set.
        batch: "dynamic" or a fixed size.
        sample: Clean images, float32 `[N, C, H, W]` on the CPU, or None.
        ends: What stands around the network.
        external_data: Whether the weights go to a second file.
    """

    model: nn.Module
    path: Path
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...] | None
    threat: ThreatModel | None
    metadata: Mapping[str, str]
    opset: int
    batch: Literal["dynamic"] | int
    sample: Tensor | None
    ends: Ends
    external_data: bool


def prepare(
    model_or_result: Any,
    path: str | Path,
    *,
    image_shape: Sequence[int] | None,
    classes: Sequence[str] | None,
    metadata: Mapping[str, str] | None,
    opset: int,
    batch: Literal["dynamic"] | int,
    sample: Tensor | None,
    threat: ThreatModel | None,
    tolerance: float,
    overwrite: bool,
    ends: Ends | None = None,
    external_data: bool = False,
) -> Request:
    """Check everything at once. The arguments are those of `export_onnx`.

    Raises:
        InputError: Naming every argument at fault, each with its remedy. Nothing has been written then.
    """
    problems = Problems("the ONNX export cannot start")
    target, ends = Path(path), ends or Ends()
    ends.check(problems)
    check_path(target, overwrite, problems)
    if image_shape is None:
        seen = sample.shape[1:] if isinstance(sample, Tensor) and sample.dim() == 4 else DEFAULT_SHAPE
        image_shape = getattr(model_or_result, "image_shape", None) or tuple(seen)
    shape = _checked_shape(image_shape, problems)
    classes = classes if classes is not None else getattr(model_or_result, "classes", None)
    threat = threat if threat is not None else getattr(model_or_result, "threat", None)
    if threat is not None and not isinstance(threat, ThreatModel):
        problems.add(f"threat={threat!r}: give a ThreatModel, such as ThreatModel('linf', 8 / 255)")
        threat = None
    describe = getattr(model_or_result, "export_metadata", None)
    told = dict(describe()) if callable(describe) else {}
    told = {key: value for key, value in told.items() if key.removeprefix(PREFIX) not in FACTS}
    _check_metadata(metadata or {}, problems)
    _check_numbers(opset, batch, tolerance, problems)
    twin = _private_copy(model_or_result, problems)
    if shape is not None:
        _check_sample(sample, shape, problems)
        if twin is not None:
            _check_forward(twin, shape, classes, 2 if batch == "dynamic" else batch, problems)
    problems.raise_if_any()
    assert twin is not None and shape is not None
    return Request(
        model=twin,
        path=target,
        image_shape=shape,
        classes=None if classes is None else tuple(str(c) for c in classes),
        threat=threat,
        metadata={str(k): str(v) for k, v in {**told, **(metadata or {})}.items()},
        opset=opset,
        batch=batch,
        sample=None if sample is None else sample.detach().to("cpu", torch.float32).contiguous(),
        ends=ends,
        external_data=external_data or weight_bytes(twin) > LARGEST,
    )


def check_path(path: Path, overwrite: bool, problems: Problems) -> None:
    """Note what keeps a file from being written to `path`."""
    if path.suffix.lower() != ".onnx":
        problems.add(f"path {str(path)!r}: must end in .onnx")
    if path.is_dir():
        problems.add(f"path {str(path)!r} is a directory; name a file in it, such as {str(path / 'model.onnx')!r}")
        return
    if path.exists() and not overwrite:
        problems.add(f"path {str(path)!r} exists; choose another, or pass overwrite=True")
    if not path.parent.is_dir():
        problems.add(f"directory {str(path.parent)!r} does not exist; make it first")
        return
    probe = temporary(path)
    try:
        probe.open("xb").close()
    except OSError as error:  # asking the system is surer than reading permission bits
        problems.add(f"directory {str(path.parent)!r} cannot be written to ({error.strerror}); choose another")
    else:
        probe.unlink()


def temporary(path: Path) -> Path:
    """Where a file is written before it is known to be good: beside `path`, so that the rename is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _checked_shape(image_shape: Sequence[int], problems: Problems) -> tuple[int, int, int] | None:
    shape = tuple(image_shape)
    if len(shape) != 3 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in shape):
        problems.add(f"image_shape={image_shape!r}: give (channels, height, width), such as {DEFAULT_SHAPE}")
        return None
    return shape


def _check_metadata(metadata: Mapping[str, str], problems: Problems) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            problems.add(f"metadata {key!r}: {value!r}: ONNX stores pairs of strings; use json.dumps(...)")
        elif key.removeprefix(PREFIX) in FACTS:
            problems.add(f"metadata {key!r} is written by the export itself; choose another key")


def _check_numbers(opset: int, batch: Literal["dynamic"] | int, tolerance: float, problems: Problems) -> None:
    import onnx

    highest = int(onnx.defs.onnx_opset_version())
    if isinstance(opset, bool) or not isinstance(opset, int) or not LOWEST_OPSET <= opset <= highest:
        problems.add(f"opset={opset!r}: must be {LOWEST_OPSET} to {highest} with onnx {onnx.__version__}")
    if batch != "dynamic" and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        problems.add(f"batch={batch!r}: must be 'dynamic' or a positive number of images")
    if not tolerance > 0:
        problems.add(f"tolerance={tolerance!r}: must be positive")


def _private_copy(model_or_result: Any, problems: Problems) -> nn.Module | None:
    model: object = (
        model_or_result if isinstance(model_or_result, nn.Module) else getattr(model_or_result, "model", None)
    )
    if not isinstance(model, nn.Module):
        problems.add(f"{type(model_or_result).__name__} is no nn.Module and has none as .model; pass the model itself")
        return None
    if isinstance(model, torch.jit.ScriptModule):
        problems.add("the model is a TorchScript module; pass the Python module it was made from")
        return None
    if hasattr(model, "_orig_mod"):
        problems.add("the model is compiled; pass the module given to torch.compile (model._orig_mod)")
        return None
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        problems.add("the model is wrapped for parallel training; pass model.module")
        return None
    tensors = [*model.parameters(), *model.buffers()]
    narrow = sorted({str(t.dtype) for t in tensors if t.is_floating_point()} - {"torch.float32", "torch.float64"})
    if narrow:
        problems.add(f"the model holds {', '.join(narrow)} weights; call model.float() first")
    if narrow:
        return None
    try:
        twin = copy.deepcopy(model)
    except RuntimeError as error:  # tensors that are results of a computation
        problems.add(f"the model cannot be copied ({first_line(error)})")
        return None
    twin = twin.to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    return twin.eval().requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters and buffers take in float32."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in tensors)


def _check_sample(sample: Tensor | None, shape: tuple[int, int, int], problems: Problems) -> None:
    if sample is None:
        return
    if not isinstance(sample, Tensor) or not sample.is_floating_point():
        kind = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
        problems.add(f"sample is {kind}; give float images in [0, 1], such as Images.as_float() or pixels / 255")
    elif sample.dim() != 4 or tuple(sample.shape[1:]) != shape or not len(sample):
        problems.add(f"sample has shape {tuple(sample.shape)}; must be [N, {', '.join(map(str, shape))}], N at least 1")
    elif not bool(((sample >= 0) & (sample <= 1)).all()):
        low, high = float(sample.min()), float(sample.max())
        problems.add(f"sample has values from {low:g} to {high:g}; images must lie in [0, 1] (the graph normalises)")


def _check_forward(
    model: nn.Module, shape: tuple[int, int, int], classes: object, batch: object, problems: Problems
) -> None:
    size = batch if isinstance(batch, int) and batch > 0 else 2
    try:
        with torch.no_grad():
            output = model(torch.full((size, *shape), 0.5))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        said = first_line(error)
        problems.add(f"the model does not run on images of shape {(size, *shape)} ({said}); check image_shape")
        return
    if not isinstance(output, Tensor):
        problems.add(f"the model returns {type(output).__name__}; it must return one tensor of logits [batch, classes]")
    elif output.dim() != 2 or len(output) != size:
        problems.add(f"the model returns shape {tuple(output.shape)}; it must return logits [batch, classes]")
    elif classes is not None:
        _check_classes(classes, output.shape[1], problems)


def _check_classes(classes: object, width: int, problems: Problems) -> None:
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        problems.add(f"classes={classes!r}: give a list of class names, in the order of the logits")
    elif not all(isinstance(c, str) for c in classes):
        problems.add("classes: every name must be a string")
    elif len(classes) != width:
        problems.add(f"{len(classes)} classes were named, but the model has {width} logits")
