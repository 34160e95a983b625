"""The single scripts of export/, run as a user runs them, where torch cannot be imported."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import robustcompress as rc
from tests.export.conftest import CLASSES, SIDE, Deployed, pixels

pytestmark = pytest.mark.xdist_group("deploy")

SCRIPTS = Path(__file__).parents[2] / "export"
KINDS = ("logits", "fixed", "probabilities", "resizing")
_ALONE = (
    "import sys, runpy\n"
    "sys.modules['torch'] = sys.modules['onnx'] = sys.modules['robustcompress'] = None\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", _ALONE, str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, encoding="utf-8")


def verify(*arguments: object) -> tuple[int, dict[str, Any]]:
    done = script("verify_onnx.py", *arguments, "--json", "--calls", 5)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def expected(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, their labels (every fourth one wrong) and torch's logits."""
    images = pixels(40)
    planar = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        logits = deployed.model(torch.from_numpy(planar).float() / 255).numpy()
    labels = logits.argmax(1)
    labels[::4] = (labels[::4] + 1) % len(CLASSES)
    path = tmp_path_factory.mktemp("expected") / "expected.npz"
    np.savez(path, images=planar, labels=labels, logits=logits)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_agrees_with_torch(kind: str, deployed: Deployed, expected: Path) -> None:
    status, said = verify(getattr(deployed, kind), "--expect", expected, "--batch", 7)
    assert status == 0 and said["passed"]
    assert said["accuracy"] == 0.75
    assert said["agreement"]["same_class"] == 1 and said["agreement"]["max_difference"] < 1e-4
    assert said["latency"]["batch"] == (4 if kind == "fixed" else 1)
    assert 0 < said["latency"]["p50_ms"] <= said["latency"]["p95_ms"]
    assert json.loads(said["metadata"]["classes"]) == list(CLASSES)


def test_another_network_and_too_little_accuracy_fail(deployed: Deployed, expected: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(expected))
    arrays["logits"][3] = -arrays["logits"][3]
    np.savez(tmp_path / "other.npz", **arrays)
    status, said = verify(deployed.logits, "--expect", tmp_path / "other.npz")
    assert status == 1 and not said["passed"] and said["agreement"]["same_class"] == 39 / 40
    np.savez(tmp_path / "images.npz", images=arrays["images"], labels=arrays["labels"])
    assert verify(deployed.logits, "--images", tmp_path / "images.npz", "--min-accuracy", 0.75)[0] == 0
    assert verify(deployed.logits, "--images", tmp_path / "images.npz", "--min-accuracy", 0.76)[0] == 1
    status, said = verify(deployed.resizing)
    assert status == 0 and said["accuracy"] is None and said["agreement"] is None and said["images"] == 64


def test_floats_and_bytes_in_either_order_of_axes_are_the_same_images(
    deployed: Deployed, expected: Path, tmp_path: Path
) -> None:
    arrays = dict(np.load(expected))
    planar, logits = arrays["images"], arrays["logits"]
    forms = (planar.transpose(0, 2, 3, 1), planar.astype(np.float32) / 255, planar.transpose(0, 2, 3, 1) / 255)
    for images in forms:
        np.savez(tmp_path / "form.npz", images=images, logits=logits)
        for kind in ("logits", "probabilities"):
            status, said = verify(getattr(deployed, kind), "--expect", tmp_path / "form.npz")
            assert status == 0 and said["agreement"]["max_difference"] < 1e-4


@pytest.mark.parametrize(
    ("arrays", "kind", "said"),
    [
        ({"logits": np.zeros((2, 10), np.float32)}, "logits", "holds no images"),
        ({"images": pixels(2)}, "logits", "and no logits"),
        ({"images": pixels(2), "logits": np.zeros((2, 9))}, "logits", "[2, 9] are expected"),
        ({"images": pixels(2, side=16), "logits": np.zeros((2, 10))}, "logits", "the file reads"),
        ({"images": pixels(2)[0], "logits": np.zeros((2, 10))}, "logits", "must be [N, 3, H, W]"),
        ({"images": pixels(2).astype(np.int64), "logits": np.zeros((2, 10))}, "logits", "floats in [0, 1]"),
        ({"images": pixels(2) / 2.0, "logits": np.zeros((2, 10))}, "logits", "floats in [0, 1]"),
        ({"images": pixels(2) / 300, "logits": np.zeros((2, 10))}, "probabilities", "not multiples of 1/255"),
        ({"images": pixels(2), "logits": np.zeros((2, 10)), "labels": np.zeros(3)}, "logits", "one for each"),
        ({"images": np.array([{}]), "logits": np.zeros((2, 10))}, "logits", "cannot be read"),
    ],
)
def test_what_cannot_be_checked_is_said_in_one_line(
    arrays: dict[str, np.ndarray], kind: str, said: str, deployed: Deployed, tmp_path: Path
) -> None:
    np.savez(tmp_path / "e.npz", **arrays)
    done = script("verify_onnx.py", getattr(deployed, kind), "--expect", tmp_path / "e.npz")
    assert done.returncode == 2 and not done.stdout
    assert said in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_files_that_are_no_models_and_a_report_that_reads_well(deployed: Deployed, expected: Path) -> None:
    for path in (expected, expected.with_name("absent.onnx")):
        done = script("verify_onnx.py", path)
        assert done.returncode == 2 and path.name in done.stderr and "Traceback" not in done.stderr
    done = script("verify_onnx.py", deployed.logits, "--expect", expected, "--calls", 5)
    lines = done.stdout.splitlines()
    assert lines[0] == "logits.onnx  40 images" and lines[-1] == "passed"
    assert "accuracy   75.00 %" in lines and any("100.00 % get the expected class" in line for line in lines)


@pytest.mark.parametrize("kind", KINDS)
def test_serve_numpy_reads_every_kind_of_file(kind: str, deployed: Deployed, tmp_path: Path) -> None:
    images = pixels(2)
    paths = [tmp_path / f"{k}.png" for k in range(2)]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    done = script("serve_numpy.py", getattr(deployed, kind), *paths)
    assert done.returncode == 0, done.stderr
    shares = deployed.expected(images)
    wanted = [f"{k}.png  {CLASSES[row.argmax()]} {row.max():.3f}" for k, row in enumerate(shares)]
    assert done.stdout.splitlines() == wanted
    assert script("serve_numpy.py", paths[0], paths[1]).returncode == 1, "a picture is no model"


def test_to_onnx_writes_what_verify_onnx_expects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = rc.build_model("resnet8", num_classes=10, width=0.25)
    result = rc.compress(model, strategy="none", data="digits", epochs=0.02)
    result.save(tmp_path / "result")
    main = runpy.run_path(str(SCRIPTS / "to_onnx.py"))["main"]
    onnx, npz = tmp_path / "result" / "model.onnx", tmp_path / "e.npz"
    assert main([str(tmp_path / "result"), "--expect", str(npz), "--count", "30"]) == 0
    assert "30 test images and torch's logits" in capsys.readouterr().out
    stored = np.load(npz)
    assert stored["images"].shape == (30, 3, SIDE, SIDE) and set(stored["labels"]) <= set(range(10))
    status, said = verify(onnx, "--expect", npz)
    assert status == 0 and said["agreement"]["same_class"] == 1
    assert said["accuracy"] == (stored["logits"].argmax(1) == stored["labels"]).mean()
    onnx.unlink()
    assert main([str(tmp_path / "result"), "--expect", str(npz)]) == 1
    assert "pass --overwrite" in capsys.readouterr().out and not onnx.exists()
