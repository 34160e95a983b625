"""Bounds of what a network computes anywhere within a box of images: intervals, and one linear bound backwards.

Correct by construction: a box is a tensor of its own kind, which every torch function is asked about before it runs. A
function that has no rule here is an error that names the layer, so that nothing is computed from a box but by a rule;
hooks, gates and parametrised weights are bounded like the layers they belong to.

Own code: auto-LiRPA's last release on the package index (0.3) needs torch below 1.13.
"""

from __future__ import annotations

from robustcompress.robust.bounds.interval import Interval, box
from robustcompress.robust.bounds.margins import Margins, certified_by_bounds, margins
from robustcompress.robust.bounds.warm_up import imbalance, widening

__all__ = ["Interval", "Margins", "box", "certified_by_bounds", "imbalance", "margins", "widening"]
