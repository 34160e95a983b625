"""Time the networks that lie beside this script, on the device it runs on; writes times.json there.

Needs onnxruntime and numpy, and no more. `robustcompress latency` put it here together with networks.json and the
networks; bring times.json back, for `robustcompress compress --latency-table times.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

BLOCK = 5
"""Calls of one network before it is the reference's turn; one more goes before them unseen, to fill the caches."""


def main() -> int:
    """Measure every network against the reference, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime (default: 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each network, about (default: 2)")
    parser.add_argument("--provider", default="CPUExecutionProvider", help="of onnxruntime (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="(default: times.json beside this script)")
    options = parser.parse_args()
    here = Path(__file__).resolve().parent
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if options.provider not in available:
        parser.error(f"this onnxruntime has no {options.provider}; it has {', '.join(available)}")
    if options.threads < 1 or options.seconds <= 0:
        parser.error("--threads and --seconds must be positive")
    networks = json.loads((here / "networks.json").read_text())
    shape = [1, *networks["image_shape"]]
    if any(Path(name).name != name for name in networks["files"]):
        parser.error("networks.json names files of another directory")
    files = [here / name for name in networks["files"]]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        parser.error(f"{', '.join(missing)} is not here: copy the whole directory")

    references: list[float] = []
    ratios: list[float] = [1.0]
    for number, file in enumerate(files[1:], start=2):
        ratio, alone = compare(file, files[0], shape, options.seconds, options.threads, options.provider)
        references += alone
        ratios.append(ratio)
        sys.stderr.write(f"{number}/{len(files)}: {ratio:.3f} of the reference\n")
    reference_ms = 1000 * statistics.median(references)
    device = {
        "cpu": _cpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "onnxruntime": onnxruntime.__version__,
        "provider": options.provider,
        "threads": options.threads,
    }
    document = {"format": 1, "networks": networks, "ms": [ratio * reference_ms for ratio in ratios], "device": device}
    target = options.output or here / "times.json"
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(document, indent=1) + "\n")
    draft.replace(target)
    sys.stdout.write(f"{target}: {len(files)} networks, the reference takes {reference_ms:.3g} ms\n")
    return 0


def compare(
    file: Path, reference: Path, shape: list[int], seconds: float, threads: int, provider: str
) -> tuple[float, list[float]]:
    """Time over the reference's, and the reference's own times in seconds."""
    import numpy

    sessions = [_open(path, threads, provider) for path in (file, reference)]
    image = numpy.full(shape, 0.5, dtype=numpy.float32)
    ratios: list[float] = []
    alone: list[float] = []
    end = time.perf_counter() + seconds
    while len(ratios) < 8 or time.perf_counter() < end:
        mine, theirs = (_block(session, image) for session in sessions)
        alone += theirs
        ratios.append(min(mine) / min(theirs))  # the quickest of a block was interrupted least
    return statistics.median(ratios), alone


def _open(path: Path, threads: int, provider: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise SystemExit(f"onnxruntime fell back from {provider} to {session.get_providers()[0]}")
    return session


def _block(session: Any, image: Any) -> list[float]:
    feed = {session.get_inputs()[0].name: image}
    session.run(None, feed)
    seen = []
    for _ in range(BLOCK):
        start = time.perf_counter()
        session.run(None, feed)
        seen.append(time.perf_counter() - start)
    return seen


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return models[0] if models else platform.processor() or platform.machine()


if __name__ == "__main__":
    raise SystemExit(main())
