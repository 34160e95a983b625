"""A deployed file, judged as what it is: what it says of itself, and what onnxruntime computes from it."""

from __future__ import annotations

from robustcompress.artefact.changes import Change, QuantizeReport
from robustcompress.artefact.file import OnnxFile, open_onnx
from robustcompress.artefact.quantize import quantize_onnx

__all__ = ["Change", "OnnxFile", "QuantizeReport", "open_onnx", "quantize_onnx"]
