"""Randomized smoothing (Cohen, Rosenfeld and Kolter 2019): a radius for the majority vote under Gaussian noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from robustcompress.certify.binomial import lower_bound
from robustcompress.certify.report import ABSTAINS


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed:
    """A network's majority vote under noise of N(0, sigma^2), which is never clipped to the range of pixels.

    Attributes:
        model: Maps images to logits, in eval mode, on `device`.
        sigma: Standard deviation of the noise, in the unit of the pixels.
        n0: Draws that guess the class.
        n: Draws that bound its probability; not the same ones.
        alpha: How often a certificate may be wrong.
        batch_size: Draws a forward pass.
        device: Where the network computes, and the noise is drawn.
        seed: Of the noise; each image has noise of its own, whatever else is certified.
    """

    model: nn.Module
    sigma: float
    n0: int
    n: int
    alpha: float
    batch_size: int
    device: torch.device
    seed: int

    def certify(self, pixels: Tensor, number: int) -> tuple[int, float]:
        """Certify one image (Cohen et al. 2019, section 3.2.2, CERTIFY).

        Args:
            pixels: The image, float32 [C, H, W], on the device.
            number: Which image it is: with the seed, what its noise is drawn by.

        Returns:
            The class, and the l2 radius within which the vote is for it, but for a probability of alpha; or `ABSTAINS`
            and 0, where the draws do not show a majority.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + number)
        top = int(self._votes(pixels, self.n0, generator).argmax())
        seen = int(self._votes(pixels, self.n, generator)[top])
        radius = certified_radius(seen, self.n, sigma=self.sigma, alpha=self.alpha)
        return (top, radius) if radius > 0 else (ABSTAINS, 0.0)

    @torch.no_grad()
    def _votes(self, pixels: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        """How often each class was predicted: int64 [K], on the CPU."""
        votes: Tensor | None = None
        for size in _batches(draws, self.batch_size):
            noise = torch.randn((size, *pixels.shape), device=self.device, generator=generator)
            logits = self.model(noise.mul_(self.sigma).add_(pixels))
            found = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
            votes = found if votes is None else votes + found
        assert votes is not None
        return votes.cpu()


def certified_radius(seen: int, n: int, *, sigma: float, alpha: float) -> float:
    """Return the radius that `seen` votes of `n` certify (Cohen et al. 2019, theorem 1 with p_B = 1 - p_A).

    Args:
        seen: Votes for the class.
        n: All votes.
        sigma: Standard deviation of the noise.
        alpha: How often the bound on the probability of the class may fail.

    Returns:
        sigma times the normal quantile of the lower bound; 0 where the bound is no majority.
    """
    bound = lower_bound(seen, n, alpha) if 2 * seen > n else 0.0
    return sigma * NormalDist().inv_cdf(bound) if bound > 0.5 else 0.0


def _batches(draws: int, size: int) -> Iterator[int]:
    while draws > 0:
        yield min(draws, size)
        draws -= size
