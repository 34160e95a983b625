"""AWT: a sparse network at initialisation whose adversarial training follows that of the dense one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from robustcompress.errors import InputError, Problems
from robustcompress.robust.attacks import eval_mode
from robustcompress.session import Session
from robustcompress.strategies.base import check_choices
from robustcompress.strategies.saliency import prune_in_rounds
from robustcompress.strategies.scores import MakeAscent, ScoreBased, norm_parameters, search
from robustcompress.strategies.tickets import TangentDistance, compare_tickets, tell
from robustcompress.strategies.units import Channels, Choice, Scores, Weights
from robustcompress.structure.masks import ScoreMasks
from robustcompress.train import frozen, with_auxiliary

Estimator = Literal["kernel", "ntk-sap"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AWT(ScoreBased):
    """AWT (Shi et al., AISTATS 2022, arXiv 2202.06488): an adversarial winning ticket, found at initialisation.

    Found in its abstract: adversarial training is described by a tangent kernel; a sparse network exists at the
    initialisation whose adversarial training follows the dense one's; nothing is pretrained.

    Reconstructed, for the paper's body could not be read, from the theory and from Neural Tangent Transfer (Liu &
    Zenke, ICML 2020), its ancestor: the kernel is the mixed one, `J(x) J(x~)^T` between clean images and images that
    were attacked on the dense initial network; the mask minimises the distance to the dense network's outputs plus that
    to its kernel, in squared Frobenius norms; then the ticket is trained adversarially from the initialisation.

    Ours: both distances relative to the dense network's, so that one weight serves all networks; one output of random
    direction a step in place of all pairs of outputs; scores are learnt as in `Hydra` while all weights, batch-norm
    affines too, keep their initial values (the ancestor trains weights and cuts by magnitude); channels as well as
    weights; batch-norm statistics estimated before and after. The images are attacked by the objective of the run, with
    labels. For a pretrained model its weights are the initialisation.

    The estimator "ntk-sap" learns nothing: in `rounds` rounds it closes the units that matter least to the trace of
    that kernel (NTK-SAP, Wang et al., ICLR 2023, in its saliency and its rounds; the product of differences at clean
    and attacked images is ours, and so is that one initialisation serves all rounds). It takes none of the epochs.

    The gradient of the kernel's distance is that of the formula, which leaves two things out: a closed unit's own share
    of the kernel grows with the square of its gate, so it speaks for no unit to open; and a ReLU that changes sides
    makes the kernel jump. So the ticket found need not be nearer than the one it began with.

    The history's "tangent" event says how far the tickets of magnitude, of chance and the one found are from the dense
    network on held-out images. The search holds two sets of `samples` gradients, `2 * samples * parameters` floats, and
    a graph several times as large.

    Further options are those of `ScoreBased` and `Pruning`; `pretrain` stays 0.

    Attributes:
        estimator: "kernel" learns scores by the two distances; "ntk-sap" prunes in rounds.
        samples: Images in a kernel.
        weight: Of the kernel's distance beside that of the outputs; 0 for the outputs alone.
        rounds: Of "ntk-sap".
    """

    name: ClassVar[str] = "awt"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **ScoreBased.ranges,
        "samples": (1, 4096),
        "weight": (0.0, 1e6),
        "rounds": (1, 1000),
    }
    splits_objective: ClassVar[bool] = True
    pretrain: float = 0.0
    score_lr: float = 0.05
    estimator: Estimator = "kernel"
    samples: int = 8
    weight: float = 1.0
    rounds: int = 20

    def check(self, problems: Problems) -> None:
        """A ticket at the initialisation comes before any training."""
        ScoreBased.check(self, problems)
        if self.pretrain != 0:
            problems.add(
                f"pretrain={self.pretrain!r}: must be 0, since the ticket is found at the initialisation; "
                "for a ticket of trained weights use 'hydra', or give a trained model and pretrained=True"
            )
        check_choices(problems, self, {"estimator": get_args(Estimator)})
        if self.estimator == "ntk-sap" and self.diagnose is True:
            problems.add(
                "diagnose=True looks at the epochs of a search, and estimator='ntk-sap' has none: leave it out"
            )

    @property
    def searches(self) -> bool:
        """The rounds of "ntk-sap" are no epochs, so they come whatever `search` is."""
        return self.search > 0 or self.estimator == "ntk-sap"

    @property
    def climbs(self) -> bool:
        """Not in the rounds of "ntk-sap"."""
        return self.estimator == "kernel"

    @property
    def search_share(self) -> float:
        """None of the epochs for "ntk-sap"."""
        return self.search if self.estimator == "kernel" else 0.0

    def learn(self, session: Session, units: Channels | Weights, ascent: MakeAscent | None) -> Choice:
        """Scores by the distance to the dense network; see `ScoreBased.learn`.

        Raises:
            InputError: The initial network tells no image from another.
        """
        _check_start(session)
        if self.estimator == "kernel":
            found = self._learn(session, units, ascent)
        else:
            found = units.remember("scores", lambda: prune_in_rounds(session, units, rounds=self.rounds))
            units.forget("scores")
        compare = lambda: compare_tickets(session, units, found, samples=self.samples)  # noqa: E731
        tell(session, session.decide("tangent distances", compare))
        return Choice(found)

    def _learn(self, session: Session, units: Channels | Weights, ascent: MakeAscent | None) -> Scores:
        session.recalibrate()
        moving = {name: p for name, p in session.model.named_parameters() if p.requires_grad}
        dense = copy.deepcopy(session.model).requires_grad_(False)
        session.keep("dense network", dense)
        attack = with_auxiliary(session.goal.objective, session.editor)
        objective = TangentDistance(dense, attack, moving, samples=self.samples, weight=self.weight)

        def watch(gates: ScoreMasks, record: dict[str, Any]) -> None:
            del record["robust"]  # its images are clean ones
            record |= objective.read(session.world)

        # A ticket at the initialisation has all of its initial values: batch-norm affines rest too.
        with frozen(norm_parameters(session.model)):
            found = search(
                self,
                session,
                units,
                first=lambda: units.first_scores(units.magnitudes()),
                ascent=ascent,
                objective=objective,
                watch=watch,
            )
        session.forget("dense network")
        return found


def _check_start(session: Session) -> None:
    """Refuse a network whose logits are the same for all images: it has no outputs and no kernel to stay close to."""
    if session.replaying:
        return
    data = session.goal.data.train
    images = data.first(min(len(data), 16)).as_float().to(next(session.model.parameters()).device)
    with eval_mode(session.model), torch.no_grad():
        logits = session.model(images)
    if float((logits - logits[:1]).abs().max()) <= 1e-12 * (1 + float(logits.abs().max())):
        raise InputError(
            "awt: the initial network gives all images the same logits (is its classifier all zeros?): initialise it, "
            "or pretrain it and pass pretrained=True"
        )
