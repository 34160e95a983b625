"""What a candidate is worth: it inherits the teacher's weights, recovers for a few steps, and is attacked."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustcompress.data import Batches
from robustcompress.distributed import Parts
from robustcompress.robust.attacks import eval_mode, pgd
from robustcompress.robust.objectives import FGSMRS
from robustcompress.robust.probe import accuracies
from robustcompress.robust.threat import ThreatModel
from robustcompress.search.dressed import Dressed
from robustcompress.search.recovery import distilled
from robustcompress.search.space import Architecture
from robustcompress.session import Session
from robustcompress.structure.gates import top_channels
from robustcompress.structure.groups import inside
from robustcompress.structure.magnitudes import group_norms
from robustcompress.train import (
    TrainingError,
    augmentation,
    computes_in_bf16,
    estimate_statistics,
    make_optimizer,
    safe_memory_format,
    set_memory_format,
    train,
    with_auxiliary,
)

Recovery = Literal["distill", "fgsm-rs"]


@dataclass(frozen=True, slots=True)
class Job:
    """One evaluation.

    Attributes:
        architecture: Of the candidate.
        steps: Of recovery.
        attack_steps: Of PGD on the held-out images.
        seed: Of its batches and attacks: another seed is a fresh look.
    """

    architecture: Architecture
    steps: int
    attack_steps: int
    seed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        clean: Accuracy on held-out training images, in [0, 1].
        robust: The same under PGD.
        macs: Multiply-adds of the candidate.
        params: Its parameters.
        steps: Of recovery.
    """

    clean: float
    robust: float
    macs: float
    params: float
    steps: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


