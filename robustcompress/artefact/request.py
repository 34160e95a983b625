"""What a caller of `quantize_onnx` asked for, checked as a whole before any long work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.artefact.int8 import WEIGHTED
from robustcompress.artefact.targets import DEFAULT_TARGET, TARGETS
from robustcompress.data import DataSplits
from robustcompress.errors import InputError, Problems, nearest
from robustcompress.export.parity import torch_logits
from robustcompress.export.reading import OnnxFile, open_onnx
from robustcompress.export.request import LARGEST, check_path
from robustcompress.robust import AttackSpec, ThreatModel, attack_by_name

FEWEST = 32
"""Calibration images below which the ranges of activations are chance."""

LOWEST_OPSET = 13
"""The first operator set with one scale a channel."""

_TWIN_TOLERANCE = 1e-3  # share of the scores' scale; the export itself was held to a tenth of that
_TWIN_IMAGES = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wanted:
    """A checked request.

    Attributes:
        file: The float file, open.
        proto: The same as a graph, all weights loaded.
        path: Where the smaller file goes.
        data: Calibration from `train`, choices on `val`, judgement on `test`.
        target: Name of the processor.
        twin: The network in torch, a private copy of it; None where it is not at hand.
        threat: What adversarial images are made within; None without a twin.
        attack: How they are made.
    """

    file: OnnxFile
    proto: Any
    path: Path
    data: DataSplits
    target: str
    twin: nn.Module | None
    threat: ThreatModel | None
    attack: AttackSpec


def check_arguments(
    source: Any,
    path: str | Path,
    *,
    data: DataSplits,
    to: str,
    target: str | None,
    attack: str,
    calibrate: str,
    method: str,
    images: int,
    judged: int | None,
    keep_sensitive: int,
    max_loss: float,
    has_twin: bool,
    overwrite: bool,
) -> Problems:
    """Note what can be said before the float file is opened. The arguments are those of `quantize_onnx`.

    Raises:
        InputError: `data` is none, so that nothing more can be checked.
    """
    problems = Problems("the quantization cannot start")
    if isinstance(source, nn.Module) or not (isinstance(source, str | Path) or hasattr(source, "model")):
        kind = type(source).__name__
        problems.add(f"source is a {kind}: give a file that export_onnx() wrote, and the network as model=")
    if not isinstance(data, DataSplits):
        problems.add(f"data={data!r:.60}: give the splits that load_data() returns")
        problems.raise_if_any()
    choices = (
        ("to", to, ("int8", "float16")),
        ("target", target or "x86", tuple(TARGETS)),
        ("calibrate", calibrate, ("clean", "adversarial")),
        ("method", method, ("percentile", "entropy", "minmax")),
    )
    for name, value, options in choices:
        if value not in options:
            problems.add(f"{name}={value!r}{nearest(str(value), options)}")
    if to == "float16" and target not in (None, "gpu"):
        problems.add(f"target={target!r}: onnxruntime computes float16 in float32 on CPUs, at no gain; use int8")
    if to == "float16" and keep_sensitive:
        problems.add("keep_sensitive: is for int8; float16 is close enough to float32 for every layer")
    for name, number, least in (("images", images, FEWEST), ("keep_sensitive", keep_sensitive, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            problems.add(f"{name}={number!r}: must be at least {least}")
    if judged is not None and (isinstance(judged, bool) or not isinstance(judged, int) or judged < 1):
        problems.add(f"judged={judged!r}: must be positive, or None for all test images")
    if not max_loss >= 0:
        problems.add(f"max_loss={max_loss!r}: percentage points that may be lost, at least 0")
    if len(data.train) < FEWEST:
        problems.add(f"{data.name} has {len(data.train)} training images: calibration needs at least {FEWEST}")
    if not len(data.test):
        problems.add(f"{data.name} has no test images to judge the file on")
    spec = problems.attempt(lambda: attack_by_name(attack))
    if spec is not None and spec.kind not in ("pgd", "fgsm"):
        problems.add(f"attack={attack!r}: images are made with 'fgsm' or 'pgd-20' here; evaluate the file for more")
    if calibrate == "adversarial" and not has_twin:
        problems.add("calibrate='adversarial': needs the network in torch, to attack it: pass its result as well")
    check_path(Path(path), overwrite, problems)
    return problems


def prepare(
    problems: Problems,
    source: Path,
    path: Path,
    *,
    data: DataSplits,
    to: str,
    target: str | None,
    twin: nn.Module | None,
    threat: ThreatModel | None,
    attack: str,
) -> Wanted:
    """Open the float file and check that all belongs together.

    Args:
        problems: What is wrong with the arguments already.
        source: The float file.
        path: As of `quantize_onnx`, and so the others.
        data: What it was trained on.
        to: "int8" or "float16".
        target: For which processor, or None.
        twin: The network in torch, or None.
        threat: What adversarial images are made within, or None for that of the file.
        attack: How they are made.

    Raises:
        InputError: Naming all that is at fault, each with its remedy. Nothing has been written then.
    """
    if path.exists() and source.exists() and path.samefile(source):
        problems.add(f"path {str(path)!r} is the float file itself: choose another")
    file: OnnxFile | None = problems.attempt(lambda: open_onnx(source))
    proto = None
    if file is not None:
        proto = _checked_graph(file, to, problems)
        _check_data(file, data, problems)
        threat = threat or file.threat
        if twin is not None and threat is None:
            problems.add("threat: the file does not say what it was trained against: give a ThreatModel")
    problems.raise_if_any()
    assert file is not None
    return Wanted(
        file=file,
        proto=proto,
        path=path,
        data=data,
        target=target or DEFAULT_TARGET["int8" if to == "int8" else "float16"],
        twin=None if twin is None else _checked_twin(file, twin, data),
        threat=threat,
        attack=attack_by_name(attack),
    )


def _checked_graph(file: OnnxFile, to: str, problems: Problems) -> Any:
    """Load the graph; note what cannot be quantized about it."""
    import onnx

    proto = onnx.load(str(file.path))
    kinds = {node.op_type for node in proto.graph.node}
    if kinds & {"QuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"} or file.precision != "float32":
        problems.add(f"{file.path} is in {file.precision} or quantized already: name the float32 file")
    if not kinds & set(WEIGHTED):
        problems.add(f"{file.path} has no {', '.join(WEIGHTED)}: nothing in it would gain")
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if size > LARGEST:
        problems.add(
            f"{file.path} has {size / 1e9:.1f} GB of weights: onnxruntime's quantizer takes {LARGEST / 1e9:.1f}"
        )
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if to == "int8" and opset < LOWEST_OPSET:
        problems.add(f"{file.path} has opset {opset}: export it with {LOWEST_OPSET} or later")
    return proto


def _check_data(file: OnnxFile, data: DataSplits, problems: Problems) -> None:
    if file.classes is not None and file.classes != data.classes:
        problems.add(
            f"{file.path} tells {len(file.classes)} classes apart ({', '.join(file.classes[:3])}, ...), the images of "
            f"{data.name} are of {len(data.classes)} ({', '.join(data.classes[:3])}, ...): name the data it was "
            "trained on"
        )
    if file.image_shape != data.image_shape:
        problems.add(
            f"{file.path} was made for images of {file.image_shape}, these have {data.image_shape}: load them with "
            f"image_size={file.image_shape[1]} (--image-size)"
        )


def _checked_twin(file: OnnxFile, twin: nn.Module, data: DataSplits) -> nn.Module:
    """Copy the network, once it is seen to compute what the file computes."""
    import copy

    private = copy.deepcopy(twin).to("cpu", torch.float32).eval().requires_grad_(False)
    images = data.test.first(_TWIN_IMAGES).as_float()
    found, wanted = file.scores(images), torch_logits(private, images)
    if file.output_kind == "probabilities":
        found, wanted = found.softmax(1), wanted.softmax(1)
    scale = float(wanted.abs().max())
    if found.shape != wanted.shape or not float((found - wanted).abs().max()) <= _TWIN_TOLERANCE * max(scale, 1e-6):
        raise InputError(
            f"{file.path} does not compute what this network computes: name the result that it was exported from"
        )
    return private
