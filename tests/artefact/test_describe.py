from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import robustcompress as rc
from robustcompress.artefact.describe import describe_onnx
from robustcompress.errors import InputError
from tests.artefact.test_file import toy

pytestmark = pytest.mark.xdist_group("quantize")


def test_a_file_of_ours_is_described_as_it_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = rc.build_model("resnet8", num_classes=10, width=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand_like(parameter) < 0.5] = 0.0
            else:
                parameter.uniform_(0.5, 1)  # the exporter leaves out biases of zero
    rows = [{"attack": "autoattack", "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 100, "suite": "standard"}]
    report = rc.export_onnx(
        model.eval(), tmp_path / "m.onnx", classes=list("abcdefghij"), metadata={"accuracy": json.dumps(rows)}
    )
    found = describe_onnx(report.path)
    assert found.inputs == ("images: float32 [batch, 3, 32, 32]",) and found.outputs == ("logits: float32 [batch, 10]",)
    assert found.opset == 20 and found.domains == () and found.precision == "float32" and found.data == ()
    assert found.bytes == report.path.stat().st_size and found.nodes["Conv"] == 9 and found.nodes["Gemm"] == 1
    assert found.zeros == pytest.approx(report.zeros) and 0.45 < found.zeros < 0.55
    channels = sum(m.bias.numel() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    # Of a batch norm's two numbers a channel the bias is left; the normalisation adds three means and deviations.
    folded = sum(p.numel() for p in model.parameters()) - channels + 6
    assert found.weights["float32"] == folded
    assert found.metadata["classes"] == list("abcdefghij") and found.metadata["accuracy"] == rows
    assert json.loads(json.dumps(found.to_json()))["parameters"] == found.parameters


def test_a_pair_is_read_whole_or_refused(tmp_path: Path) -> None:
    model, _ = rc.build_model("resnet8", num_classes=10, width=0.5)
    report = rc.export_onnx(model, tmp_path / "m.onnx", external_data=True, verify=False)
    found = describe_onnx(report.path)
    assert found.data == (report.data[0].name,) and found.bytes == report.bytes and found.zeros < 0.01
    report.data[0].unlink()
    with pytest.raises(InputError, match=r"\.data, which is not beside it: copy both files"):
        describe_onnx(report.path)


def test_foreign_files_are_described_too(tmp_path: Path) -> None:
    path = toy(tmp_path / "toy.onnx", ["n", 3, 4, 5], TensorProto.UINT8, outputs=2)
    proto = onnx.load(path)
    proto.producer_name, proto.producer_version = "somebody", "7"
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros((2, 2), np.float16), "unused"))
    helper.set_model_props(proto, {"their.key": "value"})
    onnx.save(proto, path)
    found = describe_onnx(path)
    assert found.inputs == ("x: uint8 [n, 3, 4, 5]",) and len(found.outputs) == 2 and found.producer == "somebody 7"
    assert found.metadata == {} and found.foreign == {"their.key": "value"}
    assert found.weights == {"int64": 5, "float16": 4, "float32": 2} and found.zeros == pytest.approx(4 / 6)


@pytest.mark.parametrize("content", [b"", b"hello", bytes(range(256)) * 20], ids=["empty", "text", "noise"])
def test_what_is_no_onnx_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx is torn, or no ONNX file"):
        describe_onnx(tmp_path / "m.onnx")


def test_what_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; name an ONNX file"):
        describe_onnx(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="is a directory"):
        describe_onnx(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_torn_file_is_one_clear_error(tmp_path: Path, share: float) -> None:
    path = toy(tmp_path / "toy.onnx", ["n", 3, 4, 5], TensorProto.UINT8)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="is torn, or no ONNX file"):
        describe_onnx(path)
