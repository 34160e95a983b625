"""Deployment: one self-contained ONNX file that provably computes what the model computes."""

from __future__ import annotations

from robustcompress.export.parity import verify_onnx
from robustcompress.export.report import ExportReport, ParityCheck
from robustcompress.export.session import load_session
from robustcompress.export.write import export_onnx

__all__ = ["ExportReport", "ParityCheck", "export_onnx", "load_session", "verify_onnx"]
