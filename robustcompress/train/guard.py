"""Training on single-step attacks, watched for catastrophic overfitting, and cured of it.

A network trained on one-step attacks can learn to withstand those alone: within an epoch its accuracy under PGD falls
to zero while the accuracy on its own attack rises (Wong et al., ICLR 2020; Andriushchenko & Flammarion, NeurIPS 2020).
It does not recover by itself, and nothing in the training's own figures tells.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robustcompress.data import Batches, Images, Stored
from robustcompress.distributed import ALONE, World
from robustcompress.robust.attacks import eval_mode, pgd
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.objectives import PGDAT
from robustcompress.robust.threat import ThreatModel
from robustcompress.train.midway import Midway

GAP = 0.2
"""A collapse is no smaller than this: by so much the single-step accuracy leads PGD's more than it ever did."""

STEPS = (2, 4, 8)
"""PGD steps that training goes on with after each collapse, of eps/2, eps/4 and eps/4.

Two steps of half the radius are the cheapest attack that is known to hold where one step does not (the "PGD-2" of
Andriushchenko & Flammarion, section 5); where they do not hold either, four and then eight are tried.
"""


class Guard:
    """Compares single-step and PGD-10 accuracy after every epoch; after a collapse, goes back and attacks harder.

    Both are measured on the same training images with the same noise every time, on the network as it is trained (an
    average would follow late), in eval mode: without a collapse, training is bit for bit what it is without a guard.
    After one, weights, optimizer and average are those of the epoch before; images and noise go on, so that the next
    epoch is another one. The attack stays the stronger one to the end of the run.

    Args:
        objective: One that says its `single_step`.
        threat: What the adversary may do.
        images: Training images to measure on.
        seed: Of the noise.
        device: Where the network is.
        batch_size: How many are attacked at once.
        say: Tells the person who waits.
        world: The processes that train; all look, and the first one's figures count.
    """

    def __init__(
        self,
        objective: Objective,
        threat: ThreatModel,
        images: Images,
        *,
        seed: int,
        device: torch.device,
        batch_size: int,
        say: Callable[[str], None] = lambda line: None,
        world: World = ALONE,
    ) -> None:
        self._world = world
        self._objective, self._threat, self._say = objective, threat, say
        self._images = Batches(images, batch_size, device=device, channels_last=False)
        self._generator, self._seed = torch.Generator(device), seed
        self._level = 0  # how often it has acted
        self._least, self._best = 1.0, 0.0  # of this phase: the smallest lead of the single step, the best PGD accuracy
        self._model: nn.Module | None = None
        self._snapshot: Snapshot | None = None

    @property
    def objective(self) -> Objective:
        """What to train on: of each epoch it is the objective itself, or the stronger attack that took its place."""
        return Guarded(self)

    @property
    def current(self) -> Objective:
        """What the next epoch is trained on."""
        return self._objective if self._level == 0 else stronger(self._objective, STEPS[self._level - 1], self._threat)

    def enter(
        self,
        model: nn.Module,
        others: Iterable[nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        begun: bool,
        midway: Midway | None = None,
    ) -> None:
        """Begin a phase, which may end in a collapse; what is there now is what its first epoch goes back to.

        Args:
            model: The network that is trained.
            others: What follows it, such as an average.
            optimizer: What trains it.
            begun: Whether some steps of the phase are done already, and their state was loaded.
            midway: Holds what to go back to while an epoch lasts.
        """
        self._model, self._snapshot = model, Snapshot([model, *others], optimizer)
        if midway is not None:  # within an epoch, what there is now is not what to go back to
            midway.hold("guard", self._snapshot)
        if not begun:
            single, robust = self._measure()
            self._least, self._best = single - robust, robust

    def look(self, record: dict[str, Any]) -> None:
        """Judge the epoch that has just ended, into its record; undo it where it was a collapse."""
        assert self._snapshot is not None
        single, robust = self._measure()
        record |= {"guard_single": single, "guard_pgd": robust, "guard_images": len(self._images.images)}
        record["attack_steps"] = 1 if self._level == 0 else STEPS[self._level - 1]
        if not collapsed(single, robust, least=self._least, best=self._best):
            self._least, self._best = min(self._least, single - robust), max(self._best, robust)
            self._snapshot.take()
            return
        record["collapsed"] = True
        told = (
            f"catastrophic overfitting in phase {record['phase']!r}, epoch {record['epoch']}: accuracy under one step "
            f"is {100 * single:.0f} %, under PGD-10 {100 * robust:.0f} % ({len(self._images.images)} training images)"
        )
        if self._level == len(STEPS):
            self._say(f"warning: {told}, with {STEPS[-1]} steps in training; going on all the same")
            self._snapshot.take()
            return
        self._level += 1
        self._snapshot.restore()
        self._say(f"{told}; back to the epoch before, and on with PGD-{STEPS[self._level - 1]}")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; at the end of an epoch the weights to go back to are those of the run itself."""
        return {"level": self._level, "least": self._least, "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self._level, self._least, self._best = int(state["level"]), float(state["least"]), float(state["best"])

    def _measure(self) -> tuple[float, float]:
        """Accuracy under one step of the objective's length, and under PGD-10, in [0, 1]."""
        model, scale = self._model, self._objective.single_step
        assert model is not None and scale is not None
        self._generator.manual_seed(self._seed)
        single = robust = 0
        with eval_mode(model):
            for x, y in self._images:
                for steps, step_size in ((1, scale * self._threat.eps), (10, None)):
                    x_adv = pgd(model, x, y, self._threat, steps=steps, step_size=step_size, generator=self._generator)
                    with torch.no_grad():
                        right = int((model(x_adv).argmax(1) == y).sum())
                    single, robust = (single + right, robust) if steps == 1 else (single, robust + right)
        single, robust = self._world.broadcast([single, robust])
        count = len(self._images.images)
        return single / count, robust / count


def collapsed(single: float, robust: float, *, least: float, best: float) -> bool:
    """Whether accuracies after an epoch are those of catastrophic overfitting.

    They are where the single step's lead over PGD is larger by `GAP` than it was, and PGD's accuracy is nothing beside
    the other (less than a 20th), or has fallen to less than a third of its best and a quarter of the other. The lead of
    ordinary training grows too where a radius is large; PGD's accuracy then rises as well, or stays.

    Args:
        single: Accuracy under one step.
        robust: Accuracy under PGD.
        least: The smallest lead so far.
        best: The best accuracy under PGD so far.
    """
    if single - robust < least + GAP:
        return False
    return robust < single / 20 or (robust < single / 4 and robust < best / 3)


def stronger(objective: Objective, steps: int, threat: ThreatModel) -> PGDAT:
    """Adversarial training with a few steps, in all else like a single-step objective.

    Args:
        objective: Whose options about labels and modes to keep.
        steps: Of PGD; of half the radius where they are two, else of a quarter.
        threat: What the adversary may do.
    """
    names = ("label_smoothing", "class_weights", "attack_mode")
    kept = {name: getattr(objective, name) for name in names if hasattr(objective, name)}
    return PGDAT(steps=steps, step_size=threat.eps / min(steps, 4), **kept)


class Guarded(Objective):
    """The objective that a guard wants, whichever it is at the time.

    Args:
        guard: Says which.
    """

    name: ClassVar[str] = "guarded"

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def begin(self) -> Objective:
        """See `Objective.begin`."""
        return self._guard.current.begin()

    @property
    def remembers(self) -> bool:
        """See `Objective.remembers`; of the objective that the guard has now."""
        return self._guard.current.remembers

    def loss(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> ObjectiveStep:
        """See `Objective.loss`; the training loop, which asks `begin`, does not come here."""
        return self.begin().loss(model, x, y, threat, generator=generator)

    def require_parts(self, who: str = "AWP, SAM, S2AP and diagnose") -> None:
        """See `Objective.require_parts`."""
        self._guard.current.require_parts(who)

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`; of the objective that the guard has now."""
        return self._guard.current.to_json()


class Snapshot:
    """Weights, buffers and optimizer state of one moment.

    Args:
        modules: Networks; taken at once, and again by `take`.
        optimizer: Holds the parameters of the first.
    """

    def __init__(self, modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self._tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self._optimizer = optimizer
        self.take()

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, flat: tensors and numbers."""
        state = {f"tensor.{number}": value for number, value in enumerate(self._values)}
        for place, entries in self._state["state"].items():
            state |= {f"optimizer.{place}.{key}": value for key, value in entries.items() if value is not None}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, in place of what was remembered."""
        places = [(tensor, state[f"tensor.{number}"]) for number, tensor in enumerate(self._tensors)]
        self._values = [value.to(tensor.device) for tensor, value in places]
        entries: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            kind, place, *name = key.split(".", 2)
            if kind == "optimizer":
                entries.setdefault(int(place), {})[name[0]] = value
        self._state["state"] = entries

    def take(self) -> None:
        """Remember them as they are now."""
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self._state = copy.deepcopy(self._optimizer.state_dict())

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back in place, bit for bit; may be called again."""
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        self._optimizer.load_state_dict(copy.deepcopy(self._state))


def make_guard(
    objective: Objective,
    threat: ThreatModel,
    images: Images | Stored,
    *,
    count: int,
    seed: int,
    device: torch.device,
    batch_size: int,
    say: Callable[[str], None],
    world: World = ALONE,
) -> Guard | None:
    """A guard for an objective that needs one; None for others, and where `count` is 0.

    Args:
        objective: Any.
        threat: What the adversary may do.
        images: The training images.
        count: How many of them to measure on; no more than a 32nd of them, but 64 at least, so that it stays cheap.
        seed: Chooses the images, and seeds the noise.
        device: Where the network is.
        batch_size: How many are attacked at once.
        say: Tells the person who waits.
        world: The processes that train.
    """
    if objective.single_step is None or count == 0:
        return None
    wanted = min(count, max(64, len(images) // 32))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:wanted]
    return Guard(
        objective,
        threat,
        images.subset(chosen),
        seed=seed,
        device=device,
        batch_size=batch_size,
        say=say,
        world=world,
    )
