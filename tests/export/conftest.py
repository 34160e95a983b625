"""One small network and the files that a deployment may meet: made once for all tests of the examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import robustcompress as rc
from robustcompress.export import export_onnx

SIDE = 32
CLASSES = ("plane", 'the "car"', "bird", "Käfer", "deer", "dog", "frog", "horse", "ship", "back\\slash")


@dataclass(frozen=True)
class Deployed:
    """A network and files that compute what it computes.

    Attributes:
        model: In eval mode.
        logits: float32 NCHW in [0, 1] to logits, as `export_onnx` writes it.
        fixed: The same with batch 4.
        probabilities: uint8 NHWC of the network's own size to probabilities.
        resizing: uint8 NHWC of any size to probabilities.
    """

    model: nn.Module
    logits: Path
    fixed: Path
    probabilities: Path
    resizing: Path

    @torch.no_grad()
    def expected(self, pixels: np.ndarray) -> np.ndarray:
        """Torch's own probabilities for uint8 `[N, H, W, 3]`."""
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        return self.model(images).softmax(1).numpy()


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    torch.manual_seed(0)
    model, _ = rc.build_model("resnet8", num_classes=len(CLASSES), width=0.25)
    usual = torch.from_numpy(pixels(64, seed=9)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():  # statistics of its own, and logits far enough apart that classes differ between images
        for _ in range(3):
            model.train()(usual)
        last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
        last.weight.mul_(8)
        last.bias.sub_(model.eval()(usual).mean(0))
    folder = tmp_path_factory.mktemp("files")
    logits, fixed = folder / "logits.onnx", folder / "fixed.onnx"
    export_onnx(model, logits, image_shape=(3, SIDE, SIDE), classes=CLASSES, verify=False)
    _with_batch(logits, fixed, 4)
    probabilities, resizing = folder / "probabilities.onnx", folder / "resizing.onnx"
    _with_pixels(logits, probabilities, resize=False)
    _with_pixels(logits, resizing, resize=True)
    return Deployed(model.eval(), logits, fixed, probabilities, resizing)


def pixels(count: int, *, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """Smooth random images, uint8 `[count, side, side, 3]`: of many colours, so that classes differ."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(side // 4, 1).repeat(side // 4, 2)


def _with_batch(source: Path, target: Path, batch: int) -> None:
    """Fix the batch of an exported graph, in less time than a second export takes."""
    import onnx

    proto = onnx.load(str(source))
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(proto, str(target))


def _with_pixels(source: Path, target: Path, *, resize: bool) -> None:
    """Put the conversion from uint8 NHWC before an exported graph, and the softmax behind it."""
    import onnx
    from onnx import TensorProto, helper

    proto = onnx.load(str(source))
    graph = proto.graph
    front: list[Any] = [
        helper.make_node("Transpose", ["images"], ["as_nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["as_nchw"], ["as_float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["as_float", "white"], ["in_range"]),
    ]
    graph.initializer.append(helper.make_tensor("white", TensorProto.FLOAT, [], [255.0]))
    ready = "in_range"
    if resize:
        graph.initializer.append(helper.make_tensor("side", TensorProto.INT64, [2], [SIDE, SIDE]))
        front.append(helper.make_node("Resize", [ready, "", "", "side"], ["fitted"], mode="linear", axes=[2, 3]))
        ready = "fitted"
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "images":
                node.input[index] = ready
    nodes = [*front, *graph.node, helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    sides = ["height", "width"] if resize else [SIDE, SIDE]
    graph.input.append(helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *sides, 3]))
    graph.output.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(CLASSES)]))
    facts = {pair.key: pair.value for pair in proto.metadata_props}
    told = {"layout": "NHWC", "input_type": "uint8", "input_range": "[0, 255]", "output": "probabilities"}
    helper.set_model_props(proto, facts | {f"robustcompress.{key}": value for key, value in told.items()})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, str(target))
