"""Serve one exported ONNX file over HTTP. Needs the packages of requirements.txt; no torch.

Example:
    python serve.py model.onnx --port 8000
    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?top=3'
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import uvicorn
from app import Limits, create_app
from model import Model, ModelError

_USUAL = Limits()
_SELF_RESIZING_PIXELS = 2_000_000


def main() -> int:
    """Read the command line, open the file, serve until SIGTERM or Ctrl-C; 1 when the service cannot begin."""
    chosen = _parser().parse_args()
    try:
        model = Model(chosen.model, threads=chosen.threads)
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    usual_pixels = _USUAL.max_pixels if model.size else _SELF_RESIZING_PIXELS
    limits = Limits(
        max_batch=chosen.max_batch,
        max_wait_ms=chosen.max_wait_ms,
        places=chosen.queue,
        max_bytes=chosen.max_bytes,
        max_pixels=getattr(chosen, "max_pixels", usual_pixels),
        body_seconds=chosen.body_seconds,
    )
    try:
        listening = _listen(chosen.host, chosen.port)
    except OSError as error:
        print(f"error: {chosen.host}:{chosen.port} cannot be used ({error.strerror}); choose a --port", file=sys.stderr)
        return 1
    # uvicorn finishes what it has begun and then hands the signal on; without these the exit status would be a failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    print(f"serving {chosen.model} on http://{chosen.host}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        create_app(model, limits),
        log_level="info" if chosen.verbose else "warning",
        timeout_graceful_shutdown=chosen.grace,
        limit_concurrency=16 * limits.places,  # connections, open and idle ones too
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # The protocol is named since asyncio switches Nagle's delay off only for sockets that say they are TCP: 40 ms an
    # answer.
    listening = socket.socket(family, kind, socket.IPPROTO_TCP)
    if os.name == "posix":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(address)
    listening.listen(2048)
    return listening


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Serve one exported ONNX file over HTTP: POST a PNG or JPEG file to /predict.",
        epilog="example: python serve.py model.onnx --port 8000; docs at http://127.0.0.1:8000/docs",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="ONNX file that `robustcompress export` wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=_at_least(0), default=8000, help="0 takes any free one")
    parser.add_argument("--threads", type=_at_least(1), default=1, help="threads of the network")
    parser.add_argument("--max-batch", type=_at_least(1), default=_USUAL.max_batch, help="pictures in one call")
    parser.add_argument(
        "--max-wait-ms", type=_wait, default=_USUAL.max_wait_ms, help="how long a picture waits for company"
    )
    parser.add_argument("--queue", type=_at_least(1), default=_USUAL.places, help="requests inside; one more gets 503")
    parser.add_argument("--max-bytes", type=_at_least(1), default=_USUAL.max_bytes, help="largest body")
    parser.add_argument(
        "--max-pixels",
        type=_at_least(1),
        default=argparse.SUPPRESS,  # it depends on the file
        help=f"largest width x height ({_USUAL.max_pixels}, or {_SELF_RESIZING_PIXELS} for a file that resizes by "
        "itself: its pictures wait at full size)",
    )
    parser.add_argument(
        "--body-seconds", type=_at_least(1), default=int(_USUAL.body_seconds), help="longest time for a body to arrive"
    )
    parser.add_argument("--grace", type=_at_least(0), default=30, help="seconds to finish requests when stopped")
    parser.add_argument("--verbose", action="store_true", help="log every request")
    return parser


def _wait(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"{text}: must lie between 0 and 10000")
    return value


def _at_least(smallest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {smallest}")
        return value

    return number


if __name__ == "__main__":
    raise SystemExit(main())
