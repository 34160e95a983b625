"""How long a network of any widths takes: predicted from measurements, corrected by more of them."""

from __future__ import annotations

from robustcompress.latency.fit import Layer, fit, layers_of
from robustcompress.latency.limit import LatencyLimit, Timing
from robustcompress.latency.model import LatencyModel, Side, Term
from robustcompress.latency.samples import sample_widths

__all__ = [
    "LatencyLimit",
    "LatencyModel",
    "Layer",
    "Side",
    "Term",
    "Timing",
    "fit",
    "layers_of",
    "sample_widths",
]
