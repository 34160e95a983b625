"""How long onnxruntime takes for one image: a network against its reference, in turns."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from robustcompress.export.ends import INPUT
from robustcompress.export.graph import to_proto
from robustcompress.latency import Timing
from robustcompress.structure import NEW, StructuralEditor
from robustcompress.train import set_memory_format

BLOCK = 5
"""Calls of one network before it is the other's turn; one more goes before them unseen, to fill the caches again."""

WINDOW = 0.5
"""Seconds after which both networks are opened anew: where their memory happens to lie moves a ratio by a percent."""

WINDOWS = 5
"""The fewest windows from which their scatter is judged."""

LONGEST = 15.0
"""Seconds after which a measurement ends, however much its windows scatter."""

_OPSET = 20  # as `export_onnx` writes where nothing is said


class Stopwatch:
    """Times networks of any widths against their reference.

    What is timed is what `export_onnx` writes, at batch 1, by one thread of onnxruntime on the CPU. The weights do not
    matter, so a network of other widths is a copy of the reference, resized.

    Args:
        editor: Of the reference, before any edit; copied.
        image_shape: (C, H, W).
    """

    def __init__(self, editor: StructuralEditor, image_shape: tuple[int, int, int]) -> None:
        self._editor = copy.deepcopy(editor)
        self._editor.model.to("cpu", torch.float32).eval()
        self._shape = image_shape
        self._image = torch.full((1, *image_shape), 0.5).numpy()
        self._reference: bytes | None = None

    def resized(self, widths: Mapping[str, int], *, without: Iterable[str] = ()) -> nn.Module:
        """A copy of the reference with these group widths, and without these blocks."""
        twin = copy.deepcopy(self._editor)
        for module in without:
            twin.bypass(module)
        for group, now in twin.widths.items():
            width = widths.get(group, now)
            if width != now:
                twin.resize(group, [*range(min(now, width)), *[NEW] * (width - now)])
        return twin.model

    def time(self, model: nn.Module, *, seconds: float = WINDOW, precision: float | None = None) -> Timing:
        """Time a network and the reference in turns, so that what else the machine does meets both.

        Args:
            model: On any device; copied.
            seconds: How long, about; at least eight turns.
            precision: Go on, at most for `LONGEST` seconds, until the standard error of the ratio is no more than this.
        """
        ours = self._exported(model)
        if self._reference is None:
            self._reference = self._exported(self._editor.model)
        alone: list[float] = []
        windows: list[float] = []
        start = time.perf_counter()
        while not windows or time.perf_counter() < start + seconds or (precision and _scatter(windows) > precision):
            if windows and time.perf_counter() > start + max(seconds, LONGEST):
                break
            windows.append(self._window(ours, self._reference, min(seconds, WINDOW), alone))
        reference_ms = 1000 * statistics.median(alone)
        return Timing(statistics.median(windows) * reference_ms, reference_ms)

    def _window(self, ours: bytes, reference: bytes, seconds: float, alone: list[float]) -> float:
        """The ratio of both, from turns of this many seconds; the reference's own times are added to `alone`."""
        sessions = (_open(ours), _open(reference))
        ratios: list[float] = []
        end = time.perf_counter() + seconds
        while len(ratios) < 8 or time.perf_counter() < end:
            mine, theirs = (_block(session, self._image) for session in sessions)
            alone.extend(theirs)
            # The quickest of a block was interrupted least; a turn is short, so both have the same clock and caches.
            ratios.append(min(mine) / min(theirs))
        return float(statistics.median(ratios))

    def _exported(self, model: nn.Module) -> bytes:
        twin = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
        set_memory_format(twin, torch.contiguous_format)
        with torch.random.fork_rng(devices=[]):  # a strategy may be drawing
            written: bytes = to_proto(twin, self._shape, opset=_OPSET, batch="dynamic").SerializeToString()
        return written


def _scatter(windows: list[float]) -> float:
    """Relative standard error of the median of the windows; infinite while there are too few to tell."""
    if len(windows) < WINDOWS:
        return math.inf
    return 1.25 * statistics.stdev(windows) / math.sqrt(len(windows)) / statistics.median(windows)


def _open(written: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(written, options, providers=["CPUExecutionProvider"])


def _block(session: Any, image: Any) -> list[float]:
    """Seconds of each call of one turn."""
    session.run(None, {INPUT: image})
    seen = []
    for _ in range(BLOCK):
        start = time.perf_counter()
        session.run(None, {INPUT: image})
        seen.append(time.perf_counter() - start)
    return seen
