"""The exported file against the model, what it says about itself, and the scripts that use it."""

from __future__ import annotations

import copy
import json
import logging
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import robustcompress
from robustcompress.errors import InputError
from robustcompress.export import ExportReport, export_onnx, load_session, verify_onnx
from robustcompress.export.graph import opset_of
from robustcompress.export.metadata import without_paths
from robustcompress.models import resnet8
from robustcompress.robust import ThreatModel

# One process: the exported files are made once, and the exporter itself takes seconds to import.
pytestmark = pytest.mark.xdist_group("export")

SCRIPTS = Path(__file__).parents[1] / "export"
CLASSES = ("plane", "car", "bird", "Käfer", "deer")
THREAT = ThreatModel("linf", 8 / 255)


class Small(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, size, 3, padding=1, bias=False), nn.BatchNorm2d(size)
        self.conv2, self.bn2 = nn.Conv2d(size, size, 3, padding=1), nn.BatchNorm2d(size)
        self.fc = nn.Linear(size, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def small() -> Small:
    torch.manual_seed(0)
    model = Small()
    for _ in range(3):  # statistics that a graph in training mode would not use
        model(torch.rand(16, 3, 16, 16) * 2 - 0.5)
    return model


def images(n: int, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ExportReport]:
    model = small()  # in training mode, as a loop leaves it
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    metadata = {"strategy": "grape", "robustcompress.data": "/home/someone/pictures/cats"}
    report = export_onnx(model, path, classes=CLASSES, metadata=metadata, sample=images(9), threat=THREAT)
    return model, report


def run(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = load_session(path, threads=1)
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


# What is written


@pytest.mark.parametrize("batch", [1, 3, 17])
def test_any_batch_gives_the_logits_of_torch(exported: tuple[nn.Module, ExportReport], batch: int) -> None:
    model, report = exported
    x = images(batch)
    torch.testing.assert_close(run(report.path, x), copy.deepcopy(model).eval()(x).detach(), atol=1e-5, rtol=1e-5)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = small().to(memory_format=torch.channels_last)
    model.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "m.onnx", image_shape=(3, 16, 16), verify=False)
    assert model.training and not model.conv1.weight.requires_grad and model.conv2.weight.requires_grad
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parity_covers_clean_and_adversarial_images_at_batch_1_and_7(
    exported: tuple[nn.Module, ExportReport],
) -> None:
    checks = exported[1].parity
    assert [(c.name, c.batch, c.images) for c in checks] == [
        ("clean", 1, 9),
        ("clean", 7, 9),
        ("adversarial", 1, 9),
        ("adversarial", 7, 9),
    ]
    assert all(c.relative_diff < 1e-5 and c.argmax_agreement == 1 for c in checks)
    assert checks[0].scale != checks[2].scale, "the adversarial images are the clean ones"


def test_the_file_is_alone_and_says_nothing_about_this_machine(exported: tuple[nn.Module, ExportReport]) -> None:
    import onnx

    path = exported[1].path
    assert [p.name for p in path.parent.iterdir()] == ["small.onnx"]
    content = path.read_bytes()
    assert exported[1].bytes == len(content)
    for secret in (str(Path.home()), str(Path(__file__).parents[1]), sys.prefix, "site-packages", "someone", 'File "'):
        assert len(secret) < 2 or secret.encode() not in content, secret
    assert not re.findall(rb"(?:/[A-Za-z][\w.-]+){2,}", content)
    proto = onnx.load(str(path))
    assert all(node.metadata_props == [] and not node.doc_string for node in proto.graph.node)
    assert {tensor.data_type for tensor in proto.graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)


def test_batch_is_symbolic_and_the_opset_is_the_one_asked_for(exported: tuple[nn.Module, ExportReport]) -> None:
    import onnx

    proto = onnx.load(str(exported[1].path))
    for value in (proto.graph.input[0], proto.graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert opset_of(proto) == exported[1].opset == 20


def test_metadata_reaches_onnxruntime(exported: tuple[nn.Module, ExportReport]) -> None:
    stored = load_session(exported[1].path).get_modelmeta().custom_metadata_map
    assert stored == dict(exported[1].metadata)
    assert all(key.startswith("robustcompress.") for key in stored)
    assert tuple(json.loads(stored["robustcompress.classes"])) == CLASSES
    assert stored["robustcompress.strategy"] == "grape"
    assert stored["robustcompress.data"] == "cats"
    assert stored["robustcompress.input_range"] == "[0, 1]"
    assert stored["robustcompress.layout"] == "NCHW"
    assert stored["robustcompress.normalisation"] == "inside the graph"
    assert json.loads(stored["robustcompress.image_shape"]) == [3, 16, 16]
    assert stored["robustcompress.version"] == robustcompress.__version__
    assert stored["robustcompress.torch"] == torch.__version__
    threat = json.loads(stored["robustcompress.threat"])
    assert threat.pop("label") == "linf 8/255"
    assert ThreatModel.from_json(threat) == THREAT


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/images", "images"),
        ("/home/My Name/images/", "images"),
        ("C:\\Users\\me\\x", "x"),
        ('{"root": "C:\\\\Users\\\\me", "n": 3}', '{"root": "me", "n": 3}'),
        ("~/d/x", "x"),
        ('{"root": "/home/alice/d"}', '{"root": "d"}'),
        ("linf 8/255", "linf 8/255"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("train/test 80/20", "train/test 80/20"),
        ("", ""),
    ],
)
def test_paths_of_the_machine_are_cut_down(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_a_result_brings_its_own_facts_and_arguments_win(tmp_path: Path) -> None:
    model = small().double()
    result = SimpleNamespace(
        model=model,
        image_shape=(3, 12, 12),
        classes=CLASSES,
        threat=ThreatModel("l2", 0.5),
        export_metadata=lambda: {"strategy": "hydra", "seed": "3", "robustcompress.layout": "wrong"},
    )
    report = export_onnx(result, tmp_path / "r.onnx", metadata={"seed": "4"}, classes=[c.upper() for c in CLASSES])
    assert json.loads(report.metadata["robustcompress.image_shape"]) == [3, 12, 12]
    assert json.loads(report.metadata["robustcompress.classes"])[0] == "PLANE"
    assert json.loads(report.metadata["robustcompress.threat"])["label"] == "l2 0.5"
    assert report.metadata["robustcompress.strategy"] == "hydra"
    assert report.metadata["robustcompress.seed"] == "4"
    assert report.metadata["robustcompress.layout"] == "NCHW"
    assert [c.name for c in report.parity] == ["random", "random", "adversarial", "adversarial"]
    assert next(model.parameters()).dtype is torch.float64


def test_built_in_model_in_channels_last_and_training_mode(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    model = resnet8(width=0.5).to(memory_format=torch.channels_last)
    model(torch.rand(8, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    sample = images(4, 32).contiguous(memory_format=torch.channels_last)
    root = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = export_onnx(model, tmp_path / "resnet8.onnx", sample=sample, threat=THREAT, opset=18)
    assert capfd.readouterr() == ("", ""), "the exporter chatters"
    assert logging.root.manager.disable == root
    assert report.opset == 18
    for batch in (1, 3, 17):
        x = images(batch, 32)
        expected = copy.deepcopy(model).eval()(x).detach()
        torch.testing.assert_close(run(report.path, x), expected, atol=1e-4, rtol=1e-4)


def test_a_fixed_batch_is_fixed(tmp_path: Path) -> None:
    report = export_onnx(small(), tmp_path / "fixed.onnx", image_shape=(3, 16, 16), batch=4)
    assert report.batch == "4"
    assert [c.batch for c in report.parity] == [4]
    session = load_session(report.path)
    assert session.get_inputs()[0].shape == [4, 3, 16, 16]
    with pytest.raises(InputError, match="batch 2: the file accepts only 4"):
        verify_onnx(report.path, small(), images(3), batches=(2,))


def test_report_reads_well(exported: tuple[nn.Module, ExportReport]) -> None:
    report = exported[1]
    text = str(report)
    assert "small.onnx" in text and "opset 20" in text and "adversarial" in text and "100.00 %" in text
    assert "images: float32 [batch, 3, 16, 16] in [0, 1] -> logits" in text
    assert len({len(line) for line in text.splitlines()[2:]}) == 1, "columns do not line up"
    data = json.loads(json.dumps(report.to_json()))
    assert data["opset"] == 20 and data["bytes"] == report.bytes and data["path"] == str(report.path)
    assert data["parity"][0]["relative_diff"] == report.parity[0].max_abs_diff / report.parity[0].scale
    settings: dict[str, Any] = {"opset": 20, "batch": "dynamic", "parity": (), "metadata": {}}
    bare = ExportReport(path=Path("x.onnx"), bytes=2_500_000, compressed_bytes=2_300_000, zeros=0.0, **settings)
    assert "2.50 MB" in str(bare) and "not verified" in str(bare) and "zeros" not in str(bare)
    sparse = ExportReport(path=Path("x.onnx"), bytes=2_500_000, compressed_bytes=400_000, zeros=0.9, **settings)
    assert "90.0 % of the weights are zeros: 400.0 kB compressed" in str(sparse)


# The scripts


def serve(model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run serve_numpy.py in an interpreter that cannot import torch."""
    program = (
        "import sys, runpy\n"
        "sys.modules['torch'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(SCRIPTS / "serve_numpy.py"), str(model), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, encoding="utf-8")


def test_serving_without_torch_gives_the_probabilities_of_torch(
    exported: tuple[nn.Module, ExportReport], tmp_path: Path
) -> None:
    model, report = exported
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    done = serve(report.path, str(tmp_path / "0.png"), str(tmp_path / "1.png"), "--top", "2")
    assert done.returncode == 0, done.stderr
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    shares, classes = copy.deepcopy(model).eval()(x).softmax(1).topk(2)
    expected = [
        "  ".join([f"{i}.png", *(f"{CLASSES[k]} {p:.3f}" for k, p in zip(classes[i], shares[i], strict=True))])
        for i in range(2)
    ]
    assert done.stdout.splitlines() == expected

    (tmp_path / "broken.png").write_text("no image")
    done = serve(report.path, str(tmp_path / "broken.png"))
    assert done.returncode == 1 and "broken.png" in done.stderr and "Traceback" not in done.stderr
    done = serve(report.path, str(tmp_path / "absent.png"))
    assert done.returncode == 1 and "absent.png does not exist" in done.stderr


@pytest.mark.parametrize(
    "options",
    [{"input": "uint8"}, {"input": "uint8", "resize": True, "softmax": True, "batch": 2}],
    ids=["bytes", "all"],
)
def test_serving_reads_from_the_file_what_it_takes(tmp_path: Path, options: dict[str, Any]) -> None:
    model = small().eval()
    report = export_onnx(model, tmp_path / "m.onnx", image_shape=(3, 16, 16), classes=CLASSES, **options)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "2.png")
    done = serve(report.path, *(str(tmp_path / f"{number}.png") for number in range(3)))
    assert done.returncode == 0, done.stderr
    x = torch.cat([torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, torch.zeros(1, 3, 16, 16)])
    shares, classes = model(x).softmax(1).max(1)
    expected = [f"{i}.png  {CLASSES[k]} {p:.3f}" for i, (k, p) in enumerate(zip(classes, shares, strict=True))]
    assert done.stdout.splitlines() == expected


def test_to_onnx_goes_through_the_public_api(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = SimpleNamespace(model=small(), image_shape=(3, 16, 16), classes=CLASSES)
    monkeypatch.setattr(robustcompress, "load", lambda path: result, raising=False)
    main = runpy.run_path(str(SCRIPTS / "to_onnx.py"))["main"]
    assert main([str(tmp_path)]) == 0
    assert "opset 20" in capsys.readouterr().out
    assert load_session(tmp_path / "model.onnx").get_inputs()[0].name == "images"
    assert main([str(tmp_path)]) == 1
    assert "pass overwrite=True" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "example: python export/to_onnx.py" in capsys.readouterr().out


def test_importing_the_export_loads_neither_onnx_nor_onnxruntime() -> None:
    program = "import sys, robustcompress.export; print([m for m in ('onnx', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
