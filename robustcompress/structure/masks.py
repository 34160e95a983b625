"""Scores, and the masks they stand for: what gates on channels and gates on single weights have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

MaskRule = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""All scores to all gate values of the same shapes, differentiable in the scores as the rule sees fit."""


def straight_through(scores: Tensor, bits: Tensor) -> Tensor:
    """Zeros and ones whose gradient goes straight to the scores: that of the mask times sign(score).

    Ramanujan et al. 2020 (edge-popup); used by HYDRA (Sehwag et al. 2020). Written without an autograd function of its
    own, so that it can also be differentiated twice and under `torch.func`.

    Args:
        scores: Any shape, any sign.
        bits: Boolean, of that shape; taken as a constant.
    """
    magnitudes = scores * torch.where(scores.detach() < 0, -1.0, 1.0)
    return bits.to(scores.dtype) + (magnitudes - magnitudes.detach())


def largest_entries(scores: Tensor, k: int) -> Tensor:
    """Boolean mask of the `k` largest magnitudes, any shape; of entries that tie, ones spread evenly are kept.

    A layer that begins with zeros (a classifier, often) has nothing but ties, and its first rows alone would be of no
    use.
    """
    values = scores.detach().abs().flatten()
    if k >= len(values):
        return torch.ones_like(scores, dtype=torch.bool)
    if k < 1:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = values.kthvalue(len(values) - k + 1).values
    bits = values > threshold
    ties = (values == threshold).nonzero().flatten()
    wanted = k - int(bits.sum())
    bits[ties[torch.arange(wanted, device=ties.device) * len(ties) // wanted]] = True
    return bits.view(scores.shape)


class TopK:
    """The rule that keeps, of each tensor of scores, those with the largest magnitudes.

    What is kept is worked out once for scores that do not move, as they do not while images are attacked.

    Args:
        counts: How many entries of each tensor are kept, from all scores.
        watch: What the counts depend on beside the scores.
    """

    def __init__(
        self, counts: Callable[[Mapping[str, Tensor]], Mapping[str, int]], *, watch: Sequence[Tensor] = ()
    ) -> None:
        self._counts = counts
        self._watch = list(watch)
        self._seen: tuple[list[Tensor], list[int]] = ([], [])
        self._bits: dict[str, Tensor] = {}

    def __call__(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gate values with straight-through gradients."""
        bits = self.bits(scores)
        return {name: straight_through(values, bits[name]) for name, values in scores.items()}

    @torch.no_grad()
    def bits(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is kept, as boolean tensors."""
        tensors = [*scores.values(), *self._watch]
        versions = [values._version for values in tensors]
        same = len(tensors) == len(self._seen[0]) and all(a is b for a, b in zip(tensors, self._seen[0], strict=True))
        if not same or versions != self._seen[1]:
            counts = self._counts(scores)
            self._bits = {name: largest_entries(values, counts[name]) for name, values in scores.items()}
            self._seen = (tensors, versions)  # the tensors are held, so that no other can take their identity
        return self._bits


class ScoreMasks(ABC):
    """Scores under which a network runs as if what their rule rejects were gone, while the context is open.

    Abstract: `Gates` masks channels, `WeightGates` single weights.

    Args:
        model: The network; as it was on exit, also after an error.
        scores: By name, leaf tensors on the model's device.
        rule: Turns scores into gate values; the scores themselves by default.

    Attributes:
        scores: As given.
        rule: As given.
    """

    def __init__(self, model: nn.Module, scores: Mapping[str, nn.Parameter], rule: MaskRule | None) -> None:
        self.scores = dict(scores)
        self.rule: MaskRule = rule or (lambda values: values)
        self._model = model
        self._cache: Mapping[str, Tensor] = {}

    def parameters(self) -> list[nn.Parameter]:
        """The score tensors."""
        return list(self.scores.values())

    def masks(self) -> dict[str, Tensor]:
        """The gate values now, with gradients."""
        return dict(self.rule(self.scores))

    @torch.no_grad()
    def kept(self, scores: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What these scores (by default the present ones) would leave open, as boolean tensors."""
        return {name: values != 0 for name, values in self.rule(self.scores if scores is None else scores).items()}

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self._model

    @contextmanager
    def at(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Run with these gate values, by name and of the scores' shapes, in place of what the rule makes of the scores.

        They may be anything, also between 0 and 1, and gradients of any order reach them.
        """
        rule, self.rule = self.rule, lambda _: values
        self._forget()
        try:
            yield
        finally:
            self.rule = rule
            self._forget()

    def __enter__(self) -> Self:
        """Attach to the network."""
        self._attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach; the network is as it was."""
        self._detach()
        self._cache = {}

    @abstractmethod
    def _attach(self) -> None:
        """Let the network run under the masks."""

    @abstractmethod
    def _detach(self) -> None:
        """Undo `_attach`, however far it came."""

    def _forget(self, *_: object) -> None:
        # Scores move between forward passes, and a graph may be walked only once: gate values live for one pass.
        self._cache = {}

    def _mask(self, name: str) -> Tensor:
        if not self._cache:
            self._cache = self.rule(self.scores)
        return self._cache[name]
