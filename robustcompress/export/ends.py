"""What a file may have around its network: bytes in place of floats, the resize, the softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustcompress.errors import Problems

INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
"""The names that every exported file gives its input, and its output."""

BEFORE, AFTER = "preprocess/", "postprocess/"
"""How the names of all nodes and tensors around the network begin."""

PIXELS = f"{BEFORE}pixels"
"""What the network reads where something stands before it: float32 [batch, C, H, W] in [0, 1]."""

RESIZE = "bilinear, antialiased, short side, centre crop, rounded to 1/255"
"""The one way in which files resize, as their metadata say it: that of the training data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What stands around the network.

    Attributes:
        input: "float32" takes [batch, C, H, W] in [0, 1]; "uint8" takes [batch, H, W, C], 0 to 255.
        resize: Whether H and W are free, and the images resized to what the network reads.
        softmax: Whether the file gives probabilities in place of logits.
    """

    input: Literal["float32", "uint8"] = "float32"
    resize: bool = False
    softmax: bool = False

    @property
    def output(self) -> str:
        """Name of the output."""
        return PROBABILITIES if self.softmax else LOGITS

    def input_shape(self, batch: str | int, image_shape: Sequence[int]) -> tuple[str | int, ...]:
        """The shape that the file's input has; names stand for what is free."""
        if self.input == "float32":
            return (batch, *image_shape)
        sides = ("height", "width") if self.resize else tuple(image_shape[1:])
        return (batch, *sides, image_shape[0])

    def facts(self) -> dict[str, str]:
        """What the file's metadata say of it."""
        bytes_in = self.input == "uint8"
        return {
            "layout": "NHWC" if bytes_in else "NCHW",
            "input_type": self.input,
            "input_range": "[0, 255]" if bytes_in else "[0, 1]",
            "resize": RESIZE if self.resize else "none",
            "output": self.output,
        }

    def check(self, problems: Problems) -> None:
        """Note what does not go together."""
        if self.input not in ("float32", "uint8"):
            problems.add(f"input={self.input!r}: must be 'float32' or 'uint8'")
        elif self.resize and self.input != "uint8":
            problems.add("resize=True: only files that take bytes resize; pass input='uint8' as well")

    def put_around(self, proto: Any, batch: str | int, image_shape: tuple[int, int, int]) -> None:
        """Add these ends to a graph that maps `images` [batch, C, H, W] to `logits`, in place."""
        if self.input == "uint8":
            _put_before(proto, batch, self.input_shape(batch, image_shape), image_shape, resize=self.resize)
        if self.softmax:
            _put_softmax(proto)


def _put_before(
    proto: Any, batch: str | int, outside: Sequence[str | int], image_shape: tuple[int, int, int], *, resize: bool
) -> None:
    from onnx import TensorProto, helper

    graph = proto.graph
    for node in graph.node:
        node.input[:] = [PIXELS if name == INPUT else name for name in node.input]
    steps = _Steps()
    last = steps.add("Transpose", [INPUT], "planes", perm=[0, 3, 1, 2])
    last = steps.add("Cast", [last], "floats", to=TensorProto.FLOAT)
    if resize:
        last = _resize(steps, last, -1 if isinstance(batch, str) else batch, image_shape)
    steps.add("Div", [last, steps.constant("white", 255.0)], "pixels")
    network = list(graph.node)
    del graph.node[:]
    graph.node.extend(steps.nodes + network)
    graph.initializer.extend(steps.constants)
    graph.input[0].CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, list(outside)))
    graph.value_info.append(helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, [batch, *image_shape]))


