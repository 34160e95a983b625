"""Compact, adversarially robust vision models: grow or prune under one budget, verify, export.

Example:
    >>> import robustcompress as rc
    >>> result = rc.compress("resnet8", strategy="grape", epochs=1, progress=False)
    >>> result.after.macs <= result.before.macs / 2
    True
"""

from __future__ import annotations

from robustcompress.api import compress
from robustcompress.budget import Budget, Cost, measure
from robustcompress.data import DataSplits, Images, load_data
from robustcompress.errors import (
    BudgetError,
    CheckpointError,
    InputError,
    OutOfTime,
    ParityError,
    ResultError,
    RobustCompressError,
    UnsupportedModelError,
)
from robustcompress.export import export_onnx, verify_onnx
from robustcompress.models import ModelSpec, Normalize, build_model, list_models
from robustcompress.plots import plot_results
from robustcompress.practice import SearchTask, search_task, train_policy
from robustcompress.recipe import RunRecipe
from robustcompress.result import CompressResult, load
from robustcompress.robust import RobustReport, ThreatModel, compare, evaluate
from robustcompress.search_plot import plot_search
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
    "Budget",
    "BudgetError",
    "CheckpointError",
    "CompressResult",
    "Cost",
    "DataSplits",
    "Fixed",
    "Grape",
    "Harp",
    "Hydra",
    "Images",
    "InputError",
    "LayerKind",
    "Magnitude",
    "ModelSpec",
    "Normalize",
    "OutOfTime",
    "ParityError",
    "RandomChannels",
    "Recipe",
    "Reference",
    "ResultError",
    "RobustCompressError",
    "RobustReport",
    "RunRecipe",
    "Scaling",
    "SearchTask",
    "Stability",
    "Strategy",
    "StructuralEditor",
    "Taylor",
    "ThreatModel",
    "Uniform",
    "UnsupportedModelError",
    "__version__",
    "build_model",
    "compare",
    "compress",
    "evaluate",
    "export_onnx",
    "hamming",
    "list_models",
    "load",
    "load_data",
    "measure",
    "plot_results",
    "plot_search",
    "plot_widths",
    "register_strategy",
    "search_task",
    "stability",
    "teach_layer",
    "train_policy",
    "verify_onnx",
]
