"""A strategy that factorises layers in place of removing channels; for `factorised.py`, not of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustcompress import Strategy
from robustcompress.errors import BudgetError
from robustcompress.session import Session
from robustcompress.strategies.base import Direction
from robustcompress.structure import Factorise
from robustcompress.structure.factors import complaint, largest_ranks, spectrum


@dataclass(frozen=True, slots=True)
class Layer:
    """What factorising one convolution would cost.

    Attributes:
        name: Of the layer.
        module: It.
        read: Positions that it reads, times the channels there are.
        written: Positions that it writes.
    """

    name: str
    module: nn.Conv2d
    read: int
    written: int

    @property
    def dense(self) -> int:
        """Multiply-adds as it is."""
        return self.written * self.module.weight.numel()

    def macs(self, kind: str, ranks: Sequence[int]) -> int:
        """Multiply-adds of the factors."""
        wide, deep, high, across = self.module.weight.shape
        if kind == "cp":
            (rank,) = ranks
            between = high * rank * (self.read // self.module.stride[0]) + across * rank * self.written
            return self.read * deep * rank + between + self.written * rank * wide
        out, into = ranks
        return self.read * deep * into + self.written * (high * across * into * out + out * wide)

    def ranks(self, kind: str, share: float, values: tuple[Tensor, Tensor]) -> tuple[int, ...]:
        """The ranks that keep a share: of the energy of each unfolding, or for CP of the dense multiply-adds."""
        if kind == "cp":
            return (max(1, min(largest_ranks(self.module, kind)[0], int(share * self.dense / self.macs(kind, (1,))))),)
        kept = [(v.square().cumsum(0) / v.square().sum() < share).sum().item() + 1 for v in values]
        return tuple(int(min(rank, most)) for rank, most in zip(kept, largest_ranks(self.module, kind), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank(Strategy):
    """Robust pretraining, factors for the layers where they save anything, robust fine-tuning.

    One share for all layers, the largest that meets the budget: of energy (Tucker), or of multiply-adds (CP).

    Attributes:
        kind: "tucker" or "cp".
        pretrain: Share of the epochs before; 0 factorises the network as it was drawn.
        ranks: By layer, in place of a search: the shape of another run.
    """

    name: ClassVar[str] = "lowrank"
    direction: ClassVar[Direction] = "prune"
    given_shape: ClassVar[bool] = True
    kind: str = "tucker"
    pretrain: float = 0.5
    ranks: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def run(self, session: Session) -> None:
        """Pretrain, factorise, fine-tune."""
        if self.pretrain:
            session.train("pretrain", share=self.pretrain)
            session.settle()
        found: dict[str, list[int]] = session.decide("ranks", lambda: self._choose(session))
        session.editor.factorise(Factorise(name, self.kind, tuple(ranks)) for name, ranks in found.items())
        macs, params = session.cost_model.predict(session.editor.widths)
        session.record({"phase": "prune", "event": "prune", "ranks": found, "macs": macs, "params": params})
        session.recalibrate()
        session.finetune(share=1 - self.pretrain)

    def _choose(self, session: Session) -> dict[str, list[int]]:
        if self.ranks:
            return {name: list(ranks) for name, ranks in self.ranks.items()}
        layers = layers_of(session.model, session.goal.data.image_shape, self.kind)
        values = {layer.name: spectrum(layer.module) for layer in layers}
        limit = session.limits[0] - (session.cost().macs - sum(layer.dense for layer in layers))

        def at(share: float) -> tuple[float, dict[str, list[int]]]:
            total, found = 0.0, {}
            for layer in layers:
                ranks = layer.ranks(self.kind, share, values[layer.name])
                macs = layer.macs(self.kind, ranks)
                if macs < layer.dense:
                    found[layer.name] = list(ranks)
                total += min(macs, layer.dense)
            return total, found

        low, high = 0.0, 1.0
        if at(low)[0] > limit:
            raise BudgetError("factors of rank 1 are over the budget")
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if at(middle)[0] <= limit else (low, middle)
        return at(low)[1]


def layers_of(model: nn.Module, image_shape: Sequence[int], kind: str) -> list[Layer]:
    """Every convolution that can be factorised so, with what it reads and writes for one image."""
    found: list[Layer] = []
    handles = []

    def note(name: str, module: nn.Conv2d, args: Any, output: Tensor) -> None:
        found.append(Layer(name, module, args[0][0, 0].numel(), output[0, 0].numel()))

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not complaint(module, kind, (1,) * (2 if kind == "tucker" else 1)):
            handles.append(module.register_forward_hook(lambda m, a, o, name=name: note(name, m, a, o)))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found