class Evaluator:
    """Evaluates candidates on copies of the session's network, which is the teacher.

    The held-out images are the validation split, which is of the training images.

    Args:
        session: The teacher, trained; it must not change while this is in use.
        recovery: "distill" towards the teacher, or "fgsm-rs" on the labels.
        lr: Peak learning rate of recovery.
        workers: Candidates evaluated at a time, each in a thread of its own.
        kinds: Of parts that candidates may have; a part begins alike in all of them.

    Attributes:
        recovery: As given.
    """

    def __init__(
        self, session: Session, *, recovery: Recovery, lr: float, workers: int = 1, kinds: Sequence[str] = ()
    ) -> None:
        goal = session.goal
        self.recovery = recovery
        self._session, self._lr, self._workers = session, lr, workers
        self._device = next(session.model.parameters()).device
        self._teacher = copy.deepcopy(session.model).eval().requires_grad_(False)
        objective = distilled(self._teacher, goal.threat) if recovery == "distill" else FGSMRS()
        self._objective = with_auxiliary(objective, session.editor)
        self._dressed = Dressed(session, kinds) if kinds else None
        # Which channels of a block are large is not for its parts to say, whose weights are drawn.
        known = group_norms(session.editor)
        self._norms = group_norms(self._dressed.editor) | known if self._dressed is not None else known
        self._train = goal.data.train.to(self._device)
        self._held_out = goal.data.val.first(goal.recipe.val_images).to(self._device)
        self._autocast = computes_in_bf16(goal.recipe.bf16, self._device)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Evaluate; what comes out does not depend on how many are evaluated at a time, or by how many processes.

        (It does where the network itself draws random numbers in its forward, as dropout does.)
        """
        world = self._session.world
        own = world.share(len(jobs))
        mine = dict(zip(own, self._evaluated([jobs[number] for number in own]), strict=True))
        found: dict[int, Outcome] = {}
        for told in world.gather({str(number): outcome.to_json() for number, outcome in mine.items()}):
            found |= {int(number): Outcome(**outcome) for number, outcome in told.items()}
        return [found[number] for number in range(len(jobs))]

    def _evaluated(self, jobs: Sequence[Job]) -> list[Outcome]:
        if self._workers == 1 or len(jobs) < 2:
            return [self.evaluate(job) for job in jobs]
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self.evaluate, jobs))

    def evaluate(self, job: Job) -> Outcome:
        """One candidate: inherit, estimate batch-norm statistics, recover, attack."""
        goal, network = self._session.goal, self._inherit(job.architecture)
        memory_format = safe_memory_format(network, self._device)
        set_memory_format(network, memory_format)
        batches = Batches(
            self._train,
            min(goal.recipe.batch_size, len(self._train)),
            device=self._device,
            augment=augmentation(goal.recipe, goal.data.name),
            generator=torch.Generator().manual_seed(job.seed),
            drop_last=True,
            channels_last=memory_format == torch.channels_last,
        )
        estimate_statistics(network, batches)
        generator = torch.Generator(self._device).manual_seed(job.seed)
        macs, params = self.cost(job.architecture)
        if job.steps:
            try:
                self._recover(network, batches, job.steps, generator)
            except TrainingError:  # a candidate that diverges is a bad one, and no reason to end the search
                return Outcome(0.0, 0.0, macs, params, job.steps)
        held_out = Batches(
            self._held_out,
            goal.recipe.batch_size,
            device=self._device,
            channels_last=memory_format == torch.channels_last,
        )
        clean, robust = accuracies(network, held_out, goal.threat, steps=job.attack_steps, generator=generator)
        return Outcome(clean, robust, macs, params, job.steps)

    def _recover(self, network: nn.Module, batches: Batches, steps: int, generator: torch.Generator) -> None:
        goal = self._session.goal
        train(
            network,
            batches,
            self._objective,
            goal.threat,
            goal.recipe,
            epochs=steps / len(batches),
            optimizer=make_optimizer(goal.recipe, [p for p in network.parameters() if p.requires_grad], lr=self._lr),
            lr=self._lr,
            schedule="one-cycle",
            generator=generator,
            autocast=self._autocast,
            parts=Parts(self._session.parts.total),  # all of them here: candidates are what processes share
        )

    def cost(self, architecture: Architecture) -> tuple[float, float]:
        """Multiply-adds and parameters of a candidate."""
        if self._dressed is None:
            return self._session.cost_model.predict(architecture.widths, without=architecture.bypassed)
        without = (*architecture.bypassed, *self._dressed.lacking(architecture.inserted))
        return self._dressed.costs.predict(architecture.widths, without=without)

    def _inherit(self, architecture: Architecture) -> nn.Module:
        """The teacher without some blocks and with some parts, and of the rest the channels of the largest norm."""
        dressed = self._dressed
        editor = (self._session if dressed is None else dressed).editor.fork()
        for block in architecture.bypassed:
            editor.bypass(block)
        for part in () if dressed is None else dressed.lacking(architecture.inserted):
            if not inside(part, architecture.bypassed):
                editor.bypass(part)
        for name, width in architecture.widths.items():
            if width < editor.widths[name]:
                editor.prune(name, top_channels(self._norms[name], width).tolist())
            elif width > editor.widths[name]:
                editor.grow(name, width - editor.widths[name])
        return editor.model


def local_lipschitz(
    model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, generator: torch.Generator | None = None
) -> float:
    """Mean of `|f(x') - f(x)|_1 / |x' - x|` over images, x' from PGD-10, the distance in the threat's own norm.

    The empirical local Lipschitz constant of Yang et al. (2020, "A closer look at accuracy vs. robustness").

    Args:
        model: Maps images to logits.
        x: Images `[N, C, H, W]`.
        y: Labels.
        threat: What the adversary may do.
        generator: The attack's randomness.
    """
    with eval_mode(model):
        x_adv = pgd(model, x, y, threat, steps=10, generator=generator)
        with torch.no_grad():
            moved = (model(x_adv) - model(x)).float().abs().sum(1)
    distance = (x_adv - x).flatten(1).norm(p=float("inf") if threat.norm == "linf" else 2, dim=1)
    return float((moved / distance.clamp_min(1e-12)).mean())
