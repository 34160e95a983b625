"""S2AP: learn scores that keep the robust loss low also for the masks of scores nearby."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from robustcompress.errors import InputError, Problems
from robustcompress.session import Session
from robustcompress.shapes import Widths
from robustcompress.strategies.base import Direction, Granularity, Strategy, check_numbers
from robustcompress.strategies.scores import ScoreBased
from robustcompress.structure import StructuralEditor
from robustcompress.structure.masks import ScoreMasks
from robustcompress.train import Ascent, ScoreAscent, calibrate
from robustcompress.train.score_ascent import SMALLEST

__all__ = ["S2AP", "ScoreAscent", "calibrate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class S2AP(Strategy):
    """S2AP (Piras et al. 2025, arXiv 2510.18381) over a strategy that learns scores, such as HYDRA.

    From what could be read of the paper (reviews and summaries of it): scores s are learnt for
    min_s max_z L(w * M(s + z)) with ||z|| <= gamma ||s|| for each layer; this begins after 5 epochs of ordinary search
    (of 20: HYDRA's number); fine-tuning is under adversarial weight perturbation.

    Reconstructed: the order of a step, after the code of that perturbation: attack the images at s; one normalised step
    up in the scores; forward and backward there, on the same images; the exact scores back; the optimizer's step.

    Ours: channel groups as well as single weights, and the choice of gamma. The masks are all that the
    network sees of the scores, so a z that flips no bit does nothing, and how many bits one gamma flips depends on the
    network. So gamma is bisected, at the first ascent of each epoch and along its own z, for the smallest that flips a
    wanted share of all mask bits (at least one swap of two units). Nothing is carried from epoch to epoch.

    Attributes:
        host: The strategy under it: its name, its JSON, or itself.
        gamma: Radius relative to the norm of each group's scores; None to choose it by `flips`; 0 switches it off.
        flips: Share of mask bits that z is to flip; 0.005 to 0.03 is sensible.
        warmup: Share of the search before it begins.
        finetune_awp: Radius of adversarial weight perturbation while fine-tuning; 0 leaves it to the recipe.
    """

    name: ClassVar[str] = "s2ap"
    direction: ClassVar[Direction] = "prune"
    host: Strategy | Mapping[str, Any] | str = "hydra"
    gamma: float | None = None
    flips: float = 0.01
    warmup: float = 0.25
    finetune_awp: float = 0.005

    def __post_init__(self) -> None:
        problems = Problems("s2ap cannot run")
        try:
            object.__setattr__(self, "host", _host(self.host))
        except InputError as error:
            problems.add(str(error))
        if isinstance(self.host, ScoreBased) and not self.host.climbs and self.gamma != 0:
            problems.add(f"host={self.host.name!r} learns no scores to climb in as it is set up; change it, or gamma=0")
        ranges = {"flips": (SMALLEST, 0.5), "warmup": (0.0, 1.0), "finetune_awp": (0.0, 1.0)}
        check_numbers(problems, self, ranges if self.gamma is None else {"gamma": (0.0, 1.0)} | ranges)
        problems.raise_if_any()

    def run(self, session: Session) -> None:
        """Run the host, its search under an ascent in the scores and its fine-tuning under one in the weights."""
        assert isinstance(self.host, ScoreBased)
        if self.gamma != 0 or self.finetune_awp:
            for objective in filter(None, (session.goal.objective, session.tuning)):
                objective.require_parts()
        if self.finetune_awp and session.goal.recipe.sam:
            raise InputError(
                f"finetune_awp={self.finetune_awp!r} and the recipe's sam={session.goal.recipe.sam!r} would each move "
                "the weights: give finetune_awp=0, or sam=0"
            )
        self.host.run_with(
            session,
            ascent=self._ascent if self.gamma != 0 else None,
            finetune_awp=self.finetune_awp or None,
        )

    @property
    def finetunes(self) -> bool:
        """As the host."""
        assert isinstance(self.host, Strategy)
        return self.host.finetunes

    @property
    def pretrains(self) -> bool:
        """As the host."""
        assert isinstance(self.host, Strategy)
        return self.host.pretrains

    def largest(self, widths: Widths) -> Widths:
        """The host's largest."""
        assert isinstance(self.host, Strategy)
        return self.host.largest(widths)

    @property
    def granularity(self) -> Granularity:
        """The host's."""
        assert isinstance(self.host, Strategy)
        return self.host.granularity

    def narrowest(self, editor: StructuralEditor, round_to: int) -> Widths:
        """The host's narrowest."""
        assert isinstance(self.host, Strategy)
        return self.host.narrowest(editor, round_to)

    def to_json(self) -> dict[str, Any]:
        """The options as plain JSON; the host's are in it with its name."""
        assert isinstance(self.host, Strategy)
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"name": self.name, **options, "host": self.host.to_json()}

    def _ascent(self, gates: ScoreMasks) -> Ascent:
        return ScoreAscent(gates, gamma=self.gamma, flips=self.flips, begins=self.warmup)


def _host(host: object) -> ScoreBased:
    """The strategy that a name, a strategy's JSON or a strategy stands for.

    Raises:
        InputError: It stands for none, or for one that learns no scores.
    """
    from robustcompress.strategies import STRATEGIES, make_strategy  # which in turn knows this file

    made = host
    if isinstance(host, Mapping):
        options = {str(key): value for key, value in host.items()}
        if "name" not in options:
            raise InputError(f"host={dict(host)!r} has no 'name'; give one, such as {{'name': 'hydra'}}")
        made = make_strategy(options.pop("name"), **options)
    elif isinstance(host, str):
        made = make_strategy(host)
    if not isinstance(made, ScoreBased):
        hosts = ", ".join(sorted(name for name, kind in STRATEGIES.items() if issubclass(kind, ScoreBased)))
        raise InputError(f"host={host!r} learns no scores; give one of: {hosts}")
    return made
