"""An ONNX file as a function from images in [0, 1] to scores: the reader that the export itself is verified through."""

from __future__ import annotations

from robustcompress.export.reading import BATCH, OnnxFile, open_onnx

__all__ = ["BATCH", "OnnxFile", "open_onnx"]
