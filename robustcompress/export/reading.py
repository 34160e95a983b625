"""An ONNX file as a function from images in [0, 1] to scores, whatever it wants its images to look like."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from robustcompress.errors import InputError, Problems, first_line
from robustcompress.export.metadata import PREFIX
from robustcompress.export.session import load_session
from robustcompress.robust import ThreatModel

Layout = Literal["NCHW", "NHWC"]
InputType = Literal["float32", "float16", "uint8"]
OutputKind = Literal["logits", "probabilities"]

BATCH = 64
"""Images a call where the file leaves it open."""

SMALLEST = 1e-30
"""The least probability that is told apart from none: the logarithm of zero would make margins infinite."""

_CHANNELS = (1, 3)
_TYPES: Mapping[str, InputType] = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnnxFile:
    """An open ONNX classifier. Made by `open_onnx`.

    Attributes:
        path: The file.
        session: The open `onnxruntime.InferenceSession`.
        input: Name of the input.
        output: Name of the output.
        layout: Where the channels stand.
        input_type: Type of a pixel. Of "uint8", 0 to 255 stand for [0, 1]; floats are in [0, 1].
        output_kind: What the file ends in.
        image_shape: (C, H, W) of the images that the network within sees. A file that resizes takes others too.
        resizes: Whether the file takes images of any height and width.
        batch: The one number of images a call that it accepts, or None for any.
        classes: Class names in the order of the scores, or None where the file does not say.
        threat: What the network was made to withstand, or None where the file does not say.
        metadata: What the file says of itself under `robustcompress.`, without that prefix.
    """

    path: Path
    session: Any
    input: str
    output: str
    layout: Layout
    input_type: InputType
    output_kind: OutputKind
    image_shape: tuple[int, int, int]
    resizes: bool
    batch: int | None
    classes: tuple[str, ...] | None
    threat: ThreatModel | None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """What the file says: "float32", "float16" or "int8"; "float32" where it says nothing."""
        return self.metadata.get("precision", "float32")

    def sha256(self) -> str:
        """The hash of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def feed(self, images: Tensor) -> Any:
        """Turn images into what the file reads.

        Args:
            images: Float [N, C, H, W] in [0, 1]. A file that reads uint8 gets them rounded to the nearest of 256
                values: an attack against it has no finer ones either.

        Returns:
            A NumPy array.
        """
        found = images.detach().to("cpu", torch.float32)
        if self.input_type == "uint8":
            found = found.mul(255).round().clamp(0, 255).to(torch.uint8)
        elif self.input_type == "float16":
            found = found.half()
        if self.layout == "NHWC":
            found = found.permute(0, 2, 3, 1)
        return found.contiguous().numpy()

    def scores(self, images: Tensor) -> Tensor:
        """Run images through the file.

        Args:
            images: Float [N, C, H, W] in [0, 1].

        Returns:
            Float32 [N, K]: logits; of a file that ends in probabilities their logarithms, which are logits up to one
            constant an image, so that classes and margins are the same.
        """
        size = self.batch or BATCH
        parts = [self._call(images[start : start + size], size) for start in range(0, len(images), size)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes or ()))

    def _call(self, images: Tensor, size: int) -> Tensor:
        short = size - len(images) if self.batch else 0  # a fixed batch is filled up with its first image
        full = torch.cat([images, images[:1].expand(short, -1, -1, -1)]) if short else images
        try:
            found = torch.from_numpy(self.session.run([self.output], {self.input: self.feed(full)})[0])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise InputError(f"{self.path} cannot be run on such images ({first_line(error)})") from error
        if found.dim() != 2 or len(found) != len(full):
            raise InputError(
                f"{self.path} gives {list(found.shape)} for {len(full)} images: not one row of scores each"
            )
        found = found[: len(images)].float()
        return found.clamp_min(SMALLEST).log() if self.output_kind == "probabilities" else found


