"""What a strategy offers that learns scores under masks: its search can be perturbed from outside."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from robustcompress.session import Session
from robustcompress.strategies.base import Strategy
from robustcompress.structure.gates import Gates
from robustcompress.train import Ascent

MakeAscent = Callable[[Gates], Ascent | None]
"""Makes the ascent of a search from its gates: their scores are what it may move, their rule is what it may flip."""


class ScoreBased(Strategy):
    """A strategy that learns one score a channel, by the gradient that a mask of the scores lets through.

    Abstract. Whoever derives from it can be the host of `S2AP`.
    """

    def run(self, session: Session) -> None:
        """As `run_with`, with nothing added."""
        self.run_with(session)

    @abstractmethod
    def run_with(
        self, session: Session, *, ascent: MakeAscent | None = None, finetune_awp: float | None = None
    ) -> None:
        """Compress.

        Args:
            session: What to compress.
            ascent: Gives the ascent under which scores are learnt; None for none.
            finetune_awp: Radius of adversarial weight perturbation in the fine-tuning; None for the recipe's.
        """
