"""What processes are asked to do in these tests: functions that another process can import."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import robustcompress as rc
from robustcompress.checkpoint import agree
from robustcompress.distributed import DistributedError, Parts, World
from robustcompress.robust import AutoAttackConfig, evaluate
from robustcompress.robust.objectives import PGDAT, FreeAT, ObjectiveStep
from robustcompress.strategies import make_strategy
from tests.strategies.nets import QUICK_RECIPE, build, make_session, small_data, state

FEWER: dict[str, dict[str, Any]] = {"rcnas": {"evaluations": 4, "finalists": 2, "recovery_steps": 1}}
LITTLE = AutoAttackConfig(chunk_size=3, apgd_iterations=2, fab_iterations=2, square_queries=4)
TIMES = ("images_per_s",)


@dataclasses.dataclass(frozen=True)
class Case:
    """A compression."""

    strategy: str
    net: str = "residual"
    epochs: float = 2.0
    free: bool = False
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def compressed(case: Case, *, parts: int = 1) -> dict[str, Any]:
    """What one process, or each of several, ends with."""
    recipe = dataclasses.replace(QUICK_RECIPE, accumulate=parts, **case.recipe)
    result = rc.compress(
        build(case.net),
        make_strategy(case.strategy, **FEWER.get(case.strategy, {})),
        data=small_data(),
        epochs=case.epochs,
        objective=FreeAT(replays=2) if case.free else PGDAT(steps=1),
        recipe=recipe,
        attacks=("clean", "pgd-2"),
        test_images=40,
        progress=False,
        **case.kept,
    )
    assert result.report is not None
    history = [{k: v for k, v in record.items() if k not in TIMES} for record in result.history]
    return {
        "weights": {name: tensor.numpy() for name, tensor in state(result.model).items()},
        "edits": [edit.to_json() for edit in result.edits],
        "history": json.loads(json.dumps(history)),
        "answers": [attack.correct.tolist() for attack in result.report.attacks],
    }


def compress_all(world: World, cases: list[Case], parts: int = 1) -> list[dict[str, Any]]:
    """Each of the cases."""
    return [compressed(case, parts=parts) for case in cases]


def judged(
    world: World, resume_dir: str | None = None, *, time_limit_s: float | None = None, progress: Any = None
) -> list[dict[str, Any]]:
    """A report of an untrained network, without the times, on images most of which it gets right."""
    attacks = ("clean", "fgsm", "pgd-2x2", "apgd-fast-9", "autoattack")
    model, test = build().train(), small_data().test
    with torch.no_grad():
        for _ in range(20):
            model(test.as_float())  # statistics under which it answers differently to different images
        answers = model.eval()(test.as_float()).argmax(1)
    labels = torch.where(torch.arange(len(test.labels)) % 4 > 0, answers, test.labels)
    report = evaluate(
        model,
        (test.pixels, labels),
        rc.ThreatModel("linf", 0.014),  # the second attack breaks some too
        attacks=attacks,
        batch_size=4,
        autoattack_images=20,
        autoattack_config=LITTLE,
        hierarchy="digits",
        resume_dir=resume_dir,
        time_limit_s=time_limit_s,
        progress=progress,
        world=world,
    )
    return [{k: v for k, v in attack.to_json().items() if k != "seconds"} for attack in report.attacks]


def stopped(world: World) -> str:
    """What is said where one of them is asked to stop in the middle of AutoAttack."""

    def ask(step: rc.robust.EvaluationProgress) -> None:
        if world.rank == 1 and step.attack == "autoattack" and step.accuracy < 0.65:
            signal.raise_signal(signal.SIGTERM)

    try:
        with rc.graceful():
            judged(world, progress=ask)
    except rc.Interrupted as stop:
        return str(stop)
    return "not stopped"


def agreement(world: World) -> dict[str, Any]:
    """The ways in which processes tell each other things."""
    value = {"a": [1, 2.5, None, "text"], "t": torch.arange(6.0).view(2, 3) + world.rank, "i": torch.tensor(world.rank)}
    told = world.broadcast(value)
    mine = {"rank": world.rank, "t": torch.full((world.rank, 2), world.rank, dtype=torch.bfloat16)}
    everyone = world.gather(mine)
    found: dict[str, Any] = {
        "told": [told["a"], told["t"].tolist(), int(told["i"])],
        "everyone": [[item["rank"], list(item["t"].shape), item["t"].float().sum().item()] for item in everyone],
        "totals": world.totals([1, world.rank]),
        "most": world.most(10 * world.rank),
        "any": [world.any(world.rank == 1), world.any(False)],
        "first": world.only_first(lambda: {"from": world.rank}),
        "share": list(world.share(5)),
    }

    def fails(rank: int) -> int:
        if world.rank == rank:
            raise rc.BudgetError("too much")
        return rank

    for name, act in (
        ("only_first", lambda: world.only_first(lambda: fails(0))),
        ("together", lambda: world.together(lambda: fails(1))),
    ):
        try:
            act()
        except rc.BudgetError as error:
            found[name] = str(error)
    return found


def astray(world: World) -> dict[str, str]:
    """What is said when processes have not done the same; and what is mended."""
    found: dict[str, str] = {}
    torch.manual_seed(0)

    def look(name: str, session: Any) -> None:
        try:
            agree(world, "p", session._everything())
            found[name] = ""
        except DistributedError as error:
            found[name] = str(error)

    look("same", make_session(build()))
    edited = make_session(build())
    edited.editor.prune("conv1", range(8 + world.rank))
    look("edits", edited)
    moved = make_session(build())
    with torch.no_grad():
        moved.model.conv1.weight.mul_(1 + world.rank)
    look("weights", moved)
    rounded = make_session(build())
    with torch.no_grad():
        rounded.model.conv1.weight.mul_(1 + 1e-6 * world.rank)
    look("rounding", rounded)
    found["mended"] = str(float(rounded.model.conv1.weight.sum()))
    drawn = make_session(build())
    torch.rand(world.rank, generator=drawn.generator)
    look("generators", drawn)
    return found


def stopped_after_an_epoch(world: World, cases: list[Case], parts: int) -> None:
    """Begin each case, and stop at the end of the first epoch; its checkpoint stays."""
    for case in cases:
        late = dataclasses.replace(case, kept={**case.kept, "deadline": 0})
        try:
            compressed(late, parts=parts)
        except rc.OutOfTime:
            continue
        raise AssertionError(f"{case.strategy} did not stop")


class Troubled(PGDAT):
    """Meets what is asked for at one step, in one part."""

    def loss_on(self, model: nn.Module, x: torch.Tensor, x_adv: torch.Tensor, y: torch.Tensor) -> ObjectiveStep:
        """As the other's, but for that step."""
        step = super().loss_on(model, x, x_adv, y)
        trouble = TROUBLES.pop(0) if TROUBLES else ""
        if trouble == "memory":
            raise MemoryError("DefaultCPUAllocator: not enough memory")
        return dataclasses.replace(step, loss=step.loss * math.nan) if trouble == "nan" else step


