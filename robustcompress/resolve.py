"""What compress() was asked for, checked: every complaint is heard before any work starts, and all at once."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.budget import Budget
from robustcompress.checkpoint import check_directory
from robustcompress.data import TEACHER, DataSplits, load_data
from robustcompress.distributed import current
from robustcompress.errors import InputError, Problems
from robustcompress.latency_table import LatencyTable, read_latency_table
from robustcompress.min_robust import WORKPLACE
from robustcompress.models import ModelSpec, build_model, check_image_size, identify
from robustcompress.result import check_target
from robustcompress.robust import ThreatModel, attack_by_name
from robustcompress.robust.attacks import AttackSpec
from robustcompress.robust.autoattack import check_autoattack
from robustcompress.robust.objectives import PGDAT, Objective, objective_from_name
from robustcompress.robust.sanity import check_images
from robustcompress.strategies import Strategy, make_strategy
from robustcompress.teacher import Teacher
from robustcompress.teacher_source import check_teaching, labeller_of, read_teacher
from robustcompress.train import Recipe, resolve_device

SMALL_DATA = 10_000
"""Below so many training images the default is a short run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A call of compress() in which everything is of the right kind.

    Attributes:
        model: A copy of the reference, float32, on the device, without hooks.
        spec: What builds the reference again; None when that is not known.
        strategy: How to compress.
        data: What to train and test on.
        budget: What the result may cost.
        threat: What it must withstand.
        objective: The loss.
        epochs: Passes over the training images; None for the default.
        recipe: Training settings.
        round_to: Multiple of which widths are; None for the default.
        attacks: What the report measures.
        test_images: How many test images are attacked; None for all.
        seed: Seeds everything.
        device: Where to train.
        out: Where to save; None for nowhere.
        pretrained: Whether the reference is robust already.
        checkpoint: Where the run is recorded while it lasts; None for nowhere.
        checkpoint_every_s: Least seconds between two checkpoints within a phase.
        deadline: Seconds after which to stop; None for never.
        latency_table: Times of another device; None where this machine's own count.
        finetune: The loss of the fine-tuning after a cut; None for the objective.
        teacher: Who teaches; None for nobody, or for the run's own reference.
        labeller: Who labels extra images, where a saved result is to.
    """

    model: nn.Module
    spec: ModelSpec | None
    strategy: Strategy
    data: DataSplits
    budget: Budget
    threat: ThreatModel
    objective: Objective
    epochs: float | None
    recipe: Recipe
    round_to: int | None
    attacks: tuple[AttackSpec, ...]
    test_images: int | None
    seed: int
    device: torch.device
    out: Path | None
    pretrained: bool
    checkpoint: Path | None
    checkpoint_every_s: float
    deadline: float | None
    latency_table: LatencyTable | None = None
    finetune: Objective | None = None
    teacher: Teacher | None = None
    labeller: Teacher | None = None

    @property
    def companions(self) -> dict[str, Any]:
        """What a run depends on beside its reference, strategy and settings, as plain JSON; empty for most."""
        extra, found = self.data.extra, {}
        if self.finetune is not None:
            found["finetune"] = self.finetune.to_json()
        if self.teacher is not None:
            found["teacher"] = dict(self.teacher.identity)
        if extra is not None:
            by = extra.labelled_by if self.labeller is None else dict(self.labeller.identity)
            found["extra"] = {"sha256": extra.sha256, "ratio": extra.ratio, "labels": by}
        return found


def epochs_for(data: DataSplits) -> int:
    """The default number of passes over the training images."""
    return 10 if len(data.train) < SMALL_DATA else 30


def resolve(
    *,
    model: Any,
    strategy: Any,
    data: Any,
    budget: Any,
    threat: Any,
    objective: Any,
    epochs: Any,
    recipe: Any,
    round_to: Any,
    attacks: Any,
    test_images: Any,
    seed: Any,
    device: Any,
    out: Any,
    pretrained: Any = False,
    checkpoint: Any = None,
    checkpoint_every_s: Any = 60.0,
    deadline: Any = None,
    problems: Problems | None = None,
    latency_table: Any = None,
    finetune: Any = None,
    teacher: Any = None,
) -> Request:
    """Turn the arguments of compress() into a `Request`; what else was complained about comes as `problems`.

    Raises:
        InputError: Naming every argument that cannot work, with its remedy.
    """
    problems = problems or Problems("compress() cannot start")
    _check_whole(problems, "seed", seed, least=0)
    for name, value in (("round_to", round_to), ("test_images", test_images)):
        if value is not None:
            _check_whole(problems, name, value, least=1)
    if epochs is not None and not (_is_number(epochs) and 0 < epochs < 1e6):
        problems.add(f"epochs={epochs!r}: must be a positive number")
    if not isinstance(recipe, Recipe | None):
        problems.add(f"recipe={recipe!r}: give a Recipe, such as Recipe(lr=0.05)")
    chosen = problems.attempt(lambda: make_strategy(strategy))
    limits = problems.attempt(lambda: _budget(budget))
    if chosen is not None and limits is not None:
        check_granularity(problems, chosen, _as_limits(problems, chosen, limits), round_to)
    adversary = problems.attempt(lambda: _threat(threat))
    loss = problems.attempt(lambda: _objective(objective))
    tuning = None if finetune is None else problems.attempt(lambda: _objective(finetune, "finetune"))
    if adversary is not None:
        for kind in filter(None, (loss, tuning)):
            problems.attempt(functools.partial(kind.check, adversary))
    specs = _attacks(problems, attacks)
    target = problems.attempt(lambda: resolve_device(device))
    if out is not None and current().first:  # who writes
        problems.attempt(lambda: check_target(Path(out)))
    demand = limits.demand if limits is not None else None
    _check_checkpoint(problems, checkpoint, checkpoint_every_s, deadline, out, also=WORKPLACE if demand else "")
    table = None if latency_table is None else problems.attempt(lambda: read_latency_table(latency_table))
    if latency_table is not None and limits is not None and not limits.limits_latency:
        problems.add("latency_table is given, but the budget says nothing of latency: Budget(max_latency_ms=...)")
    splits = problems.attempt(lambda: load_data(data))
    if isinstance(splits, DataSplits) and demand is not None:
        for part, use in (("val", "chosen on validation"), ("test", "judged in the end on test")):
            if len(getattr(splits, part)) == 0:
                problems.add(f"min_robust: networks are {use} images, and there are none: give data with some")
    if isinstance(splits, DataSplits) and adversary is not None and len(splits.test):
        check_images(splits.test.pixels, splits.test.labels, adversary, problems)
        if any(spec.kind == "autoattack" for spec in specs) or (demand is not None and demand.attack == "autoattack"):
            for item in check_autoattack(adversary, splits.image_shape[1:]).items:
                problems.add(item)
    if isinstance(splits, DataSplits):
        known = functools.partial(_for_data, splits)
        loss, tuning = (kind and problems.attempt(functools.partial(known, kind)) for kind in (loss, tuning))
    if chosen is not None:
        labels = isinstance(splits, DataSplits) and splits.extra is not None and splits.extra.labelled_by == TEACHER
        check_teaching(problems, chosen, loss, tuning, teacher, pretrained, labels=labels)
    master = labeller = None
    if teacher is not None and isinstance(splits, DataSplits) and target is not None:
        master = problems.attempt(lambda: read_teacher(teacher, splits, target))
    if isinstance(splits, DataSplits) and splits.extra is not None:
        size = recipe.batch_size if isinstance(recipe, Recipe) else Recipe().batch_size
        nobody = teacher is None and not pretrained
        labeller = labeller_of(problems, splits, splits.extra, target, batch_size=size, nobody=nobody)
    reference, spec = problems.attempt(lambda: _reference(model, seed)) or (None, None)
    if reference is not None and isinstance(splits, DataSplits):
        problems.attempt(lambda: check_image_size(reference, *splits.image_shape[1:]))
    problems.raise_if_any()
    assert reference is not None
    return Request(
        model=reference.to(target),
        spec=spec,
        strategy=chosen,
        data=splits,
        budget=limits,
        threat=adversary,
        objective=loss,
        epochs=epochs,
        recipe=recipe or Recipe(),
        round_to=round_to,
        attacks=specs,
        test_images=test_images,
        seed=seed,
        device=target,
        out=Path(out) if out is not None else None,
        pretrained=pretrained,
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
        checkpoint_every_s=checkpoint_every_s,
        deadline=deadline,
        latency_table=table,
        finetune=tuning,
        teacher=master,
        labeller=labeller,
    )


def _check_checkpoint(
    problems: Problems, checkpoint: Any, every_s: Any, deadline: Any, out: Any, *, also: str = ""
) -> None:
    if not isinstance(checkpoint, str | Path | None):
        problems.add(f"checkpoint={checkpoint!r}: name a directory")
    elif checkpoint is not None:
        if current().first:
            problems.attempt(lambda: check_directory(Path(checkpoint), also=also))
        if out is not None and Path(checkpoint).resolve() == Path(out).resolve():
            problems.add(f"checkpoint={checkpoint} is where the result goes (out); choose another directory")
    check_times(problems, every_s, deadline)
    if deadline is not None and checkpoint is None:
        problems.add(f"deadline={deadline!r} without a checkpoint would throw the work away: pass checkpoint=DIR too")


def check_times(problems: Problems, every_s: Any, deadline: Any) -> None:
    """Note what is no number of seconds."""
    if not _is_number(every_s) or every_s < 0:
        problems.add(f"checkpoint_every_s={every_s!r}: must be a number of seconds, at least 0")
    if deadline is not None and (not _is_number(deadline) or deadline < 0):
        problems.add(f"deadline={deadline!r}: must be a number of seconds from now, at least 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_whole(problems: Problems, name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "positive whole number" if least else "whole number, at least 0"
        problems.add(f"{name}={value!r}: must be a {kind}")


def _budget(budget: object) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, int | float) and not isinstance(budget, bool):
        return Budget(macs=budget)
    raise InputError(
        f"budget={budget!r}: give a Budget, or a number: the fraction of the multiply-adds that may be left"
    )


def _as_limits(problems: Problems, strategy: Strategy, budget: Budget) -> Budget:
    """What each network has to keep that a demand for accuracy has compressed; without one, the budget itself."""
    demand = budget.demand
    if demand is None:
        return budget
    if strategy.direction == "none" or strategy.given_shape:
        problems.add(
            f"min_robust looks for a size, and {strategy.name} has but one: take another strategy, such as 'magnitude'"
        )
    if (strategy.granularity == "weight") != (demand.axis == "density"):
        wanted = "axis='density'" if strategy.granularity == "weight" else "axis='macs', 'params' or 'latency'"
        problems.add(
            f"min_robust: axis={demand.axis!r} is no size that granularity={strategy.granularity!r} changes: give "
            f"MinRobust({demand.accuracy:g}, {wanted})"
        )
        return Budget(density=0.5) if strategy.granularity == "weight" else Budget(macs=0.5)
    return replace(budget, min_robust=None, **{demand.axis: getattr(budget, demand.axis) or 0.5})


def check_granularity(problems: Problems, strategy: Strategy, budget: Budget, round_to: object) -> None:
    """Note limits that a strategy cannot move: zeros in a network of the same shape are counted by density alone."""
    others = [name for name in budget.to_json() if name != "density"]
    if strategy.direction == "none":
        return
    if strategy.granularity == "weight" and (others or budget.density is None):
        problems.add(
            f"granularity='weight' zeroes single weights, which leaves {' and '.join(others)} as they are: give "
            "Budget(density=0.1) for 90 % zeros, or granularity='channel'"
        )
    if strategy.granularity == "weight" and round_to is not None:
        problems.add(
            f"round_to={round_to!r} is for widths, which granularity='weight' leaves as they are: leave it out"
        )
    elif strategy.granularity == "channel" and budget.density is not None:
        problems.add(
            f"density={budget.density:g} counts single zeros, and {strategy.name} removes channels: give "
            "granularity='weight' (a strategy's option, where it has one), or Budget(macs=...)"
        )


def _threat(threat: object) -> ThreatModel:
    if isinstance(threat, ThreatModel):
        return threat
    if isinstance(threat, int | float) and not isinstance(threat, bool):
        return ThreatModel(eps=threat)
    raise InputError(f"threat={threat!r}: give a ThreatModel, such as ThreatModel('linf', 8/255), or an linf radius")


def _objective(objective: object, what: str = "objective") -> Objective:
    if objective is None:
        return PGDAT()
    if isinstance(objective, str):
        return objective_from_name(objective)
    if isinstance(objective, Objective):
        return objective
    raise InputError(f"{what}={objective!r}: give an Objective, or the name of one, such as 'pgd-at'")


def _for_data(data: DataSplits, objective: Objective) -> Objective:
    objective.check_classes(data.classes)
    return objective.for_labels(data.train.labels, data.num_classes)


def _attacks(problems: Problems, attacks: object) -> tuple[AttackSpec, ...]:
    if isinstance(attacks, str | AttackSpec):
        attacks = (attacks,)
    if not isinstance(attacks, list | tuple | set | frozenset):
        problems.add(f"attacks={attacks!r}: give names, such as ('clean', 'pgd-20'), or () for no report")
        return ()
    read = [a if isinstance(a, AttackSpec) else problems.attempt(functools.partial(attack_by_name, a)) for a in attacks]
    return tuple(spec for spec in read if spec is not None)


def _reference(model: object, seed: int) -> tuple[nn.Module, ModelSpec | None]:
    """A copy of the model to work on, or one made anew, and how to make it again."""
    spec: ModelSpec | None
    if isinstance(model, str):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed if isinstance(seed, int) else 0)
            twin, spec = build_model(model)
    elif isinstance(model, ModelSpec):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed if isinstance(seed, int) else 0)
            twin, spec = model.build(), model
    elif isinstance(model, nn.Module):
        twin, spec = copy.deepcopy(model), identify(model)
    else:
        raise InputError(f"model={model!r}: give an nn.Module or the name of one")
    parameters = list(twin.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        raise InputError("every parameter of the model is frozen: call model.requires_grad_(True), or thaw some layers")
    if any(p.dtype == torch.float64 for p in parameters):
        twin = twin.float()
    for module in twin.modules():  # a caller's hooks see the caller's model, not the copy
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
    for parameter in parameters:
        parameter.grad = None
    return twin, spec