def open_onnx(path: str | Path, *, threads: int | None = None) -> OnnxFile:
    """Open an ONNX classifier on the CPU: one that this package wrote, or a foreign one with one image input.

    Args:
        path: The file.
        threads: Threads within one operator; onnxruntime's own choice where None.

    Returns:
        The open file, with what it says of itself.

    Raises:
        InputError: The file is missing or torn, or does not map one batch of images to one score a class; all that is
            wrong is said.
    """
    path = Path(path)
    session = load_session(path, threads)
    try:
        stored = session.get_modelmeta().custom_metadata_map
        inputs, outputs = session.get_inputs(), session.get_outputs()
        names = [one.name for one in (*inputs, *outputs)]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is torn: a name in it is no text ({error.reason}); export it again") from error
    metadata = {key.removeprefix(PREFIX): value for key, value in stored.items() if key.startswith(PREFIX)}
    problems = Problems(f"{path} is no image classifier that can be judged")
    if len(inputs) != 1 or len(outputs) != 1:
        problems.add(f"it has {len(inputs)} inputs and {len(outputs)} outputs: export a file with one of each")
        problems.raise_if_any()
    kind = _TYPES.get(inputs[0].type)
    if kind is None:
        problems.add(f"its input {inputs[0].name!r} is a {inputs[0].type}: images are float, float16 or uint8")
    if outputs[0].type not in ("tensor(float)", "tensor(float16)") or len(outputs[0].shape) != 2:
        problems.add(f"its output {outputs[0].name!r} is a {outputs[0].type} of shape {outputs[0].shape}: not [N, K]")
    shape = inputs[0].shape
    layout = _layout(shape, metadata)
    image_shape = None if layout is None else _image_shape(shape, layout, metadata)
    if layout is None:
        problems.add(f"its input has shape {shape}: images are [N, C, H, W] or [N, H, W, C] with 1 or 3 channels")
    elif image_shape is None:
        problems.add(f"its input has shape {shape} and it does not say for which image size it was made")
    classes = _classes(metadata, outputs[0].shape, problems)
    threat = _threat(metadata, problems)
    problems.raise_if_any()
    assert kind is not None and layout is not None and image_shape is not None
    rows = shape[2] if layout == "NCHW" else shape[1]
    return OnnxFile(
        path=path,
        session=session,
        input=names[0],
        output=names[1],
        layout=layout,
        input_type=kind,
        output_kind="probabilities" if metadata.get("output") == "probabilities" else "logits",
        image_shape=image_shape,
        resizes=not isinstance(rows, int),
        batch=shape[0] if isinstance(shape[0], int) else None,
        classes=classes,
        threat=threat,
        metadata=metadata,
    )


def _layout(shape: Sequence[Any], metadata: Mapping[str, str]) -> Layout | None:
    """Where the channels stand: the axis of 1 or 3; where both are, as the file says, else the first.

    A file that says layout and image shape, and has as many channels there, may have any number of them.
    """
    if len(shape) != 4:
        return None
    told, layout = _told_shape(metadata), metadata.get("layout")
    if told is not None and (layout, told[0]) in (("NCHW", shape[1]), ("NHWC", shape[3])):
        return "NCHW" if layout == "NCHW" else "NHWC"
    first, last = shape[1] in _CHANNELS, shape[3] in _CHANNELS
    if last and (not first or metadata.get("layout") == "NHWC"):
        return "NHWC"
    return "NCHW" if first else None


def _image_shape(shape: Sequence[Any], layout: Layout, metadata: Mapping[str, str]) -> tuple[int, int, int] | None:
    sizes = (shape[1], shape[2], shape[3]) if layout == "NCHW" else (shape[3], shape[1], shape[2])
    if all(isinstance(size, int) and size > 0 for size in sizes):
        return sizes
    return _told_shape(metadata)


def _told_shape(metadata: Mapping[str, str]) -> tuple[int, int, int] | None:
    said = _json(metadata.get("image_shape"))
    if isinstance(said, list) and len(said) == 3 and all(type(size) is int and size > 0 for size in said):
        return said[0], said[1], said[2]
    return None


def _classes(metadata: Mapping[str, str], shape: Sequence[Any], problems: Problems) -> tuple[str, ...] | None:
    said = _json(metadata.get("classes"))
    if said is None:
        return None
    if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
        problems.add("its metadata 'robustcompress.classes' is no list of names: export it again")
        return None
    if isinstance(shape[-1], int) and shape[-1] != len(said):
        problems.add(f"it names {len(said)} classes and has {shape[-1]} scores: export it again")
    return tuple(said)


def _threat(metadata: Mapping[str, str], problems: Problems) -> ThreatModel | None:
    said = _json(metadata.get("threat"))
    if said is None:
        return None
    try:
        return ThreatModel(said["norm"], said["eps"])
    except (InputError, KeyError, TypeError):
        problems.add("its metadata 'robustcompress.threat' is no threat: export it again")
        return None


def _json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return ""  # neither None nor what anybody asks for
