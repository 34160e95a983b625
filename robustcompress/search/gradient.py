"""The vanilla policy gradient (REINFORCE, Williams 1992) for choices made in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustcompress.search.domain import Config, Domain
from robustcompress.search.policy import Policy

_LARGEST = 3.0
"""Advantages are cut there: in a batch of repeats the spread says nothing of the scale of rewards."""


class Baseline:
    """What reward to expect: a moving average of the means of batches.

    Args:
        decay: Weight of the past, in [0, 1).
        value: Where it stands; None before the first batch.
    """

    def __init__(self, decay: float, value: float | None = None) -> None:
        self.decay = decay
        self.value = value

    def advantages(self, rewards: Sequence[float]) -> Tensor:
        """How much better than expected each reward is, over the spread of the batch, `[N]`; then expect anew."""
        found = torch.tensor(rewards, dtype=torch.float64)
        mean = float(found.mean())
        expected = mean if self.value is None else self.value
        spread = float(found.std(correction=0))
        self.value = self.decay * expected + (1 - self.decay) * mean
        return ((found - expected) / (spread + 1e-8)).clamp(-_LARGEST, _LARGEST).float()


def loss(policy: Policy, domain: Domain, configs: Sequence[Config], advantages: Tensor, entropy: float) -> Tensor:
    """What to minimise: minus the advantage-weighted log-likelihood of the choices, minus the weighted entropy.

    Args:
        policy: To be trained.
        domain: What was chosen from.
        configs: N choices that the policy made.
        advantages: `[N]`.
        entropy: Weight of the policy's entropy in nats, summed over the coordinates.
    """
    logs = policy(domain)
    chosen = torch.stack(
        [torch.stack([log[option] for log, option in zip(logs, c, strict=True)]).sum() for c in configs]
    )
    spread = torch.stack([-(log.exp() * log).sum() for log in logs]).sum()
    return -(advantages * chosen).mean() - entropy * spread
