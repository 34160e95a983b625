"""HARP: learn how much of each layer is kept, together with what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustcompress.errors import Problems
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.session import Session
from robustcompress.shapes import fill_budget, floor_widths, rounded, steps_of
from robustcompress.strategies.scores import MakeAscent, ScoreBased, search
from robustcompress.strategies.units import Channels, Choice, Counts, Weights, shares
from robustcompress.structure.magnitudes import reader_norms
from robustcompress.structure.masks import ScoreMasks, TopK, straight_through

EPOCHS = 20
"""Length of the published search, over which the weight of the cost grows."""
NEAR = 0.01
"""A cost is at its target within this share of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Harp(ScoreBased):
    """HARP (Zhao and Wressnegger, ICLR 2023), on channel groups or on single weights.

    From the released code: a keep rate a layer, `k = k_min + (1 - k_min) sigmoid(r)` with `k_min = floor * k_target`,
    learnt with the scores; masks by top-k of the scores at those rates; straight through, the gradient of a rate is the
    sum of its layer's mask gradients; `cost_weight * (epoch + 1) * max(cost / target - 1, 0)` is added to the robust
    loss, and the weight stays once the target is met.

    Ours: for channels, one rate a coupled group, and the cost of the real network of those widths (multiply-adds,
    parameters, latency; the released chain formula counts another network where there are residual streams); scores
    start from the norm of what reads a channel, over outputs and kernel (the released code reshapes without
    transposing, and so mixes channels); rates start where the uniform network meets the budget, because a short search
    cannot come down from a dense one, and are held there from both sides, `abs(cost / target - 1)`, so that the masks
    that are searched are as large as those that are cut; the weight grows with each epoch, of 20 however long the
    search is, that ends more than 1 % away; in the end one shift of all rates meets the budget exactly. `allocation` is
    learnt: it is no option here.

    Attributes:
        rate_lr: Adam's peak learning rate for the rates r.
        cost_weight: The published gamma: there 0.01 for small images, 0.1 for large ones; searches here are shorter.
        floor: No layer may fall below this share of the target's keep rate.
    """

    name: ClassVar[str] = "harp"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **ScoreBased.ranges,
        "rate_lr": (0.0, 10.0),
        "cost_weight": (0.0, 1000.0),
        "floor": (0.0, 0.99),
    }
    rate_lr: float = 0.1
    cost_weight: float = 0.1
    floor: float = 0.1

    splits_objective: ClassVar[bool] = True

    def check(self, problems: Problems) -> None:
        """How much of each layer is kept is what this learns."""
        ScoreBased.check(self, problems)
        if self.allocation != "uniform":
            problems.add(f"allocation={self.allocation!r}: harp learns how much of each layer is kept; leave it out")

    def learn(self, session: Session, units: Channels | Weights, ascent: MakeAscent | None) -> Choice:
        """Scores and rates under the goal's objective and the cost; see `ScoreBased.learn`."""
        rates = Rates(session, units, floor=self.floor)
        price = Price(session.goal.objective, rates, weight=self.cost_weight, steps=session.steps(self.search))
        session.keep("price", price)

        def watch(_: ScoreMasks, record: dict[str, Any]) -> None:
            record["rates"] = {name: round(k, 6) for name, k in rates.values().items()}
            record["cost_over_target"] = float(rates.cost().detach())
            record["cost_weight"] = price.weight

        learnt = search(
            self,
            session,
            units,
            first=lambda: units.first_scores(
                reader_norms(session.editor, only=units.widths) if isinstance(units, Channels) else units.magnitudes()
            ),
            rule=LearnedTopK(rates),
            also=[{"params": rates.parameters(), "lr_scale": self.rate_lr / self.score_lr}],
            ascent=ascent,
            objective=PricedObjective(price),
            watch=watch,
        )
        session.forget("price")
        return Choice(learnt, rates.counts_in_budget)


