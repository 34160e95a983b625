"""What an export refuses, and that a failed one leaves nothing behind."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from robustcompress.errors import InputError, ParityError
from robustcompress.export import ExportReport, ParityCheck, export_onnx, load_session, verify_onnx
from robustcompress.export.graph import check_proto
from tests.test_export import Small, images, small

pytestmark = pytest.mark.xdist_group("export")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ExportReport]:
    model = small()
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    return model, export_onnx(model, path, image_shape=(3, 16, 16), verify=False)


class Drifting(nn.Module):
    """Its eval-mode forward changes once it has been exported."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.inner(x)
        return logits if torch.compiler.is_compiling() else logits * 1.01


class Shuffling(Drifting):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.inner(x)
        return logits if torch.compiler.is_compiling() else logits.roll(1, 1)


class Nan(Drifting):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * float("nan")


@pytest.mark.parametrize(
    ("broken", "message"),
    [(Drifting, "logits differ by .* of their scale"), (Shuffling, "logits differ"), (Nan, "not finite")],
)
def test_failed_parity_leaves_nothing(tmp_path: Path, broken: type[Drifting], message: str) -> None:
    with pytest.raises(ParityError, match=message):
        export_onnx(broken(small()), tmp_path / "m.onnx", sample=images(3))
    assert list(tmp_path.iterdir()) == []


