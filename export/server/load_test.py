"""How the server does under load on this machine, and what batching brings. Start it with nothing else running.

Example:
    python load_test.py model.onnx --clients 1,16,64 --json load.json
    python load_test.py --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

_SIDE = 224  # of the picture that is made up for files that read any size


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What so many clients saw, each sending its next request when the last one was answered.

    Attributes:
        batching: Pictures that the server put into one call at most; None where it was not started here.
        clients: How many.
        answered: Requests with status 200.
        refused: Requests with status 503.
        failed: All others, and broken connections.
        per_second: Answered requests.
        p50_ms: Median time to an answer; p95 and p99 alike. None where there was no answer.
        mean_batch: Pictures that shared a call with a request, on average over the requests.
    """

    batching: int | None
    clients: int
    answered: int
    refused: int
    failed: int
    per_second: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    mean_batch: float | None


class _Client(threading.Thread):
    """One connection that sends the same picture until it is told to end."""

    def __init__(self, host: str, picture: bytes, until: float) -> None:
        super().__init__(daemon=True)
        self._host, self._picture, self._until = host, picture, until
        self.seconds: list[float] = []
        self.batches: list[int] = []
        self.refused = self.failed = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._host, timeout=60)
        while time.perf_counter() < self._until:
            began = time.perf_counter()
            try:
                connection.request("POST", "/predict?top=1", self._picture)
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException):
                self.failed += 1
                connection.close()
                time.sleep(0.01)
                continue
            if response.status == 200:
                self.seconds.append(time.perf_counter() - began)
                self.batches.append(json.loads(content)["batch"])
            elif response.status == 503:
                self.refused += 1
                time.sleep(0.01)  # far less than Retry-After: the load must not give way
            else:
                self.failed += 1
        connection.close()


def measure(host: str, picture: bytes, *, clients: int, seconds: float, batching: int | None) -> Load:
    """Load a running server for some seconds."""
    began = time.perf_counter()
    crowd = [_Client(host, picture, began + seconds) for _ in range(clients)]
    for client in crowd:
        client.start()
    for client in crowd:
        client.join()
    passed = time.perf_counter() - began
    times = np.array([t for client in crowd for t in client.seconds])
    batches = [b for client in crowd for b in client.batches]
    p50, p95, p99 = np.percentile(1000 * times, [50, 95, 99]).tolist() if len(times) else (None, None, None)
    return Load(
        batching=batching,
        clients=clients,
        answered=len(times),
        refused=sum(client.refused for client in crowd),
        failed=sum(client.failed for client in crowd),
        per_second=len(times) / passed,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        mean_batch=float(np.mean(batches)) if batches else None,
    )


@contextlib.contextmanager
def running(model: Path, *options: str) -> Iterator[str]:
    """Run serve.py beside this file on a free port; give its host:port, and stop it in the end.

    Raises:
        SystemExit: It does not start.
    """
    command = [sys.executable, str(Path(__file__).with_name("serve.py")), str(model), "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()  # the socket listens before this is printed
        if "http://" not in said:
            raise SystemExit(server.wait() or 1)
        yield said.rsplit("http://", 1)[1].strip()
    finally:
        server.terminate()
        server.wait(60)


def sample_picture(host: str) -> bytes:
    """A PNG of noise in the size that the server's file reads."""
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request("GET", "/metadata")
    size = json.loads(connection.getresponse().read())["input"]["size"] or [_SIDE, _SIDE]
    connection.close()
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def as_table(loads: Sequence[Load]) -> str:
    """One row a load."""
    rows = [f"{'max batch':>9} {'clients':>7} {'requests/s':>10} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} "]
    rows[0] += f"{'mean batch':>10} {'refused':>7} {'failed':>6}"
    for load in loads:
        times = (load.p50_ms, load.p95_ms, load.p99_ms, load.mean_batch)
        p50, p95, p99, batch = ("-" if value is None else f"{value:.1f}" for value in times)
        rows.append(
            f"{load.batching or '-':>9} {load.clients:>7} {load.per_second:>10.0f} {p50:>8} {p95:>8} {p99:>8} "
            f"{batch:>10} {load.refused:>7} {load.failed:>6}"
        )
    return "\n".join(rows)


def main() -> int:
    """Measure, print the table; 1 where a request failed (a refusal of a full server is no failure)."""
    parser = argparse.ArgumentParser(
        description="Load the server on this machine, without and with batching.",
        epilog="example: python load_test.py model.onnx --clients 1,16,64",
    )
    parser.add_argument("model", type=Path, nargs="?", help="ONNX file to serve, without batching and with it")
    parser.add_argument("--url", help="load a server that is running, in place of starting one")
    parser.add_argument("--image", type=Path, help="picture to send (default: noise in the size of the model)")
    parser.add_argument("--clients", default="1,16", help="numbers of clients, with commas (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row (default: %(default)s)")
    parser.add_argument("--max-batch", type=int, default=16, help="of the row with batching (default: %(default)s)")
    parser.add_argument("--max-wait-ms", type=float, default=0.0, help="of the same (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the network (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    chosen = parser.parse_args()
    if (chosen.model is None) == (chosen.url is None):
        parser.error("give either an ONNX file or --url")
    counts = [int(text) for text in chosen.clients.split(",")]
    picture = chosen.image.read_bytes() if chosen.image else None
    loads: list[Load] = []

    def load(host: str, batching: int | None) -> None:
        sent = picture or sample_picture(host)
        measure(host, sent, clients=1, seconds=0.5, batching=None)  # the first requests open connections and caches
        for clients in counts:
            loads.append(measure(host, sent, clients=clients, seconds=chosen.seconds, batching=batching))

    if chosen.url:
        load(urlsplit(chosen.url).netloc, None)
    else:
        for batching in (1, chosen.max_batch):
            places = max(64, 2 * max(counts))
            options = {"--max-batch": batching, "--max-wait-ms": chosen.max_wait_ms, "--threads": chosen.threads}
            flat = [str(part) for pair in {**options, "--queue": places}.items() for part in pair]
            with running(chosen.model, *flat) as host:
                load(host, batching)
    print(as_table(loads))
    print(f"{os.cpu_count()} cores, shared by the server and its clients")
    if chosen.json:
        document = {"cores": os.cpu_count(), "seconds": chosen.seconds, "loads": [asdict(one) for one in loads]}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(one.failed for one in loads) else 0


if __name__ == "__main__":
    raise SystemExit(main())