class Rates:
    """A keep rate for each group or layer, in (k_min, 1).

    Args:
        session: Knows what the network of any widths costs.
        units: Of which the rates say how many are kept.
        floor: k_min as a share of the rate that meets the budget.
    """

    def __init__(self, session: Session, units: Channels | Weights, *, floor: float) -> None:
        self._session = session
        self._units = units
        self._sizes: Mapping[str, int] = units.widths if isinstance(units, Channels) else units.sizes
        device = next(session.model.parameters()).device
        target = self._target()
        self._least = floor * target
        start = (min(target, 0.99) - self._least) / (1 - self._least)
        self._raw = {n: nn.Parameter(torch.tensor(math.log(start / (1 - start)), device=device)) for n in self._sizes}

    def parameters(self) -> list[nn.Parameter]:
        """The raw rates r, scalars."""
        return list(self._raw.values())

    def keep(self, shift: float = 0.0) -> dict[str, Tensor]:
        """The keep rates, scalars with gradients; `shift` is added to every r."""
        return {n: self._least + (1 - self._least) * torch.sigmoid(r + shift) for n, r in self._raw.items()}

    def values(self, shift: float = 0.0) -> dict[str, float]:
        """The keep rates as numbers."""
        return {name: float(k.detach()) for name, k in self.keep(shift).items()}

    def counts(self) -> Counts:
        """How many units the rates keep now, at least one of each."""
        return {n: min(self._sizes[n], max(1, round(k * self._sizes[n]))) for n, k in self.values().items()}

    def cost(self) -> Tensor:
        """What the network of these rates costs, over what is allowed: the largest of the budget's ratios."""
        over: Tensor = self._over({name: k * self._sizes[name] for name, k in self.keep().items()})
        return over

    def counts_in_budget(self) -> Counts:
        """Counts that meet the budget: one shift of all r, and then what rounding left."""
        units, low, high = self._units, -30.0, 30.0
        if isinstance(units, Weights):
            for _ in range(60):
                middle = (low + high) / 2
                kept = sum(k * self._sizes[n] for n, k in self.values(middle).items())
                low, high = (middle, high) if kept <= units.total else (low, middle)
            return shares({n: k * self._sizes[n] for n, k in self.values(low).items()}, units.total)
        session, round_to = self._session, self._session.goal.round_to
        least, steps = floor_widths(session.editor, round_to), steps_of(session.editor, round_to)

        def widths_at(shift: float) -> Counts:
            rates = self.values(shift)
            return {n: rounded(rates[n] * size, steps[n], least[n], size) for n, size in self._sizes.items()}

        if session.fits(widths_at(high)):
            return widths_at(high)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if session.fits(widths_at(middle)) else (low, middle)
        # Below k_min only where the budget cannot be met otherwise.
        start = widths_at(low) if session.fits(widths_at(low)) else units.counts({})
        wanted = self.values()
        return fill_budget(session, start, self._sizes, sorted(wanted, key=lambda n: (-wanted[n], n)))

    def _over(self, kept: Mapping[str, Any]) -> Any:
        if isinstance(self._units, Weights):
            return sum(kept.values()) / self._units.total
        costs = self._session.cost_model.relaxed(kept)
        ratios = [cost / limit for cost, limit in zip(costs, self._session.limits, strict=True)]
        latency = self._session.latency
        if latency is not None:
            ratios.append(latency.predict(kept) / latency.limit)
        return max(ratios)

    def _target(self) -> float:
        """The one rate for all at which the budget is met."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            within = float(self._over({name: middle * size for name, size in self._sizes.items()})) <= 1
            low, high = (middle, high) if within else (low, middle)
        return max(low, 1e-4)


class LearnedTopK:
    """The rule that keeps the largest scores, as many as rates say; a rate's gradient is the sum of its mask's.

    Args:
        rates: How much is kept.
    """

    def __init__(self, rates: Rates) -> None:
        self._rates = rates
        self._top = TopK(lambda scores: rates.counts(), watch=rates.parameters())

    def __call__(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gate values with straight-through gradients to scores and rates."""
        bits, rates = self._top.bits(scores), self._rates.keep()
        return {n: straight_through(s, bits[n]) + (rates[n] - rates[n].detach()) for n, s in scores.items()}


class Price:
    """The cost's weight over the course of a search, which checkpoints hold.

    Args:
        objective: What the cost is added to.
        rates: What costs.
        weight: The published gamma.
        steps: Steps of the search.
    """

    def __init__(self, objective: Objective, rates: Rates, *, weight: float, steps: int) -> None:
        self.objective = objective
        self.rates = rates
        self._weight = weight
        self._steps = steps
        self.done = self.raised = 0

    def step(self) -> None:
        """Count a step; where one of the published epochs ends away from the target, the weight grows."""
        before = self._epoch()
        self.done += 1
        if self._epoch() > before and abs(float(self.rates.cost().detach()) - 1) > NEAR:
            self.raised += self._epoch() - before

    @property
    def weight(self) -> float:
        """The weight now."""
        return self._weight * (1 + self.raised)

    def __call__(self) -> Tensor:
        """What is added to the loss."""
        return self.weight * (self.rates.cost() - 1).abs()

    def state_dict(self) -> dict[str, int]:
        """Steps done, and how often the weight grew."""
        return {"done": self.done, "raised": self.raised}

    def load_state_dict(self, state: Mapping[str, int], /) -> None:
        """Take them back."""
        self.done, self.raised = state["done"], state["raised"]

    def _epoch(self) -> int:
        return self.done * EPOCHS // self._steps


class PricedObjective(Objective):
    """An objective and what its network costs.

    Args:
        price: The objective, and the cost.
        inner: The objective as it is at the moment; the price's own by default.
    """

    name: ClassVar[str] = "priced"

    def __init__(self, price: Price, inner: Objective | None = None) -> None:
        self._price = price
        self._inner = inner or price.objective

    def at(self, progress: float) -> Objective:
        """See `Objective.at`."""
        return PricedObjective(self._price, self._price.objective.at(progress))

    def attack(self, model: nn.Module, x: Tensor, y: Tensor, *args: Any, **settings: Any) -> Tensor:
        """As the objective; comes once a step."""
        self._price.step()
        return self._inner.attack(model, x, y, *args, **settings)

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """The objective's, and the price."""
        step = self._inner.loss_on(model, x, x_adv, y)
        return replace(step, loss=step.loss + self._price())

    def to_json(self) -> dict[str, Any]:
        """The objective's."""
        return self._price.objective.to_json()
