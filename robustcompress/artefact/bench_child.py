"""Times one ONNX file when told to: the process that `bench_onnx` starts for each, so that memory is the file's own.

Run as a script. Needs onnxruntime and numpy, and imports nothing of this package, nor torch. It takes one JSON object
as its argument, and a number on each line of standard input: for how many seconds to call the file. It answers each
with the seconds of every call, and the word "end" with its memory, all as lines of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

FEWEST = 3
"""Calls of one turn at least, beside one unseen call that fills the caches again."""


def main() -> None:
    """Serve until told to end."""
    import numpy as np
    import onnxruntime as ort

    asked = json.loads(sys.argv[1])
    before = _peak()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = asked["threads"]
    options.inter_op_num_threads = 1
    start = time.perf_counter()
    session = ort.InferenceSession(asked["file"], options, providers=[asked["provider"]])
    loading = time.perf_counter() - start
    random = np.random.default_rng(0)
    if asked["type"] == "uint8":
        images: Any = random.integers(0, 256, asked["shape"], dtype=np.uint8)
    else:
        images = random.random(asked["shape"], dtype=np.float32).astype(asked["type"])
    feed = {session.get_inputs()[0].name: images}
    session.run(None, feed)
    _say({"provider": session.get_providers()[0], "loading_s": loading})
    for line in iter(sys.stdin.readline, ""):
        if line.strip() == "end":
            break
        session.run(None, feed)
        calls: list[float] = []
        end = time.perf_counter() + float(line)
        while len(calls) < FEWEST or time.perf_counter() < end:
            start = time.perf_counter()
            session.run(None, feed)
            calls.append(time.perf_counter() - start)
        _say({"calls": calls})
    _say({"peak": _peak(), "before": before})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _peak() -> int | None:
    """Bytes that this process held at most so far; None where the system does not say."""
    if sys.platform == "linux":  # where getrusage begins at what the parent held
        lines = Path("/proc/self/status").read_text().splitlines()
        found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        return 1024 * found[0] if found else None
    if sys.platform == "win32":
        return None
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS counts bytes


if __name__ == "__main__":
    main()
