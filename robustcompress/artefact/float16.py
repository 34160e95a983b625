"""A float graph in half precision, for processors that compute in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from robustcompress.artefact.feeds import feeds
from robustcompress.errors import InputError
from robustcompress.export.ends import AFTER, BEFORE, PIXELS
from robustcompress.export.quiet import quiet
from robustcompress.export.reading import OnnxFile

LARGEST_HALF = 65504.0
"""The largest number that float16 holds."""

_ROOM = 2.0  # other images may reach further than those that were looked at


def to_float16(proto: Any, *, float16_io: bool) -> Any:
    """Write a graph in float16, but for what stands around its network.

    The converter gets the network alone: it would send the floats of the preprocessing through float16 between any two
    of its nodes, also where it is told to leave them.

    Args:
        proto: Of the float file, all weights loaded; not touched.
        float16_io: Whether a float input and the output become float16 as well.

    Returns:
        An `onnx.ModelProto` of its own.
    """
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    network = onnx.ModelProto()
    network.CopyFrom(proto)
    graph = network.graph
    for number, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    before, after = ([node for node in graph.node if node.name.startswith(end)] for end in (BEFORE, AFTER))
    constants = [tensor for tensor in graph.initializer if tensor.name.startswith((BEFORE, AFTER))]
    around = list(graph.input), list(graph.output)
    float32 = [] if float16_io else [value.name for values in around for value in values]
    known = {value.name: value for value in graph.value_info}
    if before:
        float32.append(PIXELS)
        _replace(graph.input, [known[PIXELS]])
    if after:
        float32.append(after[0].input[0])
        _replace(graph.output, [known[after[0].input[0]]])
    _replace(graph.node, [node for node in graph.node if not node.name.startswith((BEFORE, AFTER))])
    _replace(graph.initializer, [tensor for tensor in graph.initializer if not tensor.name.startswith((BEFORE, AFTER))])
    _replace(graph.value_info, [])  # inferred anew
    with quiet():
        half = convert_float_to_float16(network, keep_io_types=float32)
        ONNXModel(half).topological_sort()  # the converter leaves its casts at the end
    _replace(half.graph.node, [*before, *half.graph.node, *after])
    half.graph.initializer.extend(constants)
    if before:
        half.graph.value_info.extend([known[PIXELS]])
        _replace(half.graph.input, around[0])
    if after:
        half.graph.value_info.extend([known[after[0].input[0]]])
        _replace(half.graph.output, around[1])
    return half


def _replace(field: Any, values: Iterable[Any]) -> None:
    """Give a repeated field of a protobuf message other values, also some of its own."""
    import copy

    kept = [copy.deepcopy(value) for value in values]
    del field[:]
    field.extend(kept)


def check_range(proto: Any, file: OnnxFile, images: Tensor, folder: Path) -> float:
    """Look for numbers that float16 does not hold; the CPU, which computes in float32, would not show them.

    Args:
        proto: Of the float file.
        file: The same, open.
        images: Float [N, C, H, W] in [0, 1].
        folder: Where temporary files may lie.

    Returns:
        The largest activation that was seen.

    Raises:
        InputError: A weight or an activation is too large.
    """
    import onnx
    from onnx import TensorProto, numpy_helper
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    arrays = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT]
    weight = max((float(abs(array).max()) for array in arrays if array.size), default=0.0)
    inside = onnx.shape_inference.infer_shapes(proto)
    plain = folder / "plain.onnx"
    onnx.save_model(inside, str(plain))
    kinds = sorted({n.op_type for n in inside.graph.node if not n.name.startswith((BEFORE, AFTER))})
    with quiet():
        calibrator = create_calibrator(
            plain,
            kinds,
            augmented_model_path=str(folder / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        for feed in feeds(file, images):
            calibrator.collect_data(feed)
        ranges = calibrator.compute_data()
    # The resize's own numbers, up to 255, are among these and do not matter.
    largest = max(float(abs(end).max()) for _, data in ranges.items() for end in data.range_value)
    for what, value, room in (("weight", weight, 1.0), ("activation", largest, _ROOM)):
        if not value * room <= LARGEST_HALF:
            raise InputError(
                f"{file.path} has a largest {what} of {value:.3g}, and float16 ends at {LARGEST_HALF:.0f}: use int8, "
                "or train with more weight decay"
            )
    return largest