TROUBLES: list[str] = []
"""What this process meets, pass by pass."""


def troubled(world: World, parts: int, troubles: list[str], **recipe: Any) -> dict[str, Any]:
    """A short training in which this process meets some trouble."""
    TROUBLES[:] = troubles
    torch.manual_seed(0)
    session = make_session(
        build(),
        objective=Troubled(steps=1),
        recipe=dataclasses.replace(QUICK_RECIPE, **recipe),
        parts=Parts(parts, world),
    )
    session.train("p", share=2.0)
    history = [{k: v for k, v in record.items() if k not in TIMES} for record in session.history]
    return {"weights": {n: t.numpy() for n, t in state(session.averaged).items()}, "history": history}


def quick_checks(world: World, cases: list[Case], directory: str) -> dict[str, Any]:
    """All that the quick tests look at: starting processes takes longer than any of it."""
    return {
        "agreement": agreement(world),
        "astray": astray(world),
        "judged": judged(world),
        "judged in time": judged(world, time_limit_s=1000),
        "judged too late": judged(world, time_limit_s=1e-9)[-1],
        "stopped": stopped(world),
        "judged again": [judged(world, directory), judged(world, directory)],
        "files": len(list(Path(directory).glob("*.json"))),
        "memory": troubled(world, 2, ["", "", "memory"] if world.rank else []),
        "not finite": troubled(world, 2, ["", "nan"] if world.rank else [], nonfinite="skip"),
        "compressed": compress_all(world, cases),
    }
