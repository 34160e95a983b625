"""Taylor: remove what the robust loss would feel least, to first order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from robustcompress.session import Session
from robustcompress.strategies.pruning import Pruning, one_shot
from robustcompress.strategies.units import Channels, Scores, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Taylor(Pruning):
    """`magnitude` with first-order Taylor scores (Molchanov et al., CVPR 2019, eq. 8 with gates) of the robust loss.

    The score of a unit is the root mean square, over batches of attacked training images, of the loss's derivative with
    respect to a gate on it: what closing the gate changes, to first order. For a channel the gate sits where the group
    is read, so all its layers count at once; torch-pruning's `GroupTaylorImportance` sums the same products of weights
    and gradients over the layers of a group, where its index mapping holds. For a single weight the score is
    |weight x gradient|. Ours: the adversarial loss (PGD-10) in place of the clean one.

    Attributes:
        score_batches: Batches of training images that are attacked for the scores.
    """

    name: ClassVar[str] = "taylor"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"score_batches": (1, 10_000)}
    score_batches: int = 8

    def run(self, session: Session) -> None:
        """Pretrain, score, cut, fine-tune."""
        note = {"phase": "prune", "event": "scores", "scores": self.score_batches}
        one_shot(self, session, lambda units: taylor_scores(session, units, batches=self.score_batches), note=note)


def taylor_scores(session: Session, units: Channels | Weights, *, batches: int) -> Scores:
    """Root mean square over batches of the derivative of the adversarial loss with respect to gates, which are open.

    Args:
        session: The network under compression; seen in eval mode.
        units: What gets a score.
        batches: Batches of training images, attacked by PGD-10.

    Returns:
        By group or weight, scores of the shape of its units.
    """
    model = session.model
    ones = {name: torch.ones_like(values, dtype=torch.float32) for name, values in units.magnitudes().items()}
    squares = {name: torch.zeros_like(values) for name, values in ones.items()}
    with units.gates(ones, lambda scores: scores) as gates:
        for x_adv, y in session.attacked(batches):
            loss = F.cross_entropy(model(x_adv), y)
            # Of what only training calls, the loss feels nothing.
            slopes = torch.autograd.grad(loss, gates.parameters(), materialize_grads=True)
            for name, slope in zip(squares, slopes, strict=True):
                squares[name] += slope.square().to(squares[name].device)
    return {name: (total / batches).sqrt() for name, total in squares.items()}
