"""The published scaling rule: no search, no score; the last stage is narrowed first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robustcompress.errors import Problems
from robustcompress.search.stages import find_stages
from robustcompress.session import Session
from robustcompress.shapes import Widths, capped, shaped_widths, uniform_widths
from robustcompress.strategies.base import Direction, Strategy, check_numbers
from robustcompress.strategies.scratch import plant


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling(Strategy):
    """Widths by the rule of robust residual networks, trained from scratch for all epochs; zero evaluations.

    Huang et al. (NeurIPS 2021) found that less capacity in the last stage helps adversarial robustness; RobustResNet
    (Huang et al. 2022, arXiv 2212.11005) gives the three stages of a wide residual network the widths
    W1 : W2 : W3 = 2 : 2.5 : 1, in multiples of 16, 32 and 64 channels, which are the widths of a wide residual network
    without widening. So, relative to a reference widened evenly, the last stage has 1 / 2.5 = 0.4 of the second's
    multiplier and 1 / 2 of the first's.

    Ours: the rule for any network. Stages are the resolutions at which convolutions write. All groups share one ratio
    of their reference width, and those of the last stage have `last` times that; 0.4 is the paper's distance to its
    widest stage, and the slighter difference between the first two is left out. The depths are the reference's. Where
    the ratio would exceed `cap`, what is left of the budget widens the last stage again. A network of one resolution
    has no last stage: it is scaled evenly.

    Attributes:
        last: Width multiplier of the last stage over that of the others; 1 is `uniform`.
        cap: No group becomes wider than this multiple of the reference's width.
    """

    name: ClassVar[str] = "scaling"
    direction: ClassVar[Direction] = "prune"
    last: float = 0.4
    cap: float = 1.0

    def __post_init__(self) -> None:
        problems = Problems("scaling cannot run")
        check_numbers(problems, self, {"last": (0.01, 1.0), "cap": (1.0, 8.0)})
        problems.raise_if_any()

    def largest(self, widths: Widths) -> Widths:
        """Every group at its cap."""
        return capped(widths, self.cap)

    def run(self, session: Session) -> None:
        """Scale, then train."""
        plant(session, self._widths(session))
        session.train("train", share=1.0, select=True)

    def _widths(self, session: Session) -> Widths:
        stages = find_stages(session)
        if len(stages) < 2:
            session.say("scaling: the network has one resolution and so no last stage; every group is scaled evenly")
            return uniform_widths(session)
        session.say(f"scaling: stages at {', '.join(stages)}; the last has {self.last:g} times the others' multiplier")
        last = set(list(stages.values())[-1])
        factors = {group.name: self.last if group.name in last else 1.0 for group in session.editor.editable}
        return session.choose("widths by the rule", lambda: shaped_widths(session, factors, cap=self.cap))
