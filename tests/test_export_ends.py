"""Files that take bytes, resize, end in a softmax, or are two: against torch, through the public reader."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from robustcompress.artefact import open_onnx
from robustcompress.data.decoding import decoded
from robustcompress.data.pools import resized
from robustcompress.errors import InputError, ParityError
from robustcompress.export import ends as ends_module
from robustcompress.export import export_onnx, load_session, verify_onnx
from robustcompress.export import request as request_module
from robustcompress.export import write as write_module
from robustcompress.export.ends import preprocessing_of, reference_resize
from robustcompress.export.files import data_files
from robustcompress.robust import ThreatModel
from tests.test_export import CLASSES, Small, small

pytestmark = pytest.mark.xdist_group("export")

SIZE = 16


_TRANSLATED: dict[str, bytes] = {}


@pytest.fixture(autouse=True)
def translate_each_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here stands around the network; torch's exporter takes seconds for each of the many files."""
    to_proto = write_module.to_proto

    def remembered(model: nn.Module, shape: tuple[int, int, int], **options: object) -> onnx.ModelProto:
        weights = [float(tensor.double().sum()) for tensor in model.state_dict().values()]
        key = f"{type(model).__qualname__} {weights} {shape} {options}"
        if key not in _TRANSLATED:
            _TRANSLATED[key] = to_proto(model, shape, **options).SerializeToString()  # type: ignore[arg-type]
        return onnx.ModelProto.FromString(_TRANSLATED[key])

    monkeypatch.setattr(write_module, "to_proto", remembered)


def trained() -> nn.Module:
    return small().eval()


def pixels(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def run(path: Path, x: np.ndarray) -> torch.Tensor:
    session = load_session(path, threads=1)
    return torch.from_numpy(session.run(None, {"images": x})[0])


def by_torch(model: nn.Module, x: np.ndarray, *, softmax: bool) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255)
    return logits.softmax(1) if softmax else logits


ALLOWED = [
    (kind, resize, softmax, batch, external)
    for kind, resize, softmax, batch, external in itertools.product(
        ("float32", "uint8"), (False, True), (False, True), ("dynamic", 3), (False, True)
    )
    if kind == "uint8" or not resize
]


@pytest.mark.parametrize(("kind", "resize", "softmax", "batch", "external"), ALLOWED)
def test_every_combination_computes_what_torch_computes(
    tmp_path: Path, kind: str, resize: bool, softmax: bool, batch: str | int, external: bool
) -> None:
    model, path = trained(), tmp_path / "m.onnx"
    options = {"input": kind, "resize": resize, "softmax": softmax, "batch": batch, "external_data": external}
    report = export_onnx(model, path, image_shape=(3, SIZE, SIZE), classes=CLASSES, **options)
    names = {check.name for check in report.parity}
    assert names == ({"random", "random, 53x33", "random, 10x19"} if resize else {"random"})
    raw = pixels(3, SIZE, SIZE)
    fed = raw if kind == "uint8" else np.ascontiguousarray(raw.transpose(0, 3, 1, 2), np.float32) / 255
    found = run(path, fed)
    torch.testing.assert_close(found, by_torch(model, raw, softmax=softmax), rtol=1e-4, atol=1e-5)
    said = {key.removeprefix("robustcompress."): value for key, value in report.metadata.items()}
    assert said["layout"] == ("NHWC" if kind == "uint8" else "NCHW")
    assert said["input_type"] == kind and said["precision"] == "float32"
    assert said["input_range"] == ("[0, 255]" if kind == "uint8" else "[0, 1]")
    assert said["output"] == ("probabilities" if softmax else "logits") and (said["resize"] != "none") == resize
    assert len(list(tmp_path.iterdir())) == 1 + external == 1 + len(report.data)
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    file = open_onnx(path)
    assert file.image_shape == (3, SIZE, SIZE) and file.resizes == resize and file.output_kind == said["output"]
    assert file.batch == (None if batch == "dynamic" else batch)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 61), (7, 9), (61, 16), (17, 16), (48, 32), (16, 25)])
def test_images_of_any_size_are_resized_as_the_training_data_are(tmp_path: Path, height: int, width: int) -> None:
    model, path = trained(), tmp_path / "m.onnx"
    export_onnx(model, path, image_shape=(3, SIZE, SIZE), input="uint8", resize=True, verify=False)
    raw = pixels(4, height, width, seed=height)
    training = resized(torch.from_numpy(raw).permute(0, 3, 1, 2), SIZE).float()
    torch.testing.assert_close(reference_resize(torch.from_numpy(raw).permute(0, 3, 1, 2), SIZE, SIZE), training)
    alone = preprocessing_of(onnx.load(path))
    inside = torch.from_numpy(_session(alone).run(None, {"images": raw})[0])
    levels = (inside * 255 - training).abs()
    assert levels.max() < 1.01 and (levels > 0.5).float().mean() < 0.02
    with torch.no_grad():
        expected = model(inside)
    torch.testing.assert_close(run(path, raw), expected, rtol=1e-4, atol=1e-5)


