"""A deployed file, judged as what it is: what it says of itself, and what onnxruntime computes from it."""

from __future__ import annotations

from robustcompress.artefact.file import OnnxFile, open_onnx

__all__ = ["OnnxFile", "open_onnx"]
