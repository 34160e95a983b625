"""The server of export/server: answers as torch does, refuses what it must, and stays up."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.export.conftest import CLASSES, SIDE, Deployed, pixels

pytest.importorskip("fastapi", reason="the server's own requirements are not installed")
pytest.importorskip("uvicorn", reason="the server's own requirements are not installed")
pytestmark = pytest.mark.xdist_group("deploy")

SERVER = Path(__file__).parents[2] / "export" / "server"
PLACES = 3
_WITHOUT_TORCH = (
    "import sys, runpy\n"
    "sys.modules['torch'] = sys.modules['robustcompress'] = None\n"
    "sys.argv = sys.argv[1:]\n"
    "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


@contextlib.contextmanager
def serving(model: Path, *options: str, python: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run serve.py where torch cannot be imported; the process, and its host:port."""
    program = python or (sys.executable, "-c", _WITHOUT_TORCH)
    command = [*program, str(SERVER / "serve.py"), str(model), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert "serving" in said, said
        try:
            yield process, said.rsplit("http://", 1)[1].strip()
        finally:
            process.terminate()
        assert process.wait(20) == 0


@pytest.fixture(scope="module")
def host(deployed: Deployed) -> Iterator[str]:
    limits = ("--queue", str(PLACES), "--body-seconds", "2", "--max-bytes", "200000", "--max-pixels", "40000")
    with serving(deployed.logits, *limits) as (_, address):
        yield address


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    """The server's modules, imported as it imports them itself."""
    names = ("model", "pictures", "batching")
    sys.path.insert(0, str(SERVER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(SERVER))
        for name in names:
            sys.modules.pop(name, None)


def ask(host: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection(host, timeout=30)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body, sent)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content, {name.lower(): value for name, value in response.getheaders()}


def connect(host: str) -> socket.socket:
    name, port = host.split(":")
    return socket.create_connection((name, int(port)), timeout=30)


def received(connection: socket.socket) -> str:
    """All that comes until the server closes the connection."""
    content = b""
    while part := connection.recv(65536):
        content += part
    return content.decode()


def encoded(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG file of few bytes that says it holds side x side pixels, and does."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# Over HTTP


def test_concurrent_clients_get_the_answer_to_their_own_picture(host: str, deployed: Deployed) -> None:
    images = pixels(30)
    expected = deployed.expected(images)
    assert len(set(expected.argmax(1))) > 2, "a server that mixes answers up would not be found out"
    with ThreadPoolExecutor(PLACES) as clients:
        answers = list(clients.map(lambda image: ask(host, "/predict?top=10", encoded(image)), images))
    for (status, content, _), shares in zip(answers, expected, strict=True):
        assert status == 200
        found = {score["index"]: score["probability"] for score in content["top"]}
        np.testing.assert_allclose([found[k] for k in range(len(CLASSES))], shares, atol=1e-5)
        assert [score["name"] for score in content["top"]] == [CLASSES[score["index"]] for score in content["top"]]
        assert [*found.values()] == sorted(found.values(), reverse=True)


def test_what_it_says_of_itself(host: str) -> None:
    assert ask(host, "/health")[:2] == (200, {"status": "alive"})
    assert ask(host, "/ready")[:2] == (200, {"status": "ready"})
    status, content, _ = ask(host, "/metadata")
    assert status == 200
    assert content["classes"] == list(CLASSES)
    assert content["input"] == {"type": "float32", "layout": "NCHW", "size": [SIDE, SIDE], "batch": None}
    assert content["metadata"]["input_range"] == "[0, 1]"
    assert content["limits"]["max_pixels"] == 40000
    described = ask(host, "/openapi.json")[1]["paths"]["/predict"]["post"]
    assert "image/png" in described["requestBody"]["content"] and "503" in described["responses"]


GOOD = encoded(pixels(1)[0])


@pytest.mark.parametrize(
    ("body", "path", "headers", "status", "said"),
    [
        (b"", "/predict", {}, 400, "empty"),
        (b"no picture at all", "/predict", {}, 415, "neither a PNG nor a JPEG"),
        (encoded(pixels(1)[0], "GIF"), "/predict", {}, 415, "neither a PNG nor a JPEG"),
        (GOOD[: len(GOOD) // 2], "/predict", {}, 400, "damaged"),
        (encoded(pixels(1)[0], "JPEG")[:300], "/predict", {}, 400, "damaged"),
        (GOOD, "/predict", {"Content_Type": "multipart/form-data; boundary=x"}, 415, "--data-binary"),
        (bytes(200_001), "/predict", {}, 413, "larger than 200000 bytes"),
        (bomb(20_000), "/predict", {}, 413, "20000x20000 pixels; at most 40000"),
        (GOOD, "/predict?top=0", {}, 422, "top='0'"),
        (GOOD, "/predict?top=many", {}, 422, "top='many'"),
        (GOOD, "/absent", {}, 404, "POST /absent"),
        (None, "/predict", {}, 405, "GET /predict"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(
    host: str, body: bytes | None, path: str, headers: dict[str, str], status: int, said: str
) -> None:
    assert body is None or len(body) < 200_001 or status == 413
    found, content, _ = ask(host, path, body, **headers)
    assert found == status
    assert list(content) == ["error"] and said in content["error"]
    assert ask(host, "/predict", GOOD)[0] == 200, "the service did not survive"


def test_a_body_of_unknown_length_is_cut_off_too(host: str) -> None:
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request("POST", "/predict", iter([bytes(50_000)] * 5), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_a_full_server_says_when_to_come_back_and_slow_bodies_lose_their_place(host: str) -> None:
    with contextlib.ExitStack() as open_ones:
        slow = [open_ones.enter_context(connect(host)) for _ in range(PLACES)]
        for connection in slow:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
        deadline = time.monotonic() + 1.5
        while ask(host, "/ready")[0] == 200:
            assert time.monotonic() < deadline
        status, content, headers = ask(host, "/predict", GOOD)
        assert (status, headers["retry-after"]) == (503, "1") and "too many requests" in content["error"]
        assert ask(host, "/health")[0] == 200
        for connection in slow:
            said = received(connection)
            assert said.startswith("HTTP/1.1 408") and "longer than 2 s" in said
    assert ask(host, "/predict", GOOD)[0] == 200


def test_a_stopped_server_finishes_what_it_began(deployed: Deployed) -> None:
    with serving(deployed.logits) as (process, host), connect(host) as connection:
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(GOOD)}\r\n\r\n".encode()
        connection.sendall(head + GOOD[:20])
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionRefusedError):
            for _ in range(100):
                time.sleep(0.1)
                connect(host).close()
        connection.sendall(GOOD[20:])
        assert received(connection).startswith("HTTP/1.1 200")
        assert process.wait(20) == 0


def test_the_load_test_counts_every_request(host: str, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    options = ["--url", f"http://{host}", "--clients", "1,6", "--seconds", "0.5", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, str(SERVER / "load_test.py"), *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, six = json.loads(out.read_text())["loads"]
    assert one["answered"] > 0 and one["failed"] == six["failed"] == one["refused"] == 0
    assert six["refused"] > 0, f"six clients fit into {PLACES} places"
    assert one["mean_batch"] == 1
    assert 0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"]
    assert len({len(line) for line in done.stdout.splitlines()[:3]}) == 1, "columns do not line up"


@pytest.mark.parametrize("content", [None, b"no model"])
def test_files_that_cannot_be_served_are_refused_before_the_service_begins(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, str(SERVER / "serve.py"), str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and "m.onnx" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_its_requirements_are_enough(deployed: Deployed, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", str(SERVER / "requirements.txt")], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode != 0
    with serving(deployed.logits, python=(python,)) as (_, host):
        found = ask(host, "/predict", GOOD)[1]["top"][0]["index"]
    assert found == deployed.expected(pixels(1)).argmax()


# Its parts


@pytest.mark.parametrize("kind", ["logits", "fixed", "probabilities", "resizing"])
def test_every_kind_of_file_gives_the_probabilities_of_torch(
    kind: str, deployed: Deployed, parts: dict[str, ModuleType]
) -> None:
    model = parts["model"].Model(getattr(deployed, kind))
    images = pixels(7)
    found = model.probabilities([model.prepare(image) for image in images])
    np.testing.assert_allclose(found, deployed.expected(images), atol=1e-5)
    assert model.classes == list(CLASSES)
    assert model.size == (None if kind == "resizing" else (SIDE, SIDE))
    assert model.batch == (4 if kind == "fixed" else None)
    assert model.describe()["input"]["type"] == ("float32" if kind in ("logits", "fixed") else "uint8")


def test_files_that_resize_by_themselves_get_pictures_of_their_own_size(
    deployed: Deployed, parts: dict[str, ModuleType]
) -> None:
    model = parts["model"].Model(deployed.resizing)
    small = pixels(1)[0]
    large = small.repeat(2, 0).repeat(2, 1)
    picture = parts["pictures"].read_picture(encoded(large), size=model.size, max_pixels=10**6)
    assert picture.shape == (2 * SIDE, 2 * SIDE, 3)
    found = model.probabilities([model.prepare(picture)])
    # Halved between the centres of pixels, blocks of equal ones come out as they were.
    np.testing.assert_allclose(found, deployed.expected(small[None]), atol=1e-4)


def test_pictures_come_out_upright_in_colour_and_cropped_to_the_centre(parts: dict[str, ModuleType]) -> None:
    read = parts["pictures"].read_picture
    half = np.zeros((20, 40, 3), np.uint8)
    half[:, 20:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright = read(encoded(half, exif=exif.tobytes()), size=None, max_pixels=800)
    assert upright.shape == (40, 20, 3) and upright[:20].max() == 0 and upright[20:].min() == 255
    grey = np.full((8, 8), 60_000, np.uint16)
    assert np.all(read(encoded(grey), size=(4, 4), max_pixels=64) == 60_000 // 256)
    bars = np.zeros((10, 30, 3), np.uint8)
    bars[:, 10:20] = 200
    assert np.all(read(encoded(bars), size=(10, 10), max_pixels=300) == 200)
    with pytest.raises(parts["pictures"].PictureError, match="at most 299"):
        read(encoded(bars), size=(10, 10), max_pixels=299)


class Network:
    """Stands for a model: the answer to an image is the image, and the sizes of the calls are kept."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[int] = []
        self.seconds = seconds

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        self.calls.append(len(images))
        time.sleep(self.seconds)
        if any(image[0] < -1 for image in images):
            return np.zeros((0, 2))  # an answer too few
        if any(image[0] < 0 for image in images):
            raise ArithmeticError("negative")
        return np.stack(images)


def image(value: float, length: int = 2) -> Any:
    async def prepare() -> np.ndarray:
        return np.full(length, value)

    return prepare


def test_batches_form_while_the_last_one_runs(parts: dict[str, ModuleType]) -> None:
    async def go() -> None:
        network = Network(0.05)
        batcher = parts["batching"].Batcher(network, max_batch=4, max_wait=0, places=100)
        await batcher.start()
        first = asyncio.create_task(batcher.serve(image(0)))
        await asyncio.sleep(0.02)
        answers = await asyncio.gather(*(batcher.serve(image(k)) for k in range(1, 11)))
        assert (await first)[1] == 1
        assert network.calls == [1, 4, 4, 2]
        assert [row[0] for row, _ in answers] == list(range(1, 11))
        assert [batch for _, batch in answers] == [4] * 8 + [2] * 2
        await batcher.stop()

    asyncio.run(go())


def test_a_batch_waits_for_requests_inside_but_not_for_longer_than_said(parts: dict[str, ModuleType]) -> None:
    async def late(seconds: float) -> np.ndarray:
        await asyncio.sleep(seconds)
        return np.zeros(2)

    async def go() -> None:
        network = Network()
        batcher = parts["batching"].Batcher(network, max_batch=4, max_wait=0.4, places=100)
        await batcher.start()
        began = time.monotonic()
        await batcher.serve(image(1))
        assert time.monotonic() - began < 0.2, "waited for nobody"
        await asyncio.gather(
            batcher.serve(image(1)), batcher.serve(lambda: late(0.1)), batcher.serve(lambda: late(1.0))
        )
        assert network.calls == [1, 2, 1]
        await batcher.stop()

    asyncio.run(go())


def test_a_failing_batch_fails_alone_and_stopping_answers_all(
    parts: dict[str, ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        network = Network(0.02)
        batcher = parts["batching"].Batcher(network, max_batch=1, max_wait=0, places=2)
        await batcher.start()
        with pytest.raises(ArithmeticError):
            await batcher.serve(image(-1))
        with pytest.raises(ValueError, match="shorter"):
            await batcher.serve(image(-2))
        assert batcher.alive
        tasks = [asyncio.create_task(batcher.serve(image(k, length=k + 2))) for k in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(parts["batching"].FullError):
            await batcher.serve(image(5))
        await batcher.stop()
        assert [(await task)[0].tolist() for task in tasks] == [[0, 0], [1, 1, 1]]
        assert not batcher.alive and not batcher.full

    asyncio.run(go())
    assert "a batch of 1 images failed" in caplog.text


def test_pictures_of_several_sizes_go_in_calls_of_their_own(parts: dict[str, ModuleType]) -> None:
    async def go() -> None:
        network = Network(0.05)
        batcher = parts["batching"].Batcher(network, max_batch=8, max_wait=0, places=100)
        await batcher.start()
        first = asyncio.create_task(batcher.serve(image(0)))
        await asyncio.sleep(0.02)
        answers = await asyncio.gather(*(batcher.serve(image(k, length=2 + k % 2)) for k in range(5)))
        await first
        assert network.calls == [1, 3, 2]
        assert [row.tolist() for row, _ in answers] == [[k] * (2 + k % 2) for k in range(5)]
        await batcher.stop()

    asyncio.run(go())
