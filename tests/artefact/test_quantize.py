"""int8 and float16 files: what is in the graph, what they compute, what is said of them, what is refused."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import robustcompress as rc
from robustcompress.artefact import open_onnx, quantize_onnx
from robustcompress.artefact.int8 import Calibrated
from robustcompress.artefact.targets import TARGETS
from robustcompress.errors import AccuracyError, InputError

pytestmark = pytest.mark.xdist_group("quantize")

THREAT = rc.ThreatModel("linf", 0.05)
ANY = {"max_loss": 100, "judged": 60, "images": 64}


def network(name: str, data: rc.DataSplits, **options: object) -> torch.nn.Module:
    """Random weights, but for statistics and a last layer that fit the digits a little."""
    torch.manual_seed(0)
    model, _ = rc.build_model(name, num_classes=10, **options)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, labels = data.train.first(256).as_float(), data.train.first(256).labels
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def data() -> rc.DataSplits:
    return rc.load_data("digits")


@pytest.fixture(scope="module")
def convolutional(data: rc.DataSplits, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    model = network("resnet8", data, width=0.5, stem_stride=4)
    path = tmp_path_factory.mktemp("float") / "m.onnx"
    old = json.dumps(
        [{"attack": "autoattack", "accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 100, "suite": "standard"}]
    )
    rc.export_onnx(model, path, classes=data.classes, threat=THREAT, verify=False, metadata={"accuracy": old})
    return model, path


def initial(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def zero_points(proto: onnx.ModelProto) -> Iterator[np.ndarray]:
    values = initial(proto)
    yield from (values[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear")


@pytest.mark.parametrize("target", TARGETS)
def test_the_graph_is_what_the_target_wants(
    convolutional: tuple[torch.nn.Module, Path], data: rc.DataSplits, tmp_path: Path, target: str
) -> None:
    model, path = convolutional
    report = quantize_onnx(path, tmp_path / "q.onnx", data=data, target=target, **ANY)
    proto = onnx.load(report.path)
    onnx.checker.check_model(str(report.path), full_check=True)
    assert [entry.domain for entry in proto.opset_import] == [""], "operators that only onnxruntime knows"
    points = list(zero_points(proto))
    assert points and {point.dtype for point in points} == {np.dtype(TARGETS[target].activations)}
    assert all(point == 0 for point in points) or not TARGETS[target].symmetric
    values, floats = initial(proto), initial(onnx.load(path))
    made_by = {name: node for node in proto.graph.node for name in node.output}
    layers = [node for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 10
    for layer in layers:
        back = made_by[layer.input[1]]
        weight, scale, zero = (values[name] for name in back.input)
        channels = weight.shape[0]
        assert weight.dtype == np.int8 and scale.shape == (channels,) and not zero.any()
        assert abs(weight).max() <= (64 if TARGETS[target].reduce_range else 127)
        original = floats[back.input[0].removesuffix("_quantized")]
        spread = scale.reshape(-1, *[1] * (weight.ndim - 1))
        np.testing.assert_allclose(weight * spread, original, atol=float(scale.max()) * 0.51)
    assert made_by["logits"].op_type == "Gemm", "the logits are rounded to 256 values"
    assert report.float_bytes / report.bytes > 1.9
    file, images = open_onnx(report.path), data.test.first(60).as_float()
    with torch.no_grad():
        wanted = model(images)
    error = (file.scores(images) - wanted).pow(2).mean().sqrt() / wanted.std()
    assert error < 0.1 and file.precision == "int8"


def test_accuracies_are_those_of_the_files(
    convolutional: tuple[torch.nn.Module, Path], data: rc.DataSplits, tmp_path: Path
) -> None:
    model, path = convolutional
    lines: list[str] = []
    options = ANY | {"progress": lines.append, "attack": "pgd-2", "seed": 3}
    report = quantize_onnx(path, tmp_path / "q.onnx", data=data, model=model, target="x86-vnni", **options)
    images, labels = data.test.first(60).as_float(), data.test.first(60).labels
    smaller = open_onnx(report.path)
    attacked = rc.robust.pgd(model, images, labels, THREAT, steps=2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = [model(x).argmax(1) == labels for x in (images, attacked)]
    after = [smaller.scores(x).argmax(1) == labels for x in (images, attacked)]
    assert torch.equal(report.clean.before, before[0]) and torch.equal(report.clean.after, after[0])
    assert report.robust is not None
    assert torch.equal(report.robust.before, before[0] & before[1])
    assert torch.equal(report.robust.after, after[0] & after[1])
    assert float(before[1].float().mean()) < float(before[0].float().mean()), "the attack attacks nothing"
    said = smaller.metadata
    rows = json.loads(said["accuracy"])
    assert [row["attack"] for row in rows] == ["clean", "pgd-2"]
    assert rows[0]["accuracy"] == pytest.approx(float(after[0].float().mean())) and rows[0]["n"] == 60
    assert "replayed" in rows[1]["suite"] and "autoattack" not in said["accuracy"]
    assert "autoattack" in said["accuracy_float"], "what was measured on the float file is not of this one"
    account = json.loads(said["quantization"])
    assert account["calibration"] == {"images": 64, "data": "digits", "kind": "clean", "method": "percentile"}
    assert account["float_sha256"] == open_onnx(path).sha256() and said["precision"] == "int8"
    assert smaller.classes == data.classes and smaller.threat == THREAT
    assert json.loads(json.dumps(report.to_json()))["robust"]["loss_points"] == pytest.approx(report.robust.loss)
    assert "times smaller" in str(report) and "pgd-2" in str(report) and any("range" in line for line in lines)


@pytest.mark.parametrize("method", ["percentile", "entropy", "minmax"])
def test_every_method_gives_ranges_within_what_was_seen(
    convolutional: tuple[torch.nn.Module, Path], data: rc.DataSplits, tmp_path: Path, method: str
) -> None:
    _, path = convolutional
    report = quantize_onnx(path, tmp_path / "q.onnx", data=data, target="x86-vnni", method=method, **ANY)
    proto = onnx.load(report.path)
    values = initial(proto)
    first = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")  # of the normalised images
    scale, zero = (values[name] for name in first.input[1:])
    normalised = _tensor(path, first.input[0], data.train.first(64).as_float())
    low, high = -float(scale) * int(zero), float(scale) * (255 - int(zero))
    assert float(normalised.min()) - 0.05 <= low <= 0 <= high <= float(normalised.max()) + 0.05
    assert high - low > 0.5 * float(normalised.max() - normalised.min())


def _tensor(path: Path, name: str, images: torch.Tensor) -> torch.Tensor:
    proto = onnx.load(path)
    proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([name], {"images": images.numpy()})[0])


def test_what_stands_around_the_network_stays_float(data: rc.DataSplits, tmp_path: Path) -> None:
    model = network("resnet8", data, width=0.5, stem_stride=4)
    options = {"input": "uint8", "resize": True, "softmax": True, "batch": 5}
    rc.export_onnx(model, tmp_path / "m.onnx", threat=THREAT, **options)
    for to in ("int8", "float16"):
        kinds = {"to": to, "model": model, "attack": "fgsm", "float16_io": to == "float16"}
        report = quantize_onnx(tmp_path / "m.onnx", tmp_path / f"{to}.onnx", data=data, **ANY | kinds)
        proto = onnx.load(report.path)
        onnx.checker.check_model(str(report.path), full_check=True)
        made_by = {name: node for node in proto.graph.node for name in node.output}
        last = made_by["probabilities"]
        assert last.op_type == "Softmax" and made_by[last.input[0]].op_type in ("Gemm", "Cast")
        ends = [node for node in proto.graph.node if node.name.startswith("preprocess/")]
        assert len(ends) == len([n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.name.startswith("pre")])
        for node in ends:
            read = [made_by[name].op_type for name in node.input if name in made_by]
            assert not {"QuantizeLinear", "DequantizeLinear"} & set(read)
        file = open_onnx(report.path)
        assert file.input_type == "uint8" and file.output_kind == "probabilities" and file.batch == 5 and file.resizes
        images = data.test.first(23).as_float()
        with torch.no_grad():
            wanted = model(images).log_softmax(1)
        assert float((file.scores(images) - wanted).abs().mean()) < (0.1 if to == "int8" else 0.01)


def quantized_error(model: torch.nn.Module, data: rc.DataSplits, folder: Path) -> tuple[float, onnx.ModelProto]:
    rc.export_onnx(model, folder / "m.onnx", verify=False)
    report = quantize_onnx(folder / "m.onnx", folder / "q.onnx", data=data, target="x86-vnni", **ANY)
    images = data.test.first(40).as_float()
    with torch.no_grad():
        wanted = model(images)
    found = open_onnx(report.path).scores(images)
    return float((found - wanted).pow(2).mean().sqrt() / wanted.std()), onnx.load(report.path)


def test_of_attention_only_the_products_with_weights_are_quantized(data: rc.DataSplits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, _ = rc.build_model("vit_micro", num_classes=10, depth=1)
    error, proto = quantized_error(model.eval(), data, tmp_path)
    assert error < 0.1
    made_by = {name: node for node in proto.graph.node for name in node.output}
    products = [node for node in proto.graph.node if node.op_type == "MatMul"]
    read = [made_by[node.input[1]].op_type == "DequantizeLinear" for node in products]
    assert (sum(read), len(read)) == (4, 6)
    others = [node for node in proto.graph.node if node.op_type in ("Softmax", "LayerNormalization")]
    assert others and all(made_by[node.input[0]].op_type != "DequantizeLinear" for node in others[:1])


def test_depthwise_kernels_get_one_scale_a_channel(data: rc.DataSplits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU6()),
        *(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU6(), torch.nn.Conv2d(8, 16, 1), torch.nn.ReLU6()),
        *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10)),
    )
    with torch.no_grad():  # of one scale for all, these channels would keep a bit or two
        model[2].weight *= torch.logspace(-2, 0, 8).view(-1, 1, 1, 1)
    error, proto = quantized_error(model.eval(), data, tmp_path)
    assert error < 0.1
    (kernel,) = [v for v in initial(proto).values() if v.dtype == np.int8 and v.shape == (8, 1, 3, 3)]
    assert (abs(kernel).reshape(8, -1).max(1) > 120).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "vit_tiny", "torchvision:efficientnet_b0"])
def test_whole_networks(data: rc.DataSplits, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, _ = rc.build_model(name, num_classes=10)
    with torch.no_grad():
        for _ in range(3):
            model(data.train.first(64).as_float())
    assert quantized_error(model.eval(), data, tmp_path)[0] < 0.15


def test_float16_holds_what_float32_held(
    convolutional: tuple[torch.nn.Module, Path], data: rc.DataSplits, tmp_path: Path
) -> None:
    model, path = convolutional
    for float16_io in (False, True):
        report = quantize_onnx(
            path, tmp_path / "h.onnx", data=data, to="float16", float16_io=float16_io, overwrite=True, **ANY
        )
        onnx.checker.check_model(str(report.path), full_check=True)
        file, images = open_onnx(report.path), data.test.first(32).as_float()
        assert file.input_type == ("float16" if float16_io else "float32") == file.metadata["input_type"]
        with torch.no_grad():
            torch.testing.assert_close(file.scores(images), model(images), rtol=1e-2, atol=2e-2)
        kinds = {tensor.data_type for tensor in onnx.load(report.path).graph.initializer if len(tensor.dims) > 1}
        assert kinds == {TensorProto.FLOAT16} and file.precision == "float16" and report.target == "gpu"
        assert 1.8 < report.float_bytes / report.bytes < 2.1


def test_numbers_that_float16_does_not_hold_are_refused(data: rc.DataSplits, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.append(torch.nn.Linear(4, 10))
    with torch.no_grad():
        model[0].weight.fill_(30_000.0)
    rc.export_onnx(model.eval(), tmp_path / "m.onnx", verify=False)
    with pytest.raises(InputError, match=r"largest activation of .* float16 ends at 65504: use int8"):
        quantize_onnx(tmp_path / "m.onnx", tmp_path / "h.onnx", data=data, to="float16", **ANY)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_layers_that_are_kept_stay_float(
    convolutional: tuple[torch.nn.Module, Path], data: rc.DataSplits, tmp_path: Path
) -> None:
    _, path = convolutional
    options = ANY | {"keep_first_last": True, "keep_sensitive": 2}
    report = quantize_onnx(path, tmp_path / "q.onnx", data=data, **options)
    proto = onnx.load(report.path)
    names = set(initial(proto))
    layers = [node for node in onnx.load(path).graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(report.kept) == 4 and {layers[0].name, layers[-1].name} < set(report.kept)
    for layer in layers:
        assert (layer.input[1] in names) == (layer.name in report.kept)
    with pytest.raises(InputError, match="12 of 10 layers would stay float"):
        quantize_onnx(path, tmp_path / "r.onnx", data=data, **ANY | {"keep_first_last": True, "keep_sensitive": 10})


def test_the_most_sensitive_layer_is_the_one_whose_weights_suit_int8_least(data: rc.DataSplits, tmp_path: Path) -> None:
    model = network("resnet8", data, width=0.5, stem_stride=4)
    layer = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][4]
    with torch.no_grad():  # one weight of each channel takes the whole range for itself
        layer.weight[:, 0, 0, 0] += 40 * layer.weight.abs().max()
    rc.export_onnx(model, tmp_path / "m.onnx", verify=False)
    report = quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", data=data, **ANY | {"keep_sensitive": 1})
    weights = initial(onnx.load(report.path))
    kernels = [value for value in weights.values() if value.ndim == 4 and len(value) > 1]
    (kept,) = [value for value in kernels if value.dtype == np.float32]
    assert kept.shape == tuple(layer.weight.shape) and abs(kept).max() > 10 * np.median(abs(kept))


def test_attacked_calibration_widens_the_ranges(
    convolutional: tuple[torch.nn.Module, Path], data: rc.DataSplits, tmp_path: Path
) -> None:
    model, path = convolutional
    options = ANY | {"method": "minmax", "target": "x86-vnni", "model": model, "attack": "fgsm"}
    options["threat"] = rc.ThreatModel("linf", 0.3)
    scales = []
    for kind in ("clean", "adversarial"):
        report = quantize_onnx(path, tmp_path / f"{kind}.onnx", data=data, calibrate=kind, **options)
        proto = onnx.load(report.path)
        values = initial(proto)
        nodes = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
        scales.append(np.array([float(values[node.input[1]]) for node in nodes]))
    assert (scales[1] > scales[0]).mean() > 0.5


# What is refused, and what is left behind


def test_a_file_that_loses_too_much_is_not_written(
    convolutional: tuple[torch.nn.Module, Path], data: rc.DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = convolutional
    whole = Calibrated.quantized

    def broken(self: Calibrated, **options: object) -> onnx.ModelProto:
        proto = whole(self, **options)  # type: ignore[arg-type]
        gemm = next(node for node in proto.graph.node if node.op_type == "Gemm")
        name = next(n for node in proto.graph.node if gemm.input[1] in node.output for n in node.input[:1])
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), name))
        return proto

    monkeypatch.setattr(Calibrated, "quantized", broken)
    options = {"data": data, "images": 64, "judged": 60}
    with pytest.raises(AccuracyError, match=r"(?s)loses more than 2 points:\n  clean .*nothing was written.*--keep"):
        quantize_onnx(path, tmp_path / "q.onnx", **options)
    assert list(tmp_path.iterdir()) == []
    report = quantize_onnx(path, tmp_path / "q.onnx", allow_loss=True, **options)
    assert not report.within and "written because that was allowed" in str(report) and report.path.is_file()


def test_an_interrupted_quantization_leaves_nothing(
    convolutional: tuple[torch.nn.Module, Path],
    data: rc.DataSplits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import robustcompress.artefact.quantize as module

    _, path = convolutional
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    out.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    handlers, disabled = list(logging.root.handlers), logging.root.manager.disable
    for name in ("write_proto", "changes_of", "put_in_place"):
        with monkeypatch.context() as patch:

            def stop(*args: object, **options: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(module, name, stop)
            with pytest.raises(KeyboardInterrupt):
                quantize_onnx(path, out / "q.onnx", data=data, **ANY)
        assert list(out.iterdir()) == [] and list(scratch.iterdir()) == [], name
    quantize_onnx(path, out / "q.onnx", data=data, **ANY)
    assert [file.name for file in out.iterdir()] == ["q.onnx"] and list(scratch.iterdir()) == []
    assert capfd.readouterr() == ("", ""), "onnxruntime chatters"
    assert logging.root.handlers == handlers and logging.root.manager.disable == disabled


def test_all_that_cannot_work_is_said_at_once(
    convolutional: tuple[torch.nn.Module, Path], data: rc.DataSplits, tmp_path: Path
) -> None:
    _, path = convolutional
    with pytest.raises(InputError) as caught:
        quantize_onnx(
            path,
            tmp_path / "no" / "q.pb",
            data=data,
            to="int9",  # type: ignore[arg-type]
            target="x68",
            calibrate="adversarial",
            method="magic",  # type: ignore[arg-type]
            images=8,
            judged=0,
            max_loss=-1,
            attack="autoattack",
            keep_sensitive=-1,
        )
    parts = ("to='int9'", "did you mean 'x86'", "method='magic'", "images=8: must be at least 32", "judged=0")
    parts += ("max_loss=-1", "attack='autoattack'", "keep_sensitive=-1", "needs the network in torch", "end in .onnx")
    for part in (*parts, "does not exist; make it first"):
        assert part in str(caught.value), part
    with pytest.raises(InputError, match=r"(?s)source is a ResNet.*data='digits': give the splits"):
        quantize_onnx(convolutional[0], tmp_path / "q.onnx", data="digits")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="onnxruntime computes float16 in float32 on CPUs"):
        quantize_onnx(path, tmp_path / "q.onnx", data=data, to="float16", target="arm")


def test_data_and_networks_of_something_else_are_refused(
    convolutional: tuple[torch.nn.Module, Path], data: rc.DataSplits, tmp_path: Path
) -> None:
    _, path = convolutional
    few = replace(data, train=data.train.first(20))
    with pytest.raises(InputError, match="20 training images: calibration needs at least 32"):
        quantize_onnx(path, tmp_path / "q.onnx", data=few)
    with pytest.raises(InputError, match=r"tells 10 classes apart \(0, 1, 2, ...\), the images of digits are of 10"):
        quantize_onnx(path, tmp_path / "q.onnx", data=replace(data, classes=tuple("abcdefghij")))
    with pytest.raises(InputError, match=r"made for images of \(3, 32, 32\), these have \(3, 16, 16\)"):
        quantize_onnx(path, tmp_path / "q.onnx", data=rc.load_data("digits", image_size=16))
    with pytest.raises(InputError, match="does not compute what this network computes"):
        quantize_onnx(path, tmp_path / "q.onnx", data=data, model=rc.build_model("resnet8", width=0.25)[0])
    (tmp_path / "torn.onnx").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"torn\.onnx cannot be opened"):
        quantize_onnx(tmp_path / "torn.onnx", tmp_path / "q.onnx", data=data)
    report = quantize_onnx(path, tmp_path / "q.onnx", data=data, **ANY)
    with pytest.raises(InputError, match="in int8 or quantized already"):
        quantize_onnx(report.path, tmp_path / "r.onnx", data=data)
    with pytest.raises(InputError, match="is the float file itself"):
        quantize_onnx(report.path, report.path, data=data, overwrite=True)


def test_a_result_is_exported_first(data: rc.DataSplits, tmp_path: Path) -> None:
    from types import SimpleNamespace

    model = network("resnet8", data, width=0.5, stem_stride=4)
    result = SimpleNamespace(model=model, image_shape=(3, 32, 32), classes=data.classes, threat=THREAT)
    report = rc.quantize_onnx(result, tmp_path / "q.onnx", data=data, attack="fgsm", **ANY)
    assert report.robust is not None and [file.name for file in tmp_path.iterdir()] == ["q.onnx"]
    assert open_onnx(report.path).classes == data.classes and report.target == "x86"