def test_the_resize_is_within_one_of_255_of_pillows(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(trained(), path, image_shape=(3, SIZE, SIZE), input="uint8", resize=True, verify=False)
    raw = pixels(1, 45, 70)
    Image.fromarray(raw[0]).save(tmp_path / "image.png")
    whole = decoded((tmp_path / "image.png").read_bytes(), "image.png", size=SIZE)
    by_pillow = torch.from_numpy(whole.copy()).permute(2, 0, 1)[None].float()
    inside = torch.from_numpy(_session(preprocessing_of(onnx.load(path))).run(None, {"images": raw})[0])
    assert float((inside * 255 - by_pillow).abs().max()) < 1.01


def _session(proto: onnx.ModelProto) -> object:
    from robustcompress.export.session import open_session

    return open_session(proto.SerializeToString())


def test_a_resize_unlike_torchs_is_no_parity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ends_module._Steps.add

    def plain(self, kind, inputs, name, **attributes):  # type: ignore[no-untyped-def]
        return add(self, kind, inputs, name, **{k: v for k, v in attributes.items() if k != "exclude_outside"})

    monkeypatch.setattr(ends_module._Steps, "add", plain)
    with pytest.raises(ParityError, match="resizes 53x33 unlike torch"):
        export_onnx(trained(), tmp_path / "m.onnx", image_shape=(3, SIZE, SIZE), input="uint8", resize=True)
    assert list(tmp_path.iterdir()) == []


def test_networks_that_are_no_square_resize_to_cover(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "m.onnx"
    report = export_onnx(model, path, image_shape=(3, 12, 20), input="uint8", resize=True, softmax=True)
    assert {check.name for check in report.parity} == {"random", "random, 41x41", "random, 8x23"}
    assert open_onnx(path).image_shape == (3, 12, 20)
    assert "resized to 12x20 inside" in str(report) and "[batch, H, W, 3] in [0, 255] -> probabilities" in str(report)


def test_adversarial_images_are_compared_as_bytes(tmp_path: Path) -> None:
    threat = ThreatModel("linf", 8 / 255)
    report = export_onnx(trained(), tmp_path / "m.onnx", image_shape=(3, SIZE, SIZE), input="uint8", threat=threat)
    assert [check.name for check in report.parity] == ["random", "random", "adversarial", "adversarial"]
    assert all(check.relative_diff < 1e-5 for check in report.parity)


def test_what_does_not_go_together_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only files that take bytes resize"):
        export_onnx(trained(), tmp_path / "m.onnx", image_shape=(3, SIZE, SIZE), resize=True)
    with pytest.raises(InputError, match="input='int8': must be 'float32' or 'uint8'"):
        export_onnx(trained(), tmp_path / "m.onnx", image_shape=(3, SIZE, SIZE), input="int8")
    report = export_onnx(trained(), tmp_path / "m.onnx", image_shape=(3, SIZE, SIZE), input="uint8", verify=False)
    with pytest.raises(InputError, match=r"it reads images of shape \(3, 16, 16\)"):
        verify_onnx(report.path, trained(), torch.rand(1, 3, 8, 8))


def test_what_freezes_the_batch_is_found_below_the_preprocessing(tmp_path: Path) -> None:
    class Counts(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv1(x).mean((2, 3)).view(int(x.shape[0]), -1))

    with pytest.raises(InputError, match="batch dimension 2 at the input and 2 at the output in place of batch"):
        export_onnx(Counts(), tmp_path / "m.onnx", image_shape=(3, SIZE, SIZE), input="uint8", softmax=True)


# Two files


def test_models_beyond_one_protobuf_get_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "LARGEST", 1000)
    report = export_onnx(trained(), tmp_path / "m.onnx", image_shape=(3, SIZE, SIZE))
    (data,) = report.data
    assert data.parent == tmp_path and data.name in str(report) and "keep both files together" in str(report)
    assert data_files(report.path) == report.data and report.parity


def test_a_pair_is_replaced_without_a_moment_in_which_it_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import robustcompress.export.files as files

    path, image = tmp_path / "m.onnx", np.full((1, 3, SIZE, SIZE), 0.5, np.float32)
    (first,) = export_onnx(trained(), path, image_shape=(3, SIZE, SIZE), external_data=True).data
    before, replace = run(path, image), files.os.replace
    changed = small().eval()
    nn.init.ones_(changed.fc.weight)

    def stop(source: Path, target: Path) -> None:
        torch.testing.assert_close(run(path, image), before)  # whatever has been moved so far
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(changed, path, image_shape=(3, SIZE, SIZE), external_data=True, overwrite=True)
    assert sorted(tmp_path.iterdir()) == sorted([path, first])
    torch.testing.assert_close(run(path, image), before)
    monkeypatch.setattr(files.os, "replace", replace)
    (second,) = export_onnx(changed, path, image_shape=(3, SIZE, SIZE), external_data=True, overwrite=True).data
    assert sorted(tmp_path.iterdir()) == sorted([path, second]) and second != first
    with torch.no_grad():
        torch.testing.assert_close(run(path, image), changed(torch.from_numpy(image)), rtol=1e-4, atol=1e-5)
    export_onnx(changed, path, image_shape=(3, SIZE, SIZE), overwrite=True)
    assert list(tmp_path.iterdir()) == [path], "the weights of the pair that was replaced stay behind"


def test_a_foreign_files_weights_are_not_removed(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "m.onnx"
    export_onnx(model, path, image_shape=(3, SIZE, SIZE))
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location="shared.bin", size_threshold=0)
    export_onnx(model, path, image_shape=(3, SIZE, SIZE), overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "shared.bin"]


def test_a_missing_second_file_is_one_clear_error(tmp_path: Path) -> None:
    report = export_onnx(trained(), tmp_path / "m.onnx", image_shape=(3, SIZE, SIZE), external_data=True)
    report.data[0].unlink()
    with pytest.raises(InputError, match=r"m\.onnx cannot be opened"):
        open_onnx(report.path)


def test_channels_need_not_be_colours(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(5, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    report = export_onnx(model, tmp_path / "m.onnx", image_shape=(5, 8, 8), input="uint8")
    assert open_onnx(report.path).image_shape == (5, 8, 8)
    images = torch.rand(2, 5, 8, 8).mul(255).round() / 255
    with torch.no_grad():
        torch.testing.assert_close(open_onnx(report.path).scores(images), model(images), rtol=1e-4, atol=1e-5)
