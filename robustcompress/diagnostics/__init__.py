"""How sharp the robust loss is around a mask that a search has found."""

from robustcompress.diagnostics.curvature import Eigenvalue, top_eigenvalue
from robustcompress.diagnostics.loss import attacked_loss
from robustcompress.diagnostics.search import look_at_search
from robustcompress.diagnostics.sharpness import Sharpness, sharpness

__all__ = ["Eigenvalue", "Sharpness", "attacked_loss", "look_at_search", "sharpness", "top_eigenvalue"]
