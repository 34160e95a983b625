"""A float graph with its weights and activations in 8 bits, by onnxruntime's static quantizer.

What the quantizer leaves to its caller is done here: it is fed batch by batch (its histograms else hold every
activation of every image at once), it quantizes products of two activations and the logits themselves unless kept from
it, and it prints and logs on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from robustcompress.artefact.feeds import feeds
from robustcompress.artefact.targets import Target
from robustcompress.export.ends import AFTER, BEFORE
from robustcompress.export.quiet import quiet
from robustcompress.export.reading import OnnxFile

Method = Literal["percentile", "entropy", "minmax"]

PERCENTILE = 99.99
"""Share of a tensor's values that its range holds under "percentile"."""

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""What has weights to quantize, and where integers save time."""

_PASSING = (
    *("Add", "Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Pad"),
    *("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"),
)
"""What else a convolutional network keeps in 8 bits, so that nothing is converted between two convolutions."""

_ATTENTION = ("LayerNormalization", "Softmax")
"""Where these stand, the residual stream has large outliers: only the products with weights are quantized."""


class Calibrated:
    """A graph, and the range of each of its activations on real images.

    Args:
        proto: Of the float file, all weights loaded; not touched.
        folder: Where temporary files may lie; the caller removes it.
        target: For which processor.
    """

    def __init__(self, proto: Any, folder: Path, target: Target) -> None:
        import onnx

        self.target = target
        self.proto = onnx.shape_inference.infer_shapes(proto)
        for number, node in enumerate(self.proto.graph.node):
            node.name = node.name or f"{node.op_type}_{number}"  # the quantizer knows nodes by their names
        inside = [n for n in self.proto.graph.node if not n.name.startswith((BEFORE, AFTER))]
        self._folder = folder
        # The softmax that ends a classifier is no attention.
        attention = any(node.op_type in _ATTENTION for node in inside[:-1])
        self._kinds = list(WEIGHTED if attention else (*WEIGHTED, *_PASSING))
        self._ranges: Any = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the nodes that have weights to quantize, from the first to the last."""
        constants = {tensor.name for tensor in self.proto.graph.initializer}
        nodes = [node for node in self.proto.graph.node if node.op_type in WEIGHTED]
        return tuple(node.name for node in nodes if node.input[1] in constants)

    def calibrate(self, file: OnnxFile, images: Tensor, method: Method) -> None:
        """Run images through the float graph and note the range of each activation.

        Args:
            file: The float file, open.
            images: Float [N, C, H, W] in [0, 1].
            method: How a range is chosen from what was seen.
        """
        import onnx
        from onnxruntime.quantization import CalibrationMethod
        from onnxruntime.quantization.calibrate import create_calibrator

        plain = self._folder / "plain.onnx"
        onnx.save_model(self.proto, str(plain))
        kind = {"percentile": "Percentile", "entropy": "Entropy", "minmax": "MinMax"}[method]
        options: dict[str, Any] = {"symmetric": self.target.symmetric}
        if method == "percentile":
            options["percentile"] = PERCENTILE
        with quiet():
            calibrator = create_calibrator(
                plain,
                self._kinds,
                augmented_model_path=str(self._folder / "augmented.onnx"),
                calibrate_method=CalibrationMethod[kind],
                extra_options=options,
            )
            for feed in feeds(file, images):
                calibrator.collect_data(feed)
            self._ranges = calibrator.compute_data()

    def quantized(self, *, keep: Iterable[str] = (), only: Sequence[str] = ()) -> Any:
        """Write the graph in 8 bits.

        Args:
            keep: Nodes that stay float.
            only: The one or few nodes to quantize; all where empty.

        Returns:
            An `onnx.ModelProto` of its own, with QuantizeLinear and DequantizeLinear around what is quantized.
        """
        import onnx
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        layers = set(self.layers)
        nodes = self.proto.graph.node
        products = [n.name for n in nodes if n.op_type in WEIGHTED and n.name not in layers]
        ends = [node.name for node in nodes if node.name.startswith((BEFORE, AFTER))]
        copied = onnx.ModelProto()
        copied.CopyFrom(self.proto)
        with quiet():
            quantizer = QDQQuantizer(
                copied,
                True,  # one scale a channel
                self.target.reduce_range,
                QuantType.QInt8,
                QuantType.QUInt8 if self.target.activations == "uint8" else QuantType.QInt8,
                self._ranges,
                list(only),
                sorted({*keep, *products, *ends}),
                self._kinds,
                {
                    "ActivationSymmetric": self.target.symmetric,
                    "WeightSymmetric": True,
                    "QuantizeBias": self.target.int32_bias,
                },
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        proto = quantizer.model.model
        _float_end(proto)
        return proto


def _float_end(proto: Any) -> None:
    """Let the last product give its sums as they are: of 256 possible logits, two classes would often get the same."""
    graph = proto.graph
    made_by = {name: node for node in graph.node for name in node.output}
    last = made_by[graph.output[0].name]
    if last.op_type == "Softmax":
        last = made_by.get(last.input[0], last)
    back = last if last.op_type == "DequantizeLinear" else None
    there = made_by.get(back.input[0]) if back is not None else None
    if back is None or there is None or there.op_type != "QuantizeLinear":
        return
    product, name = made_by.get(there.input[0]), back.output[0]
    readers = [node for node in graph.node for read in node.input if read == there.input[0]]
    if product is None or readers != [there]:
        return
    product.output[:] = [name if given == there.input[0] else given for given in product.output]
    graph.node.remove(back)
    graph.node.remove(there)
    unread = {*there.input[1:], *back.input[1:]} - {read for node in graph.node for read in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in unread]:
        graph.initializer.remove(tensor)
