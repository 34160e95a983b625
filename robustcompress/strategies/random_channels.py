"""What a cut costs when nothing guides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from robustcompress.session import Session
from robustcompress.strategies.pruning import Pruning, one_shot
from robustcompress.strategies.units import Channels, Scores, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomChannels(Pruning):
    """`magnitude` with channels or weights drawn at random: the same counts, the same schedule (Mittal et al. 2018).

    What a criterion is worth is what it gains over this. The options are those of `Pruning`.
    """

    name: ClassVar[str] = "random"

    def run(self, session: Session) -> None:
        """Pretrain, cut, fine-tune."""

        def draw(units: Channels | Weights) -> Scores:
            sizes = units.magnitudes()
            return {n: torch.rand(like.shape, generator=session.generator).to(like.device) for n, like in sizes.items()}

        one_shot(self, session, draw)
