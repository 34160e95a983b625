"""The honest baseline: remove what has the smallest weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustcompress.session import Session
from robustcompress.strategies.pruning import Pruning, one_shot


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude(Pruning):
    """Robust pretraining, one cut by group norm (Li et al. 2017, over coupled channels), robust fine-tuning.

    Every group keeps the same share of its channels, the largest that meets the budget. Also what HYDRA does when it
    searches for zero epochs ("LWM" in Sehwag et al. 2020). At granularity "weight", the largest weights stay (Han et
    al. 2015). The options are those of `Pruning`.
    """

    name: ClassVar[str] = "magnitude"

    def run(self, session: Session) -> None:
        """Pretrain, cut, fine-tune."""
        one_shot(self, session, lambda units: units.magnitudes())
