"""An exported file behind one onnxruntime session: what it reads, what it returns, how it is run. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

PREFIX = "robustcompress."
_TYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
_PROBE = 32  # pixels a side of the blank image that opens a file of any size


class ModelError(Exception):
    """The file cannot be served; the message says why, and what to do."""


class Model:
    """One ONNX file that `robustcompress export` wrote.

    Args:
        path: The file.
        threads: Threads within one operator. Stated, since onnxruntime else takes every core that it sees, which in
            a container is every core of the host.

    Attributes:
        metadata: The file's own facts, without their prefix.
        size: (height, width) that the file reads; None where it reads any size and resizes by itself.
        batch: The one batch size it accepts; None where it is free.
        classes: Names in the order of the outputs; numbers as text where the file has no names.

    Raises:
        ModelError: There is no such file, onnxruntime does not open it, or it is not an image classifier of ours.
    """

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        if not path.is_file():
            raise ModelError(f"{path} is not a file; give an ONNX file that `robustcompress export` wrote")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        # Threads that spin between two calls make an idle server warm, and fight with those that decode images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise ModelError(f"{path} cannot be opened: {str(error).splitlines()[0]}") from error
        stored = self._session.get_modelmeta().custom_metadata_map
        self.metadata = {key.removeprefix(PREFIX): value for key, value in stored.items() if key.startswith(PREFIX)}
        self._read_interface(path)
        width = self._warm_up(path)
        try:
            named = json.loads(self.metadata.get("classes", "null"))
        except ValueError as error:
            raise ModelError(f"{path} has class names that are no JSON list ({error}); export it again") from error
        self.classes: list[str] = [str(k) for k in range(width)] if named is None else named
        if len(self.classes) != width:
            raise ModelError(f"{path} names {len(self.classes)} classes and returns {width}; export it again")

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Turn one image, uint8 `[H, W, 3]`, into what the file reads: its type, its range, its order of axes."""
        image = pixels.transpose(2, 0, 1) if self._layout == "NCHW" else pixels
        if self._type is np.float32:
            image = image.astype(np.float32) / np.float32(self._divisor)
        return np.ascontiguousarray(image)

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Run prepared images of one size in one call (more where the batch is fixed).

        Returns:
            float32 `[N, classes]`; each row sums to 1.

        Raises:
            ArithmeticError: An output is not finite.
        """
        count = len(images)
        step = self.batch or count
        # The last call of a fixed batch is filled up with the first image.
        batch = np.stack([*images, *[images[0]] * (-count % step)])
        calls = [self._session.run(None, {self._input: batch[i : i + step]})[0] for i in range(0, len(batch), step)]
        scores: np.ndarray = np.concatenate(calls)[:count]
        if not np.isfinite(scores).all():
            raise ArithmeticError("the network returned numbers that are not finite")
        if self._output == "probabilities":
            return scores
        powers: np.ndarray = np.exp(scores - scores.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def describe(self) -> Mapping[str, object]:
        """What a client may want to know: input, output, classes, and the facts stored in the file."""
        return {
            "input": {
                "type": np.dtype(self._type).name,
                "layout": self._layout,
                "size": list(self.size) if self.size else None,
                "batch": self.batch,
            },
            "output": self._output,
            "classes": self.classes,
            "metadata": self.metadata,
        }

    def _read_interface(self, path: Path) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape if len(inputs) == len(outputs) == 1 else []
        self._layout = self.metadata.get("layout", "NCHW")
        channels = shape[-1 if self._layout == "NHWC" else 1] if len(shape) == 4 else None
        if channels != 3 or self._layout not in ("NCHW", "NHWC") or inputs[0].type not in _TYPES:
            found = ", ".join(f"{node.name} {node.type} {node.shape}" for node in (*inputs, *outputs))
            raise ModelError(
                f"{path} has {found} (layout {self._layout}); it must map colour images, float32 or uint8, to "
                "a batch of scores: export it with robustcompress"
            )
        self._input = inputs[0].name
        self._type = _TYPES[inputs[0].type]
        self._divisor = 1 if self.metadata.get("input_range", "[0, 1]") == "[0, 255]" else 255
        self._output = self.metadata.get("output", "probabilities" if outputs[0].name == "probabilities" else "logits")
        height, width = shape[1:3] if self._layout == "NHWC" else shape[2:]
        fixed = isinstance(height, int) and isinstance(width, int)
        self.size: tuple[int, int] | None = (height, width) if fixed else None
        self.batch: int | None = shape[0] if isinstance(shape[0], int) else None

    def _warm_up(self, path: Path) -> int:
        """Run a blank image, so that a file which cannot run is refused at the start; return the number of classes."""
        blank = np.zeros((*(self.size or (_PROBE, _PROBE)), 3), np.uint8)
        try:
            scores = self.probabilities([self.prepare(blank)])
        except Exception as error:
            raise ModelError(f"{path} does not run on a blank image: {str(error).splitlines()[0]}") from error
        if scores.ndim != 2:
            raise ModelError(f"{path} returns {scores.ndim} axes in place of [batch, classes]")
        return int(scores.shape[1])
