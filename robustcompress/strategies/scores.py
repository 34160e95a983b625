"""The search that HYDRA, HARP and AWT share: scores learnt under the masks they stand for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustcompress.diagnostics import look_at_search
from robustcompress.errors import Problems
from robustcompress.robust.objective import Objective
from robustcompress.session import Session
from robustcompress.strategies.pruning import Pruning, cut
from robustcompress.strategies.units import Channels, Choice, Scores, Weights
from robustcompress.structure.masks import MaskRule, ScoreMasks, TopK
from robustcompress.train import Ascent

MakeAscent = Callable[[ScoreMasks], Ascent | None]
"""Makes the ascent of a search from its masks: their scores are what it may move, their rule is what it may flip."""

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Scales and shifts of all batch and layer norms."""
    return [p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreBased(Pruning):
    """A strategy that learns one score a unit, by the gradient that a mask of the scores lets through.

    Abstract. Whoever derives from it can be the host of `S2AP`.

    Attributes:
        search: Share of the epochs in the search; at 0 this is exactly `magnitude`.
        score_lr: Adam's peak learning rate for the scores: of channels, which start in [0, 2.45], and of weights as a
            share of five times the root mean square of their layer's scores.
        diagnose: Record at each epoch of the search how sharp the robust loss is around the mask, and how accurate the
            mask is (`diagnostics.look_at_search`). It changes nothing else.
    """

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"search": (0.0, 0.99), "score_lr": (1e-9, 10.0)}
    splits_objective: ClassVar[bool] = False
    """Whether the search needs the parts of the objective: its attack, and its loss on what that found."""
    pretrain: float = 0.45
    search: float = 0.10
    score_lr: float = 0.02
    diagnose: bool = False

    @property
    def search_share(self) -> float:
        """Share of the epochs that the search takes from the fine-tuning."""
        return self.search

    @property
    def searches(self) -> bool:
        """Whether there is anything to learn or to find out; else it is `magnitude`."""
        return self.search > 0

    @property
    def climbs(self) -> bool:
        """Whether scores are learnt by their gradient, so that `S2AP` has something to climb in."""
        return True

    def check(self, problems: Problems) -> None:
        """The phases must leave some epochs."""
        if not isinstance(self.diagnose, bool):
            problems.add(f"diagnose={self.diagnose!r}: must be True or False")
        if not problems.items and self.pretrain + self.search >= 1:
            problems.add(f"pretrain={self.pretrain!r} and search={self.search!r} leave no epochs to fine-tune")

    def run(self, session: Session) -> None:
        """As `run_with`, with nothing added."""
        self.run_with(session)

    def run_with(
        self, session: Session, *, ascent: MakeAscent | None = None, finetune_awp: float | None = None
    ) -> None:
        """Pretrain, search, cut, fine-tune.

        Args:
            session: What to compress.
            ascent: Gives the ascent under which scores are learnt; None for none.
            finetune_awp: Radius of adversarial weight perturbation in the fine-tuning; None for the recipe's.
        """
        if (self.splits_objective or self.diagnose) and self.searches:
            session.goal.objective.require_parts(self.name if self.splits_objective else "diagnose")
        spent, units = self.begin(session), self.units(session)
        found = self.learn(session, units, ascent) if self.searches else None
        share = 1 - spent - self.search_share
        with cut(session, units, lambda: found or Choice(units.magnitudes())):
            session.finetune(share=share, lr_scale=self.finetune_lr, awp=finetune_awp)

    @abstractmethod
    def learn(self, session: Session, units: Channels | Weights, ascent: MakeAscent | None) -> Choice:
        """Search, for the share of the epochs that is set aside for it; returns what is kept."""


def search(
    strategy: ScoreBased,
    session: Session,
    units: Channels | Weights,
    *,
    first: Callable[[], Scores],
    rule: MaskRule | None = None,
    also: Sequence[dict[str, Any]] = (),
    ascent: MakeAscent | None = None,
    objective: Objective | None = None,
    watch: Callable[[ScoreMasks, dict[str, Any]], None] | None = None,
) -> Scores:
    """Learn scores while the weights stay and batch-norm affines and statistics move.

    Args:
        strategy: Says for how long, and how fast.
        session: The network under compression.
        units: What the scores are of.
        first: The scores to begin with; asked once in all of a run, however often it is resumed.
        rule: What the scores mean; by default the largest are kept, as many as `units` counts.
        also: Further Adam parameter groups, moved too.
        ascent: As in `ScoreBased.run_with`.
        objective: What is minimised; the goal's by default.
        watch: Called with the masks and each epoch's record, to which it may add.

    Returns:
        The scores that were found.
    """
    start = units.remember("scores to begin with", first)
    rule = rule or TopK(units.counts)
    with units.gates(start, rule) as gates:
        session.recalibrate()
        paces = session.decide("paces of scores", lambda: {name: units.pace(s) for name, s in start.items()})
        groups: list[dict[str, Any]] = [{"params": [s], "lr_scale": paces[name]} for name, s in gates.scores.items()]
        groups += [{"params": norm_parameters(session.model), "lr_scale": 0.02}, *also]
        trail = MaskTrail(session, gates)

        def on_epoch(record: dict[str, Any]) -> None:
            record |= trail.step()
            if strategy.diagnose:
                record |= look_at_search(session, gates)
            if watch is not None:
                watch(gates, record)

        session.train_only(
            "search",
            [group for group in groups if group["params"]],
            share=strategy.search,
            lr=strategy.score_lr,
            ascent=ascent(gates) if ascent is not None else None,
            objective=objective,
            on_epoch=on_epoch,
        )
        trail.close()
        learnt = {name: values.detach().clone() for name, values in gates.scores.items()}
        then, now = gates.kept({name: s.to(learnt[name].device) for name, s in start.items()}), gates.kept(learnt)
    units.forget("scores to begin with")
    swapped, total = sum(int((then[n] != now[n]).sum()) for n in now), sum(bits.numel() for bits in now.values())
    session.record({"phase": "search", "event": "scores", "changed": swapped / total})
    session.say(f"search changed {swapped} of {total} decisions")
    return learnt


class MaskTrail:
    """How far masks move from one epoch to the next: normalised Hamming distances.

    Args:
        session: Its checkpoints hold the masks of the last epoch.
        gates: Whose masks.
    """

    def __init__(self, session: Session, gates: ScoreMasks) -> None:
        self._session = session
        self._gates = gates
        self._last = gates.kept()
        session.keep("masks", self)

    def step(self) -> dict[str, float]:
        """The share of all mask bits that differ from those of the last call (or of the start)."""
        now = self._gates.kept()
        differ = sum(int((now[name] != self._last[name]).sum()) for name in now)
        self._last = now
        return {"hamming": differ / sum(bits.numel() for bits in now.values())}

    def close(self) -> None:
        """Leave the session's checkpoints."""
        self._session.forget("masks")

    def state_dict(self) -> dict[str, Tensor]:
        """The masks of the last epoch."""
        return dict(self._last)

    def load_state_dict(self, state: Mapping[str, Tensor], /) -> None:
        """Take them back."""
        device = next(iter(self._last.values())).device
        self._last = {name: state[name].to(device, torch.bool) for name in self._last}
