"""A deployed file, judged as what it is: what it says of itself, and what onnxruntime computes from it."""

from __future__ import annotations

from robustcompress.artefact.bench import BenchReport, BenchRow, bench_onnx
from robustcompress.artefact.changes import Change, QuantizeReport
from robustcompress.artefact.curve import plot_curve
from robustcompress.artefact.file import OnnxFile, open_onnx
from robustcompress.artefact.quantize import quantize_onnx
from robustcompress.artefact.report import ArtefactReport, CurvePoint
from robustcompress.artefact.square import SquareOutcome, square
from robustcompress.artefact.verify import verify_artefact

__all__ = [
    "ArtefactReport",
    "BenchReport",
    "BenchRow",
    "Change",
    "CurvePoint",
    "OnnxFile",
    "QuantizeReport",
    "SquareOutcome",
    "bench_onnx",
    "open_onnx",
    "plot_curve",
    "quantize_onnx",
    "square",
    "verify_artefact",
]
