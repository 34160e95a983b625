"""A small dense network trained from scratch: what every compression has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustcompress.session import Session
from robustcompress.shapes import uniform_widths
from robustcompress.strategies.base import Direction, Strategy
from robustcompress.strategies.scratch import plant


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform(Strategy):
    """Uniform width scaling (MobileNet's width multiplier, Howard et al. 2017), trained from scratch for all epochs.

    The reference is narrowed by one ratio to the budget before any training. It gives the shape alone: the weights of a
    pretrained one are not used.
    """

    name: ClassVar[str] = "uniform"
    direction: ClassVar[Direction] = "prune"

    def run(self, session: Session) -> None:
        """Narrow, then train."""
        plant(session, uniform_widths(session))
        session.train("train", share=1.0, select=True)
