"""The reference, trained with everything a compact model is trained with: what compression is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustcompress.session import Session
from robustcompress.strategies.base import Direction, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference(Strategy):
    """No compression: the same data, objective, recipe, average and epochs, at the reference's own size.

    The budget is not applied.
    """

    name: ClassVar[str] = "none"
    direction: ClassVar[Direction] = "none"

    def run(self, session: Session) -> None:
        """Train."""
        session.train("train", share=1.0, select=True)
