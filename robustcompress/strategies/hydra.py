"""HYDRA: learn what the robust loss can spare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustcompress.session import Session
from robustcompress.strategies.scores import MakeAscent, ScoreBased, search
from robustcompress.strategies.units import Channels, Choice, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Hydra(ScoreBased):
    """HYDRA (Sehwag et al., NeurIPS 2020) on channel groups, or as published on single weights.

    From the paper and its released settings: robust pretraining; scores started in proportion to the weights; weights
    frozen while the robust objective trains the scores through a straight-through top-k; batch-norm affines and
    statistics keep moving during the search; the same share of every layer is kept (of every group, for channels);
    robust fine-tuning.

    Ours: for channels, one score a group, gates at the readers so that a closed gate is exactly a removed channel, and
    physical removal; batch-norm statistics re-estimated where units close; Adam for the scores, because the released
    learning rate belongs to a search of 20 epochs (and a channel's gate sums thousands of weight terms).
    Reconstructed: the split of the epochs, from the paper's 100 / 20 / 100.

    The options are those of `ScoreBased` and `Pruning`.
    """

    name: ClassVar[str] = "hydra"

    def learn(self, session: Session, units: Channels | Weights, ascent: MakeAscent | None) -> Choice:
        """Scores under the goal's objective; see `ScoreBased.learn`."""
        first = lambda: units.first_scores(units.magnitudes())  # noqa: E731
        return Choice(search(self, session, units, first=first, ascent=ascent))
