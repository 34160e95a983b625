"""A limit on latency: predicted while widths are chosen, measured once they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from robustcompress.budget import NOISE
from robustcompress.latency.model import LatencyModel

ROUNDS = 10
"""How many networks are measured at most."""

NEAR = 0.99
"""From this share of the limit on, a network that keeps it is as near as it need be."""

PROBE = 0.01
"""How much further each look beyond the first network that is too slow goes."""

FILLS = 5
"""How many more are measured between two of them."""

AIM = 1.003
"""A correction aims this much below the limit, so that noise does not decide."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One measurement.

    Attributes:
        ms: Median milliseconds of the network.
        reference_ms: Those of the reference, measured in turns with it.
    """

    ms: float
    reference_ms: float

    @property
    def ratio(self) -> float:
        """The network's time over the reference's."""
        return self.ms / self.reference_ms


@dataclass(frozen=True, slots=True)
class Choice:
    """Widths, and what they were measured at.

    Attributes:
        widths: As chosen.
        ms: Measured milliseconds, on the scale of the predictor's reference.
        factor: Measured over predicted.
        rounds: How many networks were measured.
    """

    widths: dict[str, int]
    ms: float
    factor: float
    rounds: int


Widths = tuple[tuple[str, int], ...]
"""By group, sorted."""


class LatencyLimit:
    """What a network may take, and what tells.

    Args:
        model: The predictor.
        limit: Milliseconds, on the scale of the predictor's reference.
        measure: Measures the network of these widths against the reference.
        without: Tells which blocks have left the network since the reference; none by default.
        source: What the milliseconds are, for people: "measured", or "predicted" from another device's table.

    Attributes:
        model: The predictor.
        limit: Milliseconds.
        factor: Measured over predicted, where it was looked at last.
        measured: Milliseconds of the widths chosen last; None before.
    """

    def __init__(
        self,
        model: LatencyModel,
        limit: float,
        measure: Callable[[Mapping[str, int]], Timing],
        *,
        without: Callable[[], tuple[str, ...]] = tuple,
        source: str = "measured",
    ) -> None:
        self.model, self.limit = model, limit
        self.factor = 1.0
        self.measured: float | None = None
        self._measure = measure
        self._without = without
        self._source = source
        self._settled: Choice | None = None
        self._settled_without: tuple[str, ...] = ()

    def predict(self, widths: Mapping[str, Any], *, without: Iterable[str] = ()) -> Any:
        """Milliseconds, corrected by what was measured last; for numbers or, with gradients, scalar tensors.

        Args:
            widths: By group.
            without: Blocks to leave out, beside those that have left.
        """
        return self.factor * self.model.predict(widths, without=(*self._without(), *without))

    def _uncorrected(self, widths: Mapping[str, Any]) -> Any:
        return self.model.predict(widths, without=self._without())

    @property
    def missed(self) -> bool:
        """Whether the widths chosen last are over the limit by more than noise."""
        return self.measured is not None and self.measured > self.limit * (1 + NOISE)

    def settle(
        self,
        name: str,
        pick: Callable[[], dict[str, int]],
        *,
        decide: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]],
        say: Callable[[str], None],
        allows: Callable[[Mapping[str, int]], bool] = lambda widths: True,
    ) -> dict[str, int]:
        """Choose widths once in a run, and go on from there: they count as measured, and as within the limit.

        Args:
            name: What they are for.
            pick: As for `choose`.
            decide: `Session.decide`.
            say: Told what came of it.
            allows: As for `choose`.
        """
        choice = Choice(**decide(f"{name}, measured", lambda: asdict(self.choose(pick, allows))))
        self.measured, self._settled, self._settled_without = choice.ms, choice, self._without()
        self.factor = min(choice.factor, self.limit / self._uncorrected(choice.widths))
        say(
            f"{name}: {choice.ms:.3g} ms {self._source}, at most {self.limit:.3g} ms asked for "
            f"({choice.rounds} networks {self._source}, {choice.factor:.3f} of what was predicted)"
        )
        return choice.widths

    def choose(
        self, pick: Callable[[], dict[str, int]], allows: Callable[[Mapping[str, int]], bool] = lambda widths: True
    ) -> Choice:
        """Have widths chosen until the network that they make keeps the limit, and comes as near as channels permit.

        Args:
            pick: Chooses the largest widths that `predict` allows; asked again after every correction.
            allows: Whether all other limits are kept.

        Returns:
            Of all networks measured the slowest within the limit; the fastest where none is.
        """
        tried: dict[Widths, Choice] = {}
        before, over, under, probes = self.factor, 0.0, math.inf, 0
        for _ in range(4 * ROUNDS):
            widths = pick()
            same = self._settled is not None and widths == self._settled.widths
            if not tried and self._settled is not None and same and self._settled_without == self._without():
                return replace(self._settled, rounds=0)  # this very network was settled on before
            key = tuple(sorted(widths.items()))
            if key not in tried:
                if len(tried) == ROUNDS:
                    break
                tried[key] = self._timed(widths, len(tried) + 1)
            now = tried[key]
            if NEAR * self.limit <= now.ms <= self.limit:
                break
            # The factor is bracketed: where time is a staircase of widths, following the last step alone would swing.
            if now.ms > self.limit:
                over = max(over, self.factor)
            else:
                under = min(under, self.factor)
            wanted = now.factor * AIM
            if not over < wanted < under:
                if under == math.inf:
                    break  # nothing narrower is to be had
                if over == 0:  # by its own measure nothing wider fits; the next wider network has another
                    probes += 1
                    if probes > ROUNDS:
                        break
                    self.factor = min(self.factor, wanted) * (1 - PROBE * probes)
                    continue
                if under / over > 1 + 1e-3:
                    wanted = math.sqrt(over * under)
                else:  # the next step is too slow; one further on may be faster again, with channels that fill blocks
                    probes += 1
                    wanted = over * (1 - PROBE * probes)
            self.factor = wanted
        self.factor = before
        self._fill(tried, allows)
        best = self._confirmed(list(tried.values()))
        return Choice(best.widths, best.ms, best.factor, len(tried))

    def _timed(self, widths: dict[str, int], rounds: int) -> Choice:
        ms = self._measure(widths).ratio * self.model.reference_ms
        return Choice(widths, ms, ms / self._uncorrected(widths), rounds)

    def _fill(self, tried: dict[Widths, Choice], allows: Callable[[Mapping[str, int]], bool]) -> None:
        """Where no widths that were picked come near the limit from below, look between two networks.

        Time is a staircase of widths, and those that are picked climb many steps at once: all groups together. Of the
        fastest network beyond the limit as many groups are taken, in the model's order, as leave the slowest within it
        there.
        """
        within = [choice for choice in tried.values() if choice.ms <= self.limit]
        beyond = [choice for choice in tried.values() if choice.ms > self.limit]
        if not within or not beyond:
            return
        low, high = max(within, key=lambda choice: choice.ms), min(beyond, key=lambda choice: choice.ms)
        wider = [name for name, width in high.widths.items() if width > low.widths[name]]
        nearest, taken, left = low.ms, 0, len(wider)
        for _ in range(FILLS):
            if nearest >= NEAR * self.limit or left - taken < 2:
                return
            count = (taken + left) // 2
            widths = low.widths | {name: high.widths[name] for name in wider[:count]}
            if not allows(widths):
                left = count
                continue
            now = tried[tuple(sorted(widths.items()))] = self._timed(widths, len(tried) + 1)
            if now.ms <= self.limit:
                taken, nearest = count, max(nearest, now.ms)
            else:
                left = count

    def _confirmed(self, measured: list[Choice]) -> Choice:
        """The slowest within the limit that is so when it is measured again: of many, one is within it by luck."""
        fresh = list(measured)
        while within := [choice for choice in measured if choice.ms <= self.limit]:
            best = max(within, key=lambda choice: choice.ms)
            if best not in fresh:
                return best
            again = self._timed(best.widths, best.rounds)
            mean = replace(best, ms=(best.ms + again.ms) / 2, factor=(best.factor + again.factor) / 2)
            fresh.remove(best)
            measured[measured.index(best)] = mean
        return min(measured, key=lambda choice: choice.ms)