def _resize(steps: _Steps, images: str, batch: int, image_shape: tuple[int, int, int]) -> str:
    """Scale to the shortest sides that cover the network's, and crop the centre."""
    from onnx import TensorProto

    inside = list(image_shape[1:])
    wanted = steps.constant("wanted", inside)
    sides = steps.add("Shape", [images], "sides", start=2, end=4)
    # height * wanted width / width, and the other way round; in doubles and rounded half to even, as Python's round().
    real = steps.add("Cast", [sides], "sides_real", to=TensorProto.DOUBLE)
    across = steps.add("Gather", [real, steps.constant("swap", [1, 0])], "sides_across")
    scaled = steps.add("Mul", [real, steps.constant("wanted_across", [float(n) for n in inside[::-1]])], "product")
    quotient = steps.add("Div", [scaled, across], "quotient")
    rounded = steps.add("Round", [quotient], "rounded")
    whole = steps.add("Cast", [rounded], "whole", to=TensorProto.INT64)
    big = steps.add("Max", [whole, wanted], "big")
    front = steps.add("Shape", [images], "front", start=0, end=2)
    sizes = steps.add("Concat", [front, big], "sizes", axis=0)
    # Without exclude_outside the border would weigh more than with Pillow and torch (measured: by up to 14 of 255).
    how = {"mode": "linear", "antialias": 1, "exclude_outside": 1}
    resized = steps.add("Resize", [images, "", "", sizes], "resized", **how)
    spare = steps.add("Sub", [big, wanted], "spare")
    start = steps.add("Div", [spare, steps.constant("two", [2])], "start")
    end = steps.add("Add", [start, wanted], "end")
    crop = steps.add("Slice", [resized, start, end, steps.constant("axes", [2, 3])], "crop")
    # Says the sizes, which no shape inference would find, to whatever reads the graph.
    shaped = steps.add("Reshape", [crop, steps.constant("shape", [batch, *image_shape])], "shaped")
    return steps.add("Round", [shaped], "bytes")


class _Steps:
    """Nodes in a row, and the constants that they read."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [BEFORE + name], name=BEFORE + name, **attributes))
        return BEFORE + name

    def constant(self, name: str, values: float | list[int] | list[float]) -> str:
        import numpy
        from onnx import numpy_helper

        # Numbers of the sizes' arithmetic are doubles; the one scalar meets pixels.
        kind = numpy.float32 if isinstance(values, float) else None
        self.constants.append(numpy_helper.from_array(numpy.asarray(values, kind), BEFORE + name))
        return BEFORE + name


def _put_softmax(proto: Any) -> None:
    from onnx import helper

    graph = proto.graph
    graph.node.append(helper.make_node("Softmax", [LOGITS], [PROBABILITIES], name=f"{AFTER}softmax", axis=1))
    logits = type(graph.output[0])()
    logits.CopyFrom(graph.output[0])
    graph.value_info.append(logits)
    graph.output[0].name = PROBABILITIES


def preprocessing_of(proto: Any) -> Any | None:
    """What a file does before its network, as a graph of its own from `images` to `preprocess/pixels`; None if nothing.

    Args:
        proto: An `onnx.ModelProto`; its large weights need not be loaded.
    """
    import onnx

    nodes = [node for node in proto.graph.node if node.name.startswith(BEFORE)]
    if not nodes:
        return None
    constants = [tensor for tensor in proto.graph.initializer if tensor.name.startswith(BEFORE)]
    free = onnx.helper.make_tensor_value_info(PIXELS, onnx.TensorProto.FLOAT, [None] * 4)
    graph = onnx.helper.make_graph(nodes, "preprocessing", list(proto.graph.input), [free], constants)
    alone = onnx.helper.make_model(graph, opset_imports=list(proto.opset_import))
    alone.ir_version = proto.ir_version
    return alone


def reference_resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """The resize of exported files in torch: what it is verified against.

    Args:
        pixels: Float [N, C, H, W], 0 to 255.
        height: What the network reads.
        width: What the network reads.

    Returns:
        Float [N, C, height, width], whole numbers from 0 to 255. For squares, what the training data are resized to.
    """
    rows, columns = pixels.shape[2:]
    big = (max(height, round(rows * width / columns)), max(width, round(columns * height / rows)))
    scaled = F.interpolate(pixels.to(torch.float32), size=big, mode="bilinear", antialias=True, align_corners=False)
    top, left = (big[0] - height) // 2, (big[1] - width) // 2
    return scaled[:, :, top : top + height, left : left + width].round().clamp(0, 255)
