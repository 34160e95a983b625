"""RC-NAS: a reinforced search for the compact network within a robust teacher, over depth, width and block types."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch

from robustcompress.budget import Budget
from robustcompress.errors import Problems, nearest
from robustcompress.search.domain import BLOCKS, Config, Task
from robustcompress.search.dressed import Dressed
from robustcompress.search.evaluate import Evaluator, Outcome, Recovery, local_lipschitz
from robustcompress.search.hunt import Hunt
from robustcompress.search.policy import Policy
from robustcompress.search.rule import Rule
from robustcompress.search.searchers import SEARCHERS, make_searcher
from robustcompress.search.space import Architecture, Space
from robustcompress.search.stages import discover, first_to_leave
from robustcompress.session import Session
from robustcompress.shapes import Widths, capped
from robustcompress.strategies.base import Direction, Strategy, check_choices, check_numbers, prune_by
from robustcompress.structure import StructuralEditor
from robustcompress.structure.magnitudes import group_norms
from robustcompress.teacher import appoint

Feasibility = Literal["project", "penalty"]

PROPOSE = tuple(name for name in SEARCHERS if name != "rule")  # which is always looked at

PROBE = 64
"""Images by which blocks are ranked and the Lipschitz constant is estimated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RCNAS(Strategy):
    """Search over depth, width and block types in a robust teacher (after RC-NAS, Wang et al., KDD 2024, 2406.06792).

    The paper's released code holds no search, so this is an implementation of what is known. From the paper and its
    figures: the task (attack, data, teacher, budget), one token a stage, a bidirectional LSTM over the stages, a policy
    of several heads with one action a stage, vanilla policy gradient, two levels of training. Reconstructed: the rest;
    among it that budgets are met by projection, the ladder of evaluation, and the reward,
    `(robust / teacher's robust)^alpha * (clean / teacher's clean)^(1 - alpha)`.

    The reference is trained robustly, unless it is robust already: the teacher. Candidates inherit its weights,
    re-estimate batch-norm statistics, recover for a few steps of FGSM-RS towards the outputs of the teacher, and are
    attacked by PGD-10 on the validation split, which no test image is in. The best few recover longer and are looked at
    afresh, and the best of those is cut out of the teacher and fine-tuned.

    A configuration is a shape: how many blocks of each stage stay (those that change their input least leave first),
    and how the stages' widths relate. It is scaled to the budget, so that all candidates cost the same (where it would
    be below the budget at full width, blocks come back). Looked at first: uniform widths and, where there are several
    stages, the published scaling rule (see `Scaling`).

    Attributes:
        searcher: Who proposes: "reinforce", "evolution", "random", or "optuna" (extra `[search]`). The paper's is
            "reinforce"; on our surrogate it is not shown to beat "random" within 100 evaluations, unless it begins with
            a trained policy, and "evolution" and "optuna" are.
        evaluations: Networks that are looked at.
        finalists: How many of them are looked at again.
        teacher: Share of the epochs that trains the reference, the rest fine-tunes; skipped for a pretrained model.
        recovery_steps: Steps that each candidate recovers for, finalists four times as many; they come on top of the
            epochs.
        batch: Candidates proposed before the rewards of any of them are known: many suit many workers, few learning.
            How often the policy of "reinforce" is updated does not depend on it (every five rewards).
        workers: Candidates evaluated at a time, in threads. It changes no result, unless the network itself draws in
            its forward, as dropout does.
        depth: Whether blocks may leave.
        blocks: Types among which each stage chooses for its blocks: "plain", as in the reference; "se", with residual
            squeeze-and-excitation at the end of their residual branch; "rir", with a small residual branch there (see
            `StructuralEditor.insert`). What parts cost is in the budget. The robust block type of the paper is not
            public; these two are after the blocks of RobustResNet.
        recovery: "distill" towards the teacher, or "fgsm-rs" on the labels.
        recovery_lr: Factor on the recipe's learning rate while recovering.
        feasibility: "project" scales every candidate to the budget; "penalty" takes multipliers as they are and
            punishes what is over the budget, more and more (as N2N learning does, Ashok et al. 2018); finalists are
            projected.
        alpha: What robust accuracy counts in the reward, against clean accuracy.
        cap: No group becomes wider than this multiple of the reference's width.
        policy: File of a policy to begin with, such as a meta-trained one; for "reinforce" alone.
        finetune_lr: Factor on the recipe's learning rate while fine-tuning.
    """

    name: ClassVar[str] = "rcnas"
    direction: ClassVar[Direction] = "search"
    searcher: str = "reinforce"
    evaluations: int = 50
    finalists: int = 3
    teacher: float = 0.5
    recovery_steps: int = 20
    batch: int = 5
    workers: int = 1
    depth: bool = True
    blocks: tuple[str, ...] = ("plain",)
    recovery: Recovery = "distill"
    recovery_lr: float = 0.5
    feasibility: Feasibility = "project"
    alpha: float = 0.7
    cap: float = 1.0
    policy: str | Path | None = None
    finetune_lr: float = 1.0

    def __post_init__(self) -> None:
        problems = Problems("rcnas cannot run")
        choices = {"searcher": PROPOSE, "recovery": get_args(Recovery), "feasibility": get_args(Feasibility)}
        check_choices(problems, self, choices)
        check_numbers(
            problems,
            self,
            {
                "evaluations": (1, 100_000),
                "finalists": (1, 1000),
                "teacher": (0.0, 0.99),
                "recovery_steps": (0, 1_000_000),
                "batch": (1, 1000),
                "workers": (1, 1000),
                "recovery_lr": (1e-9, 10.0),
                "alpha": (0.0, 1.0),
                "cap": (1.0, 8.0),
                "finetune_lr": (1e-9, 10.0),
            },
        )
        if not isinstance(self.depth, bool):
            problems.add(f"depth={self.depth!r}: must be true or false")
        if not isinstance(self.blocks, list | tuple) or not self.blocks:
            problems.add(f"blocks={self.blocks!r}: give a list of types, such as ['plain', 'se']")
        else:
            for kind in self.blocks:
                if kind not in BLOCKS:
                    problems.add(f"blocks names {kind!r}, which does not exist{nearest(str(kind), BLOCKS)}")
            if "plain" not in self.blocks or len(set(map(str, self.blocks))) < len(self.blocks):
                problems.add(f"blocks={self.blocks!r}: name each type once, and 'plain' among them")
            object.__setattr__(self, "blocks", tuple(self.blocks))
        if isinstance(self.policy, Path):
            object.__setattr__(self, "policy", str(self.policy))  # plain for JSON
        if self.policy is not None and not isinstance(self.policy, str):
            problems.add(f"policy={self.policy!r}: must be the path of a file that Policy.save wrote")
        elif self.policy is not None and self.searcher != "reinforce":
            problems.add(f"policy={self.policy!r}: only searcher='reinforce' begins with one")
        elif self.policy is not None:
            problems.attempt(partial(Policy.load, self.policy))
        if self.searcher == "optuna" and find_spec("optuna") is None:
            problems.add("searcher='optuna' needs Optuna: pip install 'robustcompress[search]', or take 'evolution'")
        problems.raise_if_any()

    @property
    def finetunes(self) -> bool:
        """Always: the winner."""
        return True

    @property
    def pretrains(self) -> bool:
        """Where epochs are spent on the teacher."""
        return self.teacher > 0

    def largest(self, widths: Widths) -> Widths:
        """Every group at its cap."""
        return capped(widths, self.cap)

    def run(self, session: Session) -> None:
        """Train the teacher, search, cut the winner out of it, fine-tune.

        Raises:
            InputError: There are no validation images to search by; or types of blocks are to be chosen in a network
                that has no place for parts, or under a limit on latency.
        """
        policy = None if self.policy is None else Policy.load(self.policy)  # now: files move
        space = self.lay_out(session)
        winner = self._search(session, space, policy) if space.domain.coordinates else ()
        self._take(session, space, winner)
        share = 1.0 if session.goal.pretrained else 1 - self.teacher
        session.finetune(share=share, lr_scale=self.finetune_lr)

    def lay_out(self, session: Session) -> Space:
        """Train the teacher, unless it is robust already, and say what there is to find within it.

        Args:
            session: The network under compression; it is the teacher afterwards.

        Raises:
            InputError: There are no validation images to search by; or types of blocks are to be chosen in a network
                that has no place for parts, or under a limit on latency.
        """
        problems = Problems("rcnas cannot run")
        if not len(session.goal.data.val) or not session.goal.recipe.val_images:
            problems.add("it compares candidates on the validation split, which is empty: give more images")
        for objection in self.objections(session.editor, session.goal.budget):
            problems.add(objection)
        problems.raise_if_any()
        if self.teacher and not session.goal.pretrained:
            session.train("teacher", share=self.teacher)
            session.settle()
        appoint(session)
        task, images = self._task(session)
        order = first_to_leave(session, images) if self.depth else []
        network = Dressed(session, self._kinds) if self._kinds else session
        sites = session.editor.insertable if self._kinds else ()
        return Space(network, discover(network, order, sites), order, task, cap=self.cap, kinds=self._kinds)

    def evaluator(self, session: Session) -> Evaluator:
        """What looks at candidates, of the teacher in a session."""
        return Evaluator(
            session,
            recovery=self.recovery,
            lr=self.recovery_lr * session.goal.recipe.lr,
            workers=self.workers,
            kinds=self._kinds,
        )

    @property
    def _kinds(self) -> tuple[str, ...]:
        """The kinds of parts that may be inserted."""
        return tuple(kind for kind in self.blocks if kind != "plain")

    def objections(self, editor: StructuralEditor, budget: Budget) -> tuple[str, ...]:
        """Types of blocks need a place for parts, and a budget that does not limit latency."""
        said = []
        if self._kinds and budget.limits_latency:
            said.append("the time of inserted parts is not predicted; limit multiply-adds or parameters instead")
        if self._kinds and not editor.insertable:
            said.append("the network has no residual branch over images into which a part could be inserted")
        return tuple(f"blocks={self.blocks!r}: {reason}, or leave blocks out" for reason in said)

    def _task(self, session: Session) -> tuple[Task, torch.Tensor]:
        """What is known before the search, and the images that it is known from."""
        goal = session.goal
        device = next(session.model.parameters()).device
        probe = goal.data.val.first(min(PROBE, goal.recipe.val_images)).to(device)
        images = probe.as_float()

        def measure() -> list[float]:
            generator = torch.Generator(device).manual_seed(goal.seed)
            lipschitz = local_lipschitz(session.model, images, probe.labels, goal.threat, generator)
            return [*session.validate(), lipschitz]

        clean, robust, lipschitz = session.decide("the teacher", measure)
        classes = goal.data.num_classes
        session.say(f"rcnas: the teacher has {100 * clean:.1f} % clean and {100 * robust:.1f} % PGD-10 accuracy")
        if robust <= 1 / classes:
            session.say(
                "warning: the teacher is no more robust than guessing, so candidates can hardly be told apart; give "
                "one that was trained adversarially (pretrained=True), or more epochs"
            )
        macs, params = session.cost_model.predict(session.editor.widths)
        budget = min(1.0, session.limits[0] / macs, session.limits[1] / params)
        if session.latency is not None:
            budget = min(budget, session.latency.limit / session.latency.predict(session.editor.widths))
        return Task(budget, macs, classes, "pgd", goal.threat.eps, clean, robust, lipschitz), images

    def _search(self, session: Session, space: Space, policy: Policy | None) -> Config:
        options = {"policy": policy} if policy is not None else {}
        domain = space.domain
        hunt = Hunt(
            session,
            space,
            make_searcher(self.searcher, domain, session.goal.seed, **options),
            lambda: self.evaluator(session),
            lambda outcome, architecture, progress: self.reward(space, outcome, architecture, domain.task, progress),
            evaluations=self.evaluations,
            batch=self.batch,
            steps=self.recovery_steps,
            first=[domain.whole, *([Rule(domain, 0).ask()] if space.staged else [])],
            literal=self.feasibility == "penalty",
        )
        hunt.look()
        return hunt.settle(min(self.finalists, self.evaluations))

    def reward(self, space: Space, outcome: Outcome, architecture: Architecture, task: Task, progress: float) -> float:
        """What an outcome is worth: accuracies over the teacher's, and less over the budget.

        Args:
            space: Knows the budget.
            outcome: Of the candidate.
            architecture: What it is.
            task: Knows the teacher.
            progress: How far the search has come, in [0, 1]: penalties grow with it.
        """
        floor = 0.01  # a teacher that is not robust at all
        robust, clean = outcome.robust / max(floor, task.robust), outcome.clean / max(floor, task.clean)
        worth = float(robust**self.alpha * clean ** (1 - self.alpha))
        if space.fits(architecture):
            return worth
        lenience = (1 - progress) ** 4  # of the penalty; projected, every network fits
        return lenience - 1 + lenience * worth

    def _take(self, session: Session, space: Space, winner: Config) -> None:
        """Cut the winner out of the teacher."""
        norms = group_norms(session.editor)
        found = space.project(winner)
        gone, inserted = found.bypassed, found.inserted
        for block in gone:
            session.editor.bypass(block)
        if inserted:
            session.editor.insert_all(inserted)
            norms = group_norms(session.editor) | norms
        widths = session.choose("widths of the winner", lambda: space.widths(winner, gone))
        typed = {"inserted": [list(pick) for pick in inserted]} if inserted else {}
        session.record(
            {"phase": "finalists", "event": "winner", "config": list(winner), "bypassed": list(gone), **typed}
        )
        shares = (f"{stage.name} {space.share(winner, number)}" for number, stage in enumerate(space.stages))
        session.say(f"rcnas: the winner: {'; '.join(shares)}; blocks that leave: {', '.join(gone) or 'none'}")
        prune_by(session, lambda: (widths, norms))
        for name, width in widths.items():
            if width > (now := session.editor.widths[name]):
                session.editor.grow(name, width - now)
        session.recalibrate()

    def identity(self) -> dict[str, Any]:
        """Without how many threads are used; with what the policy's file holds."""
        options = {name: value for name, value in self.to_json().items() if name != "workers"}
        if not self._kinds:
            del options["blocks"]  # checkpoints from before there were types go on
        if self.policy is not None:
            options["policy"] = hashlib.sha256(Path(self.policy).read_bytes()).hexdigest()
        return options