def test_failed_parity_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ParityError):
        export_onnx(Drifting(small()), path, sample=images(3), overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    report = export_onnx(small(), path, sample=images(3), overwrite=True, verify=False)
    assert path.stat().st_size == report.bytes > 3


def test_the_difference_is_measured_against_the_scale_of_the_logits(
    exported: tuple[nn.Module, ExportReport],
) -> None:
    model, report = exported

    def scaled(factor: float) -> nn.Module:
        twin = copy.deepcopy(model)
        twin.fc.weight.data.mul_(1 + factor)
        twin.fc.bias.data.mul_(1 + factor)
        return twin

    (check, _) = verify_onnx(report.path, scaled(5e-5), images(3))
    assert check.relative_diff == pytest.approx(5e-5, rel=0.05)
    assert isinstance(check, ParityCheck) and check.name == "clean"
    with pytest.raises(ParityError, match=r"of their scale \(allowed: 0.0001\)"):
        verify_onnx(report.path, scaled(2e-4), images(3))


def test_another_class_fails_whatever_the_tolerance(exported: tuple[nn.Module, ExportReport]) -> None:
    model, report = exported
    twin = copy.deepcopy(model)
    twin.fc.weight.data, twin.fc.bias.data = twin.fc.weight.data.roll(1, 0), twin.fc.bias.data.roll(1, 0)
    with pytest.raises(ParityError, match="get the same class"):
        verify_onnx(report.path, twin, images(5), tolerance=100)


def test_ties_are_no_disagreement(tmp_path: Path) -> None:
    model = small()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    report = export_onnx(model, tmp_path / "zero.onnx", sample=images(2))
    assert all(c.argmax_agreement == 1 for c in report.parity)


class CountsItsBatch(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv1(x).mean((2, 3)).view(int(x.shape[0]), -1))


class Branches(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (CountsItsBatch, "batch dimension 2 at the input and 2 at the output in place of batch"),
        (Branches, "cannot translate Branches: .*control flow"),
    ],
)
def test_what_the_exporter_would_freeze_is_refused(tmp_path: Path, model: type[nn.Module], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_onnx(model(), tmp_path / "m.onnx", image_shape=(3, 16, 16))
    assert list(tmp_path.iterdir()) == []


def test_read_back_names_what_it_got(exported: tuple[nn.Module, ExportReport]) -> None:
    import onnx

    proto = onnx.load(str(exported[1].path))
    with pytest.raises(InputError, match="opset 20 in place of 21"):
        check_proto(proto, (3, 16, 16), opset=21, batch="dynamic")
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(InputError, match="batch at the input and 2 at the output"):
        check_proto(proto, (3, 16, 16), opset=20, batch="dynamic")
    proto.graph.input[0].name = "x"
    proto.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(InputError, match=r"(?s)'x'.*external files.*checker refuses"):
        check_proto(proto, (3, 16, 16), opset=20, batch="dynamic")


class Pair(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits, logits  # type: ignore[return-value]


def bad(**changes: object) -> dict[str, object]:
    return {"model_or_result": small(), "path": "m.onnx", "image_shape": (3, 16, 16)} | changes


def compiled() -> nn.Module:
    model = small()
    model._orig_mod = small()
    return model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(path="none/m.onnx"), "directory '.*none' does not exist"),
        (bad(path="folder.onnx"), "is a directory; name a file in it"),
        (bad(path="there.onnx"), "exists; choose another, or pass overwrite=True"),
        (bad(path="m.pb"), "must end in .onnx"),
        (bad(opset=13), "opset=13: must be 18 to"),
        (bad(opset=999), "opset=999: must be 18 to"),
        (bad(batch=0), "batch=0: must be 'dynamic' or a positive"),
        (bad(batch="free"), "batch='free'"),
        (bad(tolerance=0), "tolerance=0: must be positive"),
        (bad(image_shape=(3, 16)), r"image_shape=\(3, 16\): give \(channels, height, width\)"),
        (bad(image_shape=(1, 16, 16)), "does not run on images of shape .*check image_shape"),
        (bad(model_or_result=small().half()), r"holds torch.float16 weights; call model.float\(\)"),
        (bad(model_or_result=small().bfloat16()), "holds torch.bfloat16 weights"),
        (bad(model_or_result=Pair()), "returns tuple; it must return one tensor"),
        (bad(model_or_result=nn.Conv2d(3, 4, 1)), r"returns shape \(2, 4, 16, 16\)"),
        (bad(model_or_result="model"), "str is no nn.Module and has none as .model"),
        (bad(model_or_result=nn.DataParallel(small())), "pass model.module"),
        (bad(model_or_result=compiled()), "pass the module given to torch.compile"),
        (bad(classes=["a", "b"]), "2 classes were named, but the model has 5 logits"),
        (bad(classes="abcde"), "give a list of class names"),
        (bad(metadata={"n": 3}), "ONNX stores pairs of strings"),
        (bad(metadata={"layout": "NHWC"}), "written by the export itself"),
        (bad(threat="linf"), "give a ThreatModel"),
        (bad(sample=torch.zeros(2, 3, 16, 16, dtype=torch.uint8)), "sample is torch.uint8; give float images"),
        (bad(sample=torch.full((2, 3, 16, 16), 255.0)), "sample has values from 255 to 255"),
        (bad(sample=torch.full((2, 3, 16, 16), float("nan"))), "sample has values from nan"),
        (bad(sample=torch.zeros(2, 3, 8, 8)), r"sample has shape \(2, 3, 8, 8\); must be \[N, 3, 16, 16\]"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("work has begun"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "there.onnx").touch()
    with pytest.raises(InputError, match=message):
        export_onnx(**arguments)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.onnx", "there.onnx"]


def test_script_modules_are_refused(tmp_path: Path) -> None:
    class Scripted(torch.jit.ScriptModule):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Scripted()
    with pytest.raises(InputError, match="TorchScript"):
        export_onnx(model, tmp_path / "m.onnx")


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export_onnx(small().half(), tmp_path / "none" / "m.txt", opset=3, batch=-1, sample=torch.ones(1))
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 6
    for part in (".onnx", "does not exist", "opset=3", "batch=-1", "float16", "sample has shape"):
        assert sum(part in line for line in lines) == 1, part


def test_no_write_permission(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):  # root may write everywhere but into what the kernel keeps
        folder = Path("/proc/self")
        if not folder.is_dir():
            pytest.skip("no directory here that cannot be written to")
    with pytest.raises(InputError, match="cannot be written to"):
        export_onnx(small(), folder / "m.onnx", image_shape=(3, 16, 16))


def test_files_that_cannot_be_verified(exported: tuple[nn.Module, ExportReport], tmp_path: Path) -> None:
    import onnx

    model, report = exported
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(report.path.read_bytes()[:-500])
    with pytest.raises(InputError, match=r"torn\.onnx cannot be opened"):
        verify_onnx(torn, model, images(1))
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(InputError, match="no ONNX file"):
        load_session(tmp_path / "text.onnx")
    with pytest.raises(InputError, match="does not exist"):
        load_session(tmp_path / "absent.onnx")
    with pytest.raises(InputError, match=r"(?s)threads=0.*is a directory"):
        load_session(tmp_path, threads=0)
    foreign = onnx.load(str(report.path))
    foreign.graph.input[0].name = "x"
    for node in foreign.graph.node:
        node.input[:] = ["x" if name == "images" else name for name in node.input]
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    with pytest.raises(InputError, match=r"it maps x to logits; files of export_onnx\(\) map images"):
        verify_onnx(tmp_path / "foreign.onnx", model, images(1))
    with pytest.raises(InputError, match=r"reads images of shape \(3, 16, 16\); these have shape \(3, 8, 8\)"):
        verify_onnx(report.path, model, images(1, 8))
    with pytest.raises(InputError, match=r"(?s)tolerance=0.*give a float tensor.*batch 0"):
        verify_onnx(report.path, model, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), tolerance=0, batches=(0,))
