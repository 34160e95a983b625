from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import robustcompress as rc
from robustcompress.artefact import open_onnx
from robustcompress.errors import InputError

CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    torch.manual_seed(0)
    model, _ = rc.build_model("resnet8", num_classes=10, width=0.5)
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    rc.export_onnx(model.eval(), path, classes=CLASSES, threat=rc.ThreatModel("linf", 4 / 255), verify=False)
    return model, path


def toy(
    path: Path, shape: list[object], kind: int, *, outputs: int = 1, metadata: dict[str, str] | None = None
) -> Path:
    """Sums all pixels of an image, times 1 and 2: two scores that are easily computed by hand."""
    size = helper.make_tensor("scale", TensorProto.FLOAT, [1, 2], [1.0, 2.0])
    axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
    two = helper.make_tensor("two", TensorProto.INT64, [2], [-1, 1])
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["float", "axes"], ["sum"], keepdims=0),
        helper.make_node("Reshape", ["sum", "two"], ["column"]),
        helper.make_node("MatMul", ["column", "scale"], ["y"]),
        helper.make_node("Identity", ["y"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("y", "z")[:outputs]],
        [size, axes, two],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    proto.ir_version = 10
    helper.set_model_props(proto, {f"robustcompress.{key}": value for key, value in (metadata or {}).items()})
    onnx.save(proto, str(path))
    return path


def test_a_file_of_ours_computes_what_the_model_computes(written: tuple[torch.nn.Module, Path]) -> None:
    model, path = written
    file = open_onnx(path)
    images = torch.rand(70, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(file.scores(images), model(images), rtol=1e-4, atol=1e-4)
    assert (file.layout, file.input_type, file.output_kind, file.batch) == ("NCHW", "float32", "logits", None)
    assert file.classes == tuple(CLASSES) and file.threat == rc.ThreatModel("linf", 4 / 255)
    assert file.image_shape == (3, 32, 32) and not file.resizes and file.precision == "float32"
    assert file.scores(images[:0]).shape == (0, 10)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("kind", "scale"), [(TensorProto.UINT8, 255), (TensorProto.FLOAT, 1), (TensorProto.FLOAT16, 1)]
)
def test_images_arrive_as_the_file_wants_them(tmp_path: Path, layout: str, kind: int, scale: int) -> None:
    shape: list[object] = ["n", 3, 4, 5] if layout == "NCHW" else ["n", 4, 5, 3]
    file = open_onnx(toy(tmp_path / "toy.onnx", shape, kind))
    assert file.layout == layout and file.image_shape == (3, 4, 5)
    images = torch.randint(0, 256, (3, 3, 4, 5)) / 255
    sums = images.sum((1, 2, 3)) * scale
    torch.testing.assert_close(file.scores(images), torch.stack([sums, 2 * sums], 1), rtol=2e-3, atol=1e-3)
    fed = file.feed(images)
    expected = (images * scale).permute(0, 2, 3, 1) if layout == "NHWC" else images * scale
    np.testing.assert_allclose(fed, expected.numpy(), rtol=1e-3, atol=1e-6)


def test_a_fixed_batch_is_filled_up(tmp_path: Path) -> None:
    file = open_onnx(toy(tmp_path / "toy.onnx", [4, 3, 2, 2], TensorProto.FLOAT))
    images = torch.rand(6, 3, 2, 2)
    assert file.batch == 4
    torch.testing.assert_close(file.scores(images)[:, 0], images.sum((1, 2, 3)))


def test_probabilities_become_scores_with_the_same_margins(tmp_path: Path) -> None:
    path = toy(tmp_path / "toy.onnx", ["n", 1, 1, 1], TensorProto.FLOAT, metadata={"output": "probabilities"})
    scores = open_onnx(path).scores(torch.tensor([0.25, 0.0]).view(2, 1, 1, 1))
    assert torch.isfinite(scores).all()
    assert float(scores[0].exp()[1]) == pytest.approx(0.5)


def test_a_file_that_resizes_says_for_which_size_it_was_made(tmp_path: Path) -> None:
    shape: list[object] = ["n", "h", "w", 3]
    path = toy(tmp_path / "toy.onnx", shape, TensorProto.UINT8, metadata={"image_shape": "[3, 8, 8]"})
    file = open_onnx(path)
    assert file.resizes and file.image_shape == (3, 8, 8) and file.layout == "NHWC"
    with pytest.raises(InputError, match="does not say for which image size"):
        open_onnx(toy(path, shape, TensorProto.UINT8))


@pytest.mark.parametrize(
    ("shape", "kind", "outputs", "metadata", "said"),
    [
        (["n", 3, 4, 4], TensorProto.FLOAT, 2, {}, "1 inputs and 2 outputs"),
        (["n", 3, 4, 4], TensorProto.INT64, 1, {}, "images are float, float16 or uint8"),
        (["n", 3, 4, 4], TensorProto.FLOAT, 1, {"classes": "7"}, "is no list of names"),
        (["n", 4, 4, 5], TensorProto.FLOAT, 1, {"layout": "NHWC"}, "1 or 3 channels"),
        (["n", 3, 4, 4], TensorProto.FLOAT, 1, {"classes": '["a"]'}, "names 1 classes and has 2 scores"),
        (["n", 3, 4, 4], TensorProto.FLOAT, 1, {"threat": "{}"}, "is no threat"),
        (["n", 3, 4, 4], TensorProto.FLOAT, 1, {"threat": '{"norm": "linf", "eps": -1}'}, "is no threat"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_error(
    tmp_path: Path, shape: list[object], kind: int, outputs: int, metadata: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match="no image classifier that can be judged") as caught:
        open_onnx(toy(tmp_path / "toy.onnx", shape, kind, outputs=outputs, metadata=metadata))
    assert said in str(caught.value)


def test_metadata_of_ours_is_read_without_its_prefix(written: tuple[torch.nn.Module, Path]) -> None:
    metadata = open_onnx(written[1]).metadata
    assert json.loads(metadata["image_shape"]) == [3, 32, 32] and not any("robustcompress" in key for key in metadata)
