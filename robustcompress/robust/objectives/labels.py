"""What every loss on labels shares: smoothed labels, and classes that count more than others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustcompress.errors import InputError
from robustcompress.robust.objective import Objective
from robustcompress.robust.objectives.parts import check_options

ClassWeights = Literal["none", "balanced"] | tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelLoss(Objective):
    """An objective that compares logits with labels. Abstract: it holds the options that all of these have, and means.

    An example counts as much as its class: every loss of one example, a divergence like a cross-entropy, is multiplied
    by the weight of its label, and a batch's loss is the weighted mean, `sum(w[y] * loss) / sum(w[y])`. The attack
    knows nothing of it.

    Attributes:
        label_smoothing: Share of each label given to all classes alike, in [0, 1), wherever the formula has a
            cross-entropy.
        class_weights: "none"; "balanced", for weights in inverse proportion to how often a class occurs among the
            training labels, which `for_labels` turns into numbers before a run; or those numbers, one a class.
    """

    label_smoothing: float = 0.0
    class_weights: ClassWeights = "none"

    def __post_init__(self) -> None:
        if isinstance(self.class_weights, list):  # as JSON and YAML have it
            object.__setattr__(self, "class_weights", tuple(self.class_weights))
        check_options(self)

    def for_labels(self, labels: Tensor, num_classes: int) -> Objective:
        """See `Objective.for_labels`: balanced weights become numbers."""
        if self.class_weights == "none":
            return self
        if self.class_weights == "balanced":
            return replace(self, class_weights=balanced(labels, num_classes))
        if len(self.class_weights) != num_classes:
            raise InputError(
                f"class_weights holds {len(self.class_weights)} numbers, and there are {num_classes} classes: give one "
                "for each, or 'balanced'"
            )
        return self

    def mean(self, losses: Tensor, y: Tensor) -> Tensor:
        """The mean over a batch, in which each example counts as its class does.

        Args:
            losses: One for each example, [N].
            y: Labels, int64 [N].

        Raises:
            InputError: The weights are "balanced" still, and nobody has said with respect to which labels.
        """
        if self.class_weights == "none":
            return losses.mean()
        if self.class_weights == "balanced":
            raise InputError("class_weights='balanced' needs training labels: call objective.for_labels() first")
        weights = torch.tensor(self.class_weights, dtype=losses.dtype, device=losses.device)[y]
        return (weights * losses).sum() / weights.sum()

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy with smoothed labels, [N, K] and [N] to a scalar."""
        if self.class_weights == "none":
            return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        losses = F.cross_entropy(logits, y, reduction="none", label_smoothing=self.label_smoothing)
        return self.mean(losses, y)

    def divergence(self, clean: Tensor, attacked: Tensor, y: Tensor) -> Tensor:
        """KL(clean || attacked) of logits, [N, K] both, to a scalar; gradients flow into both."""
        p, q = clean.log_softmax(1), attacked.log_softmax(1)
        if self.class_weights == "none":
            return F.kl_div(q, p, reduction="batchmean", log_target=True)
        return self.mean(F.kl_div(q, p, reduction="none", log_target=True).sum(1), y)

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`."""
        return {"name": self.name, **asdict(self)}


def balanced(labels: Tensor, num_classes: int) -> tuple[float, ...]:
    """Weights in inverse proportion to how often each class occurs, `N / (K * N_c)`: their mean over `labels` is one.

    Args:
        labels: int64 [N].
        num_classes: How many classes there may be; K is the number of those that occur. The others, which no example
            will ask for, weigh one.
    """
    counts = labels.flatten().bincount(minlength=num_classes).tolist()
    present = sum(count > 0 for count in counts)
    total = sum(counts)
    return tuple(total / (present * count) if count else 1.0 for count in counts)
