"""GRAPE: grow from a narrow seed, where the attack presses and the channels are in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from robustcompress.errors import Problems
from robustcompress.session import Session
from robustcompress.shapes import Widths, capped, fill_budget, floor_widths, rounded, steps_of, uniform_widths
from robustcompress.strategies.base import Direction, Strategy, check_choices, check_numbers, prune_to
from robustcompress.strategies.utilization import Utilization, measure_utilization
from robustcompress.structure.initial import INITS
from robustcompress.structure.magnitudes import group_norms

Order = Literal["guided", "sequential", "uniform", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grape(Strategy):
    """Growth of block-internal width under a MAC budget (after GRAPE, arXiv 2606.14865, 2026).

    A reconstruction: only the abstract could be read. From it: robust optimisation is stabilised in the parameters
    exposed so far, hidden dimensions are released progressively, an "adversarial spectral utilization score" says
    where, and a sequential variant ends in the reference's own shape. Reconstructed: everything else; the score
    (see `utilization.py`), the seed, the events, their budget, the initialisation (pairs that cancel), the average of
    weights as the stabiliser, and the growth-free tail.

    The seed takes the residual streams at the width that uniform scaling would give them under the budget, and hidden
    groups (attention heads are one) at `seed` of that. Optimizer moments and averaged weights are carried across every
    event.

    Attributes:
        order: Where width goes: "guided" by the score; "uniform" (all groups towards the uniform network);
            "sequential" (the same end, front to back); "random" (shares drawn at random).
        seed: Share of the final uniform width that hidden groups start with.
        events: How many times the network grows.
        grow_until: Share of the epochs by which the last event has come; the rest is the growth-free tail.
        cap: No hidden group grows beyond this multiple of the reference's width.
        beta: Exponent of the attack's pressure in the score; 0 leaves utilization alone.
        init: How new channels begin (see `structure.initial`).
        score_batches: Attacked training batches that the score looks at.
    """

    name: ClassVar[str] = "grape"
    direction: ClassVar[Direction] = "grow"
    order: Order = "guided"
    seed: float = 0.5
    events: int = 4
    grow_until: float = 0.6
    cap: float = 1.5
    beta: float = 1.0
    init: str = "pair"
    score_batches: int = 2

    def __post_init__(self) -> None:
        problems = Problems("grape cannot run")
        check_choices(problems, self, {"order": get_args(Order), "init": INITS})
        check_numbers(
            problems,
            self,
            {
                "seed": (0.05, 1.0),
                "grow_until": (0.05, 0.95),
                "cap": (0.1, 8.0),
                "beta": (0.0, 8.0),
                "events": (1, 1000),
                "score_batches": (1, 1000),
            },
        )
        problems.raise_if_any()

    def largest(self, widths: Widths) -> Widths:
        """Every hidden group at its cap (a bound: residual streams stay within the reference)."""
        return capped(widths, self.cap)

    def run(self, session: Session) -> None:
        """Seed, then train and grow by turns, then train on without growth."""
        reference = session.editor.widths
        target = uniform_widths(session)
        layout = session.editor.layout
        heard = [group for group in session.editor.editable if not layout.heard_in_training_only(group.name)]
        hidden = [group.name for group in heard if group.kind in ("hidden", "heads")] or [g.name for g in heard]
        caps = {name: max(target[name], int(self.cap * reference[name])) for name in hidden}
        self._plant(session, target, hidden)
        share = self.grow_until / self.events
        for event in range(1, self.events + 1):
            session.train(f"grow {event}/{self.events}", share=share, schedule="warm-up" if event == 1 else "constant")
            self._grow(session, event, target, caps)
        session.train("tail", share=1 - self.grow_until, schedule="cosine", select=True)

    def _plant(self, session: Session, target: Widths, hidden: list[str]) -> None:
        editor, round_to = session.editor, session.goal.round_to
        floor, steps = floor_widths(editor, round_to), steps_of(editor, round_to)
        seed = dict(target)
        for name in hidden:
            seed[name] = rounded(self.seed * target[name], steps[name], floor[name], target[name])
        prune_to(session, seed, group_norms(session.editor))

    def _grow(self, session: Session, event: int, target: Widths, caps: Mapping[str, int]) -> None:
        now = session.editor.widths
        record: dict[str, object] = {"phase": f"grow {event}/{self.events}", "event": "grow"}
        if self.order in ("uniform", "sequential"):
            wanted = self._scheduled(now, event, target, steps_of(session.editor, session.goal.round_to), list(caps))
        else:
            shares, detail = session.decide(f"shares of event {event}", lambda: self._shares(session, list(caps)))
            wanted = self._wanted(session, event, now, shares, caps)
            record["scores"] = detail
        for name, width in wanted.items():
            if width > now[name]:
                session.editor.grow(name, width - now[name], init=self.init)
        macs, params = session.cost_model.predict(session.editor.widths)
        session.record(record | {"widths": session.editor.widths, "macs": macs, "params": params})

    def _scheduled(self, now: Widths, event: int, target: Widths, steps: Widths, hidden: list[str]) -> Widths:
        """Widths on the way to the uniform network: all groups a step, or a stretch of groups all the way."""
        if self.order == "sequential":
            stretch = range((event - 1) * len(hidden) // self.events, event * len(hidden) // self.events)
            return {hidden[i]: target[hidden[i]] for i in stretch}
        left = self.events - event + 1
        if left == 1:
            return {name: target[name] for name in hidden}
        return {name: now[name] + (target[name] - now[name]) // left // steps[name] * steps[name] for name in hidden}

    def _wanted(
        self, session: Session, event: int, now: Widths, shares: Mapping[str, float], caps: Mapping[str, int]
    ) -> Widths:
        left = self.events - event + 1
        if left > 1:
            return _spend(session, now, shares, caps, left=left)
        return session.choose("widths to end with", lambda: now | _spend(session, now, shares, caps, left=left))

    def _shares(self, session: Session, hidden: list[str]) -> tuple[dict[str, float], dict[str, object]]:
        if self.order == "random":
            draws = torch.rand(len(hidden), generator=session.generator).tolist()
            return dict(zip(hidden, draws, strict=True)), {}
        found: dict[str, Utilization] = measure_utilization(session, hidden, batches=self.score_batches)
        shares = {name: found[name].score(self.beta) for name in hidden}
        return shares, {name: found[name].to_json() for name in hidden}


def _spend(session: Session, now: Widths, shares: Mapping[str, float], caps: Mapping[str, int], *, left: int) -> Widths:
    """Turn shares of the free budget into widths.

    Each group may spend its share of `1 / left` of what is still free, in MACs, parameters or (where limited) latency,
    whichever is scarcest; the last event spends all. What rounding leaves goes to the groups with the largest unspent
    remainder.
    """
    steps, total = steps_of(session.editor, session.goal.round_to), sum(shares.values())
    macs, params = session.cost_model.predict(now)
    free = [(session.limits[0] - macs) / left, (session.limits[1] - params) / left]
    if session.latency is not None:
        free.append((session.latency.limit - session.latency.predict(now)) / left)
    wanted, remainder = dict(now), {}
    for name, share in shares.items():
        wider = session.cost_model.predict({**now, name: now[name] + 1})
        price = [wider[0] - macs, wider[1] - params]
        if session.latency is not None:
            price.append(session.latency.predict({**now, name: now[name] + 1}) - session.latency.predict(now))
        channels = min(f * share / total / max(p, 1e-9) for f, p in zip(free, price, strict=True) if f != float("inf"))
        whole = int(max(0.0, channels) // steps[name] * steps[name])
        wanted[name] = min(now[name] + whole, max(now[name], caps[name] // steps[name] * steps[name]))
        remainder[name] = channels - whole
    while not session.fits(wanted):  # the price of a channel rises with what reads it; step back where least is lost
        name = min((n for n in shares if wanted[n] > now[n]), key=lambda n: shares[n], default="")
        if not name:
            break  # a measurement found what is there already over the limit
        wanted[name] = max(now[name], wanted[name] - steps[name])
    if left == 1:
        order = sorted(shares, key=lambda n: (-remainder[n], n))
        filled = fill_budget(session, wanted, {n: max(caps[n], wanted[n]) for n in shares}, order=order)
        return {name: filled[name] for name in shares}
    return {name: wanted[name] for name in shares}
