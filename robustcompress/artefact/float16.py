"""A float graph in half precision, for processors that compute in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from robustcompress.artefact.feeds import feeds
from robustcompress.errors import InputError
from robustcompress.export.ends import AFTER, BEFORE
from robustcompress.export.quiet import quiet
from robustcompress.export.reading import OnnxFile

LARGEST_HALF = 65504.0
"""The largest number that float16 holds."""

_ROOM = 2.0  # other images may reach further than those that were looked at


def to_float16(proto: Any, *, float16_io: bool) -> Any:
    """Write a graph in float16, but for what stands around its network.

    Args:
        proto: Of the float file, all weights loaded; not touched.
        float16_io: Whether a float input and the output become float16 as well.

    Returns:
        An `onnx.ModelProto` of its own.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    for number, node in enumerate(copied.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    ends = [node.name for node in copied.graph.node if node.name.startswith((BEFORE, AFTER))]
    with quiet():
        return convert_float_to_float16(copied, keep_io_types=not float16_io, node_block_list=ends)


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
