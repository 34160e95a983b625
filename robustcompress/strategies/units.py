"""What a pruning strategy chooses among: channels, which are removed, or single weights, which become zeros."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robustcompress.session import Session
from robustcompress.shapes import Widths, fill_budget, floor_widths, rounded, steps_of, uniform_widths
from robustcompress.strategies.base import Granularity, prune_by
from robustcompress.structure.magnitudes import group_norms
from robustcompress.structure.masks import MaskRule, ScoreMasks, largest_entries
from robustcompress.structure.weights import Sparsity, WeightGates, maskable_weights

Allocation = Literal["uniform", "global"]
Residual = Literal["coupled", "freeze"]
Scores = dict[str, Tensor]
Counts = dict[str, int]


@dataclass(frozen=True, slots=True)
class Choice:
    """By which scores is cut, and how many units are kept.

    Attributes:
        scores: By group or weight; those with the largest magnitudes stay.
        counts: Tells how many stay of each; None for as many as the allocation says.
    """

    scores: Scores
    counts: Callable[[], Counts] | None = None


class Units(ABC):
    """Channels or weights of a network under compression, by group or by layer. Abstract."""

    @abstractmethod
    def magnitudes(self) -> Scores:
        """How large each unit is: the signed weights, or the norms of channels."""

    @abstractmethod
    def first_scores(self, magnitudes: Mapping[str, Tensor]) -> Scores:
        """Scores in proportion to magnitudes, `sqrt(6 / fan_in) * m / max |m|` for each tensor (HYDRA's start)."""

    @abstractmethod
    def pace(self, first: Tensor) -> float:
        """In what a step of the score learning rate is measured, for a tensor of first scores."""

    @abstractmethod
    def counts(self, scores: Mapping[str, Tensor]) -> Counts:
        """How many units of each tensor are kept, so that the budget is met."""

    @abstractmethod
    def gates(self, scores: Mapping[str, Tensor], rule: MaskRule) -> ScoreMasks:
        """Learnable scores, under whose masks the network runs while the context is open."""

    @abstractmethod
    def remember(self, name: str, compute: Callable[[], Scores]) -> Scores:
        """Something computed from weights and used after the next phase: a resumed run has what was computed first.

        Call `forget` when it is no longer needed.
        """

    @abstractmethod
    def forget(self, name: str) -> None:
        """Let go of what is remembered by this name."""

    def counted(self, choice: Choice) -> Counts:
        """How many units of each tensor a choice keeps: what it says, else what the allocation says."""
        return self.counts(choice.scores) if choice.counts is None else choice.counts()

    @abstractmethod
    def cut(self, choose: Callable[[], Choice]) -> AbstractContextManager[None]:
        """Keep the units with the largest scores alone, and hold the others down while the context is open.

        Args:
            choose: Asked once; not asked while a resumed run catches up.
        """


class Channels(Units):
    """The channel groups of a network.

    Args:
        session: The network under compression.
        allocation: "uniform" keeps the same share of each group, "global" those whose score is largest as a share of
            their group's largest, whatever the group.
        residual: "freeze" leaves groups that several layers write, such as residual streams, as they are.
    """

    def __init__(self, session: Session, *, allocation: Allocation, residual: Residual) -> None:
        self._session = session
        self._allocation = allocation
        open_groups = [g for g in session.editor.editable if residual == "coupled" or g.kind != "residual"]
        self.widths: Widths = {group.name: group.width for group in open_groups}
        """By group that may be cut, its width now."""
        # At once: where latency is limited, it is measured and put down in the journal, which has an order.
        self._uniform = uniform_widths(session, only=self.widths) if allocation == "uniform" else {}

    def magnitudes(self) -> Scores:
        """Norm of all weights that touch each channel, `[C]`."""
        norms = group_norms(self._session.editor)
        return {name: norms[name] for name in self.widths}

    def first_scores(self, magnitudes: Mapping[str, Tensor]) -> Scores:
        """The fan is taken as one, as in HARP's released code."""
        most = {name: values.max().clamp_min(1e-20) for name, values in magnitudes.items()}
        return {name: (6**0.5 * values / most[name]).float() for name, values in magnitudes.items()}

    def pace(self, first: Tensor) -> float:
        """One: all groups' scores begin in [0, 2.45]."""
        return 1.0

    def counts(self, scores: Mapping[str, Tensor]) -> Counts:
        """Widths that meet the budget."""
        if self._allocation == "uniform":
            return dict(self._uniform)
        return self._global(scores)

    def gates(self, scores: Mapping[str, Tensor], rule: MaskRule) -> ScoreMasks:
        """Gates at the readers of each group."""
        return self._session.editor.gates(scores, rule)

    def remember(self, name: str, compute: Callable[[], Scores]) -> Scores:
        """Through `Session.decide`: channels are few."""
        return self._session.decide(name, compute)

    def forget(self, name: str) -> None:
        """A decision is no burden: nothing to do."""

    @contextlib.contextmanager
    def cut(self, choose: Callable[[], Choice]) -> Iterator[None]:
        """Remove channels; there is nothing to hold down."""
        once = functools.cache(choose)

        if self._session.latency is None:  # nothing is measured, so all of it can be one decision
            prune_by(self._session, lambda: (self.counted(once()), once().scores))
        else:
            widths = self._session.choose("widths to keep", lambda: self.counted(once()))
            prune_by(self._session, lambda: (widths, once().scores))
        yield

    def _global(self, scores: Mapping[str, Tensor]) -> Widths:
        """Bisect for the share of a group's largest score below which channels go."""
        session, round_to = self._session, self._session.goal.round_to
        floor, steps = floor_widths(session.editor, round_to), steps_of(session.editor, round_to)
        shares = {name: (s.detach().abs() / s.detach().abs().max()).cpu() for name, s in scores.items()}

        def widths_at(threshold: float) -> Widths:
            kept = {name: int((share >= threshold).sum()) for name, share in shares.items()}
            return {n: rounded(kept[n], steps[n], floor[n], width) for n, width in self.widths.items()}

        low, high = 0.0, 1.0  # the largest scores of all groups stay, or all of them
        if session.fits(widths_at(low)):
            return widths_at(low)
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if session.fits(widths_at(middle)) else (middle, high)
        return fill_budget(session, widths_at(high), self.widths)


PACE = 5.0
"""So that one score learning rate does for channels and weights. Chosen on the digits' validation images."""


class Weights(Units):
    """The single weights of convolutions and linear layers, first and last layer included.

    Args:
        session: The network under compression; its budget says a density.
        allocation: "uniform" keeps the same share of each layer (HYDRA), "global" the largest scores of all.
    """

    def __init__(self, session: Session, *, allocation: Allocation) -> None:
        self._session = session
        self._allocation = allocation
        self._sizes = {name: weight.numel() for name, weight in maskable_weights(session.model).items()}
        self.total = session.goal.kept_weights
        """How many weights the budget allows."""

    @property
    def sizes(self) -> dict[str, int]:
        """By weight tensor, how many it holds."""
        return dict(self._sizes)

    def magnitudes(self) -> Scores:
        """The weights themselves."""
        return {name: weight.detach().clone() for name, weight in maskable_weights(self._session.model).items()}

    def first_scores(self, magnitudes: Mapping[str, Tensor]) -> Scores:
        """As HYDRA's scaled initialisation; where all are ranked together, by one scale for all."""
        largest = {name: float(w.abs().max().clamp_min(1e-20)) for name, w in magnitudes.items()}
        most = max(largest.values())
        if self._allocation == "global":
            return {name: 6**0.5 * w / most for name, w in magnitudes.items()}
        return {name: (6 / w[0].numel()) ** 0.5 * w / largest[name] for name, w in magnitudes.items()}

    def pace(self, first: Tensor) -> float:
        """Five times their root mean square: the largest of many weights says little about where the others lie."""
        spread = float(first.square().mean().sqrt())
        return PACE * (spread or float(first[0].numel()) ** -0.5)  # a layer of zeros must be able to move too

    def counts(self, scores: Mapping[str, Tensor]) -> Counts:
        """How many weights of each layer are kept; together no more than the budget's density allows."""
        if self._allocation == "uniform":
            return shares(self._sizes, self.total)
        magnitudes = torch.cat([s.detach().abs().flatten() for s in scores.values()])
        bits = torch.split(largest_entries(magnitudes, self.total), [s.numel() for s in scores.values()])
        return at_least_one({name: int(b.sum()) for name, b in zip(scores, bits, strict=True)})

    def gates(self, scores: Mapping[str, Tensor], rule: MaskRule) -> ScoreMasks:
        """Gates on the weights themselves."""
        return WeightGates(self._session.model, scores, rule)

    def remember(self, name: str, compute: Callable[[], Scores]) -> Scores:
        """Through `Session.keep`: as tensors."""
        kept = _Kept(maskable_weights(self._session.model))
        self._session.keep(name, kept)
        if not self._session.replaying:
            kept.load_state_dict(self._session.world.broadcast(dict(compute())))
        return kept.tensors

    def forget(self, name: str) -> None:
        """Leave the checkpoints."""
        self._session.forget(name)

    @contextlib.contextmanager
    def cut(self, choose: Callable[[], Choice]) -> Iterator[None]:
        """Zero weights, and hold the zeros."""
        session, sparsity = self._session, Sparsity(self._session.model)
        session.settle()  # optimizer and average would bring the old values back
        session.keep("sparsity", sparsity)
        if not session.replaying:
            choice = choose()
            counts = self.counted(choice)
            masks = {name: largest_entries(s, counts[name]) for name, s in choice.scores.items()}
            sparsity.set_masks(session.world.broadcast(masks))
        kept = {name: int(mask.sum()) for name, mask in sparsity.masks.items()}
        density = sum(kept.values()) / sum(self._sizes.values())
        session.record({"phase": "prune", "event": "prune", "weights": kept, "density": density})
        with sparsity:
            yield
        session.settle()
        sparsity.set_masks(sparsity.masks)  # gradients of either sign have made some of the zeros negative ones
        session.forget("sparsity")


class _Kept:
    """Tensors of the shapes of others, which checkpoints hold."""

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.tensors = {name: torch.zeros_like(tensor, requires_grad=False) for name, tensor in like.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


def shares(sizes: Mapping[str, float], total: int) -> dict[str, int]:
    """Divide `total` in proportion to sizes: at least one each, what rounding leaves to those it took most from."""
    exact = {name: total * size / sum(sizes.values()) for name, size in sizes.items()}
    counts = {name: max(1, int(share)) for name, share in exact.items()}
    spare = total - sum(counts.values())
    for name in sorted(exact, key=lambda n: (counts[n] - exact[n], n))[: max(0, spare)]:
        counts[name] += 1
    return at_least_one(counts, total=total)


def at_least_one(counts: Mapping[str, int], *, total: int | None = None) -> dict[str, int]:
    """One for whoever has none, taken from whoever has most, so that the sum stays (or comes down to `total`)."""
    counts = dict(counts)
    total = sum(counts.values()) if total is None else total
    for name, count in counts.items():
        counts[name] = max(1, count)
    while sum(counts.values()) > max(total, len(counts)):
        counts[max(counts, key=lambda n: counts[n])] -= 1
    return counts


def granular(
    session: Session, *, granularity: Granularity, allocation: Allocation = "uniform", residual: Residual = "coupled"
) -> Channels | Weights:
    """The units of a network at a granularity."""
    if granularity == "weight":
        return Weights(session, allocation=allocation)
    return Channels(session, allocation=allocation, residual=residual)
