"""The C++ example: built with the system's compiler against the library of the onnxruntime wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.export.conftest import CLASSES, SIDE, Deployed, pixels

pytestmark = pytest.mark.xdist_group("deploy")

EXAMPLE = Path(__file__).parents[2] / "export" / "cpp"
HEADERS = Path(os.environ.get("ONNXRUNTIME_INCLUDE", EXAMPLE / "onnxruntime" / "include"))

Classify = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory) -> Classify:
    """Build the program; run it with arguments."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    if not (HEADERS / "onnxruntime_cxx_api.h").is_file():
        pytest.skip("no headers of onnxruntime: run export/cpp/fetch_onnxruntime.sh, or set ONNXRUNTIME_INCLUDE")
    import onnxruntime

    libraries = list((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if len(libraries) != 1:
        pytest.skip("the installed onnxruntime has no shared library of its own")
    folder = tmp_path_factory.mktemp("cpp")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(libraries[0])
    program = folder / "classify"
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror", str(EXAMPLE / "classify.cpp")]
    command += ["-o", str(program), "-isystem", str(HEADERS), f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.mark.parametrize("kind", ["logits", "fixed", "probabilities", "resizing"])
def test_every_kind_of_file_gives_the_probabilities_of_torch(
    kind: str, classify: Classify, deployed: Deployed, tmp_path: Path
) -> None:
    image = pixels(1)[0]
    ppm, raw = tmp_path / "image.ppm", tmp_path / "image.raw"
    Image.fromarray(image).save(ppm)
    raw.write_bytes(image.tobytes())
    shares = deployed.expected(image[None])[0]
    order = np.argsort(-shares)
    for path in (ppm, raw)[: 1 if kind == "resizing" else 2]:
        done = classify(getattr(deployed, kind), path, 10)
        assert done.returncode == 0, done.stderr
        lines = [line.split("  ", 1) for line in done.stdout.splitlines()]
        assert [name for _, name in lines] == [CLASSES[k] for k in order]
        np.testing.assert_allclose([float(share) for share, _ in lines], shares[order], atol=1.5e-4)
    assert len(classify(deployed.logits, ppm, 2).stdout.splitlines()) == 2


def test_bad_pictures_and_models_are_refused_in_one_line(
    classify: Classify, deployed: Deployed, tmp_path: Path
) -> None:
    good = b"P6\n# a comment\n%d %d\n255\n" % (SIDE, SIDE) + bytes(3 * SIDE * SIDE)
    path = tmp_path / "image.ppm"
    path.write_bytes(good)
    assert classify(deployed.logits, path).returncode == 0
    cases = [
        (good[:-1], "neither a whole P6 file"),
        (good + b"x", "neither a whole P6 file"),
        (good.replace(b"255", b"511"), "8 bits"),
        (b"P6\n", "header is damaged"),
        (b"P6\n99999999999 1\n255\n", ""),
        (b"P6 16 16 255\n" + bytes(768), "resize it first"),
        (b"", "neither a whole P6 file"),
    ]
    for content, said in cases:
        path.write_bytes(content)
        done = classify(deployed.logits, path)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and said in done.stderr, content[:40]
        assert len(done.stderr.splitlines()) == 1 and not done.stdout
    path.write_bytes(b"abc")
    assert classify(deployed.resizing, path).returncode == 1, "three raw bytes are no picture of any size"
    assert "error" in classify(path, path).stderr
    assert classify(deployed.logits, tmp_path / "absent").returncode == 1
    assert classify(deployed.logits).returncode == 2


@pytest.mark.slow
def test_cmake_builds_it(classify: Classify, tmp_path: Path) -> None:
    if shutil.which("cmake") is None or not (EXAMPLE / "onnxruntime" / "lib").is_dir():
        pytest.skip("no cmake, or export/cpp/fetch_onnxruntime.sh has not been run")
    for command in (["cmake", "-S", EXAMPLE, "-B", tmp_path], ["cmake", "--build", tmp_path]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "usage" in subprocess.run([tmp_path / "classify"], capture_output=True, text=True, check=False).stderr
