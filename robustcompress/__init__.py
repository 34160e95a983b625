"""Compact, adversarially robust vision models: grow or prune under one budget, verify, export.

Example:
    >>> import robustcompress as rc
    >>> result = rc.compress("resnet8", strategy="grape", epochs=1, progress=False)
    >>> result.after.macs <= result.before.macs / 2
    True
"""

from __future__ import annotations

from robustcompress.api import compress
from robustcompress.artefact import (
    ArtefactReport,
    BenchReport,
    QuantizeReport,
    bench_onnx,
    open_onnx,
    plot_curve,
    quantize_onnx,
    verify_artefact,
)
from robustcompress.budget import Budget, Cost, measure
from robustcompress.certify import CertificateReport, certify, plot_certificates
from robustcompress.cuts import Sensitivity
from robustcompress.data import DataSplits, Images, load_data
from robustcompress.errors import (
    AccuracyError,
    BudgetError,
    CheckpointError,
    HubError,
    InputError,
    Interrupted,
    OutOfTime,
    ParityError,
    ResultError,
    RobustCompressError,
    UnsupportedModelError,
)
from robustcompress.export import export_onnx, verify_onnx
from robustcompress.front import Front
from robustcompress.front_plot import plot_front
from robustcompress.interrupt import graceful
from robustcompress.latency_table import export_latency
from robustcompress.min_robust import MinRobust
from robustcompress.models import ModelSpec, Normalize, build_model, list_models
from robustcompress.pareto import pareto, read_front
from robustcompress.plots import plot_results
from robustcompress.practice import SearchTask, search_task, train_policy
from robustcompress.publish import model_card, pull, push, write_report
from robustcompress.recipe import RunRecipe
from robustcompress.result import CompressResult, load
from robustcompress.robust import RobustReport, ThreatModel, compare, evaluate
from robustcompress.search_plot import plot_search
from robustcompress.sensitivity import sensitivity
from robustcompress.sensitivity_plot import plot_sensitivity
from robustcompress.stability import Stability, hamming, stability
from robustcompress.strategies import (
    AWT,
    RCNAS,
    S2AP,
    STRATEGIES,
    Fixed,
    Grape,
    Harp,
    Hydra,
    Magnitude,
    RandomChannels,
    Reference,
    Scaling,
    Strategy,
    Taylor,
    Uniform,
    register_strategy,
)
from robustcompress.structure import NEW, LayerKind, StructuralEditor, teach_layer
from robustcompress.train import Recipe
from robustcompress.width_plot import plot_widths

__version__ = "0.1.0"

__all__ = [
    "AWT",
    "NEW",
    "RCNAS",
    "S2AP",
    "STRATEGIES",
    "AccuracyError",
    "ArtefactReport",
    "BenchReport",
    "Budget",
    "BudgetError",
    "CertificateReport",
    "CheckpointError",
    "CompressResult",
    "Cost",
    "DataSplits",
    "Fixed",
    "Front",
    "Grape",
    "Harp",
    "HubError",
    "Hydra",
    "Images",
    "InputError",
    "Interrupted",
    "LayerKind",
    "Magnitude",
    "MinRobust",
    "ModelSpec",
    "Normalize",
    "OutOfTime",
    "ParityError",
    "QuantizeReport",
    "RandomChannels",
    "Recipe",
    "Reference",
    "ResultError",
    "RobustCompressError",
    "RobustReport",
    "RunRecipe",
    "Scaling",
    "SearchTask",
    "Sensitivity",
    "Stability",
    "Strategy",
    "StructuralEditor",
    "Taylor",
    "ThreatModel",
    "Uniform",
    "UnsupportedModelError",
    "__version__",
    "bench_onnx",
    "build_model",
    "certify",
    "compare",
    "compress",
    "evaluate",
    "export_latency",
    "export_onnx",
    "graceful",
    "hamming",
    "list_models",
    "load",
    "load_data",
    "measure",
    "model_card",
    "open_onnx",
    "pareto",
    "plot_certificates",
    "plot_curve",
    "plot_front",
    "plot_results",
    "plot_search",
    "plot_sensitivity",
    "plot_widths",
    "pull",
    "push",
    "quantize_onnx",
    "read_front",
    "register_strategy",
    "search_task",
    "sensitivity",
    "stability",
    "teach_layer",
    "train_policy",
    "verify_artefact",
    "verify_onnx",
    "write_report",
]
