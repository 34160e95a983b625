"""AutoAttack (Croce and Hein 2020) through pyautoattack; the only file that imports it.

The package is right about the attacks and careless about everything around them. What is guarded against
here:

* its check for dynamic defences ends with `sys.settrace(None)`: debuggers and coverage go blind;
* it seeds torch's global generators, on the CPU and on CUDA;
* FAB runs a full `backward()`: the weights' `.grad` fills up;
* it logs and warns through a global logger;
* it fixes nine target classes and a targeted DLR loss that needs four: with fewer it raises an IndexError;
* where a gradient is zero FAB divides zero by zero, and takes the NaN image for a success: so each attack's
  images are brought back into the ball here, and the model judges them again, before the next attack of the
  cascade runs.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.errors import Problems
from robustcompress.robust.threat import ThreatModel

_NORMS = {"linf": "Linf", "l2": "L2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoAttackConfig:
    """How much AutoAttack does. Any change to the defaults but the chunk size makes the suite "custom".

    Attributes:
        apgd_iterations: Iterations of each APGD run.
        fab_iterations: Iterations of each FAB run.
        square_queries: Queries of Square.
        target_classes: Most wrong classes that the targeted attacks try; never more than there are.
        chunk_size: Images attacked together, never more than the evaluation's `batch_size`. None means 64 (128 on a
            GPU), or 16 under a time limit. The random numbers depend on it.
    """

    apgd_iterations: int = 100
    fab_iterations: int = 100
    square_queries: int = 5000
    target_classes: int = 9
    chunk_size: int | None = None

    def passes(self, attack: str, num_classes: int) -> int:
        """Passes through the network that one image costs an attack which it withstands, roughly."""
        targets = min(self.target_classes, num_classes - 1)
        return {
            "apgd-t": 2 * self.apgd_iterations * targets,
            "fab-t": 2 * self.fab_iterations * targets,
            "square": self.square_queries,
        }.get(attack, 2 * self.apgd_iterations)

    def __post_init__(self) -> None:
        problems = Problems("this AutoAttack cannot run")
        for key, value in asdict(self).items():
            if value is None and key == "chunk_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.add(f"{key}={value!r}: give a whole number, at least 1")
        problems.raise_if_any()

    @property
    def is_standard(self) -> bool:
        """Whether the attacks are those of the published `standard` version."""
        return {**asdict(self), "chunk_size": None} == asdict(AutoAttackConfig())


@dataclass(frozen=True, slots=True)
class Suite:
    """Which attacks run for a number of classes.

    Attributes:
        attacks: pyautoattack's names, in the order of the cascade.
        targets: Wrong classes that each targeted attack tries.
        name: What the report calls it.
    """

    attacks: tuple[str, ...]
    targets: int
    name: str


def suite_for(num_classes: int, config: AutoAttackConfig | None = None) -> Suite:
    """Say what AutoAttack consists of for this many classes.

    * 10 and more: the published `standard`: APGD-CE, APGD-T (targeted DLR), FAB-T, Square; nine targets.
    * 4 to 9: the same, the targets being all the wrong classes.
    * 3: the targeted DLR loss is not defined (it divides by a difference with the 4th logit); APGD on the
      untargeted DLR loss takes its place.
    * 2: no DLR loss is defined; APGD-CE, FAB-T (with its one target it is the untargeted FAB), Square
      (margin loss).

    Args:
        num_classes: Number of logits, at least 2.
        config: What to change of the standard; then the name begins with "custom".
    """
    config = config or AutoAttackConfig()
    targets = min(config.target_classes, num_classes - 1)
    attacks: tuple[str, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")
    if num_classes == 3:
        attacks = ("apgd-ce", "apgd-dlr", "fab-t", "square")
    elif num_classes == 2:
        attacks = ("apgd-ce", "fab-t", "square")
    name = "standard"
    if not config.is_standard:
        changed = [
            f"{key}={value}"
            for key, value in asdict(config).items()
            if key != "chunk_size" and value != getattr(AutoAttackConfig(), key)
        ]
        name = f"custom ({', '.join(changed)})"
    if num_classes < 4:
        name += f" adapted to {num_classes} classes: {', '.join(attacks)}"
    elif num_classes < 10:
        name += f" with all {num_classes - 1} target classes" if targets == num_classes - 1 else ""
    return Suite(attacks, targets, name)


@dataclass(frozen=True, slots=True)
class AutoAttackOutcome:
    """What became of a batch.

    Attributes:
        x_adv: For each image the example that broke it, or the image itself: detached, in the ball and the bounds.
        correct: Whether the model is still right: bool [N].
        broken_by: How many images each attack was the first to break.
    """

    x_adv: Tensor
    correct: Tensor
    broken_by: dict[str, int]


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    num_classes: int,
    seed: int = 0,
    config: AutoAttackConfig | None = None,
) -> AutoAttackOutcome:
    """Run AutoAttack's cascade on one batch: each attack on the images that all before it left standing.

    Args:
        model: In eval mode, on the device of `x`. Its `.grad` and mode, the global generators, the trace
            function and the logger are as before afterwards.
        x: Images in [0, 1], float32 [N, C, H, W].
        y: Labels, int64 [N].
        threat: linf or l2 with bounds (0, 1), the only ones the package knows.
        num_classes: Number of logits.
        seed: Seed of each attack.
        config: What to change of the standard.

    Raises:
        InputError: The bounds are others, or the images are too small for Square under l2.
    """
    config = config or AutoAttackConfig()
    suite = suite_for(num_classes, config)
    check_autoattack(threat, x.shape[-2:]).raise_if_any()
    x = x.detach()
    best = x.clone()
    broken_by = dict.fromkeys(suite.attacks, 0)
    with torch.no_grad():
        standing = model(x).argmax(1) == y
    for name in suite.attacks:
        alive = standing.nonzero().flatten()
        if not len(alive):
            break
        found = attack_once(model, x[alive], y[alive], threat, name, num_classes=num_classes, seed=seed, config=config)
        with torch.no_grad():
            fooled = model(found).argmax(1) != y[alive]
        best[alive[fooled]] = found[fooled]
        standing[alive[fooled]] = False
        broken_by[name] = int(fooled.sum())
    return AutoAttackOutcome(best, standing, broken_by)


def attack_once(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    name: str,
    *,
    num_classes: int,
    seed: int = 0,
    config: AutoAttackConfig | None = None,
) -> Tensor:
    """Run one attack of the cascade on one batch.

    Args:
        model: As for `autoattack`.
        x: Images in [0, 1], float32 [N, C, H, W], at least one.
        y: Labels, int64 [N].
        threat: linf or l2 with bounds (0, 1).
        name: One of `suite_for(num_classes, config).attacks`.
        num_classes: Number of logits.
        seed: Seed of the attack.
        config: What to change of the standard.

    Returns:
        What it found, for whoever judges: detached, in the ball and the bounds, finite.
    """
    config = config or AutoAttackConfig()
    x = x.detach().contiguous()  # the package views images as rows
    with _undisturbed(model, x.device):
        adversary = _adversary(model, threat, suite_for(num_classes, config), config, seed, x.device)
        adversary.attacks_to_run = [name]
        found, _ = adversary.run_standard_evaluation(x, y, batch_size=len(x))
        with torch.no_grad():
            return threat.project(torch.where(found.isfinite(), found, x), x)


def check_autoattack(threat: ThreatModel, size: tuple[int, ...]) -> Problems:
    """Collect why AutoAttack cannot run under this threat on images of this height and width."""
    problems = Problems("AutoAttack cannot run")
    if threat.bounds != (0.0, 1.0):
        problems.add(f"bounds={threat.bounds}: it knows images in [0, 1] only")
    if threat.norm == "l2" and min(size) < 5:
        problems.add(f"images of {size[0]}x{size[1]}: its Square attack needs 5x5 at least under l2")
    return problems


def version() -> str:
    """Return the version of pyautoattack that is installed."""
    from importlib.metadata import version as installed

    return installed("pyautoattack")


def _adversary(
    model: nn.Module,
    threat: ThreatModel,
    suite: Suite,
    config: AutoAttackConfig,
    seed: int,
    device: torch.device,
) -> Any:
    from pyautoattack import AutoAttack

    def logits(images: Tensor) -> Tensor:
        # A copy: Square writes into what it is given.
        output: Tensor = model(images)
        return output.float().clone()

    adversary = AutoAttack(
        logits, norm=_NORMS[threat.norm], eps=threat.eps, seed=seed, version="standard", device=device
    )
    for apgd in (adversary.apgd, adversary.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = config.apgd_iterations
        apgd.n_iter_2 = max(int(0.22 * apgd.n_iter), 1)
        apgd.n_iter_min = max(int(0.06 * apgd.n_iter), 1)
        apgd.size_decr = max(int(0.03 * apgd.n_iter), 1)
    adversary.apgd_targeted.n_target_classes = suite.targets
    adversary.fab.n_target_classes = suite.targets
    adversary.fab.n_iter = config.fab_iterations
    adversary.square.n_queries = config.square_queries
    return adversary


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Keep what the package disturbs: trace function, global generators, logger, warnings, the weights'
    `.grad`.
    """
    trace = sys.gettrace()
    logger = logging.getLogger("auto-attack")
    disabled = logger.disabled
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.disabled = True
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
            logger.disabled = disabled
            sys.settrace(trace)
