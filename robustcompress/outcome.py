"""How a compression ends: the network closed, checked against its budget, attacked, described, saved."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.budget import Budget, Cost, human, measure
from robustcompress.data import DataSplits
from robustcompress.distributed import current
from robustcompress.errors import BudgetError, RobustCompressError
from robustcompress.goal import Goal
from robustcompress.resolve import Request
from robustcompress.result import CompressResult
from robustcompress.robust import RobustReport, evaluate
from robustcompress.strategies import Strategy
from robustcompress.train import Progress, describe, set_memory_format


def closed(model: nn.Module) -> nn.Module:
    """A plain module: eval mode, contiguous tensors, gradients cleared, nothing attached."""
    set_memory_format(model, torch.contiguous_format)
    model.zero_grad(set_to_none=True)
    hooked = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooked, f"hooks left on {hooked}"
    return model.eval()


def check_outcome(strategy: Strategy, model: nn.Module, example: torch.Tensor, budget: Budget, reference: Cost) -> None:
    """Raise unless the network keeps its budget (BudgetError) and its weights are finite."""
    cost = measure(model, example)
    if strategy.direction != "none" and not budget.allows(cost, reference):
        raise BudgetError(
            f"{strategy.name} ended at {human(cost.macs)} MACs, {human(cost.params)} parameters and "
            f"{human(cost.nonzeros or 0)} weights that are not zero, over {budget}"
        )
    if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
        raise RobustCompressError(f"{strategy.name} ended with weights that are not finite; lower the learning rate")


def report_on(
    model: nn.Module, request: Request, progress: Progress, *, resume_dir: Path | None = None
) -> RobustReport | None:
    """Attack the test images as was asked for; None where nothing was, or there are none."""
    if not request.attacks or len(request.data.test) == 0:
        return None
    report = evaluate(
        model,
        request.data.test,
        request.threat,
        attacks=request.attacks,
        device=request.device,
        seed=request.seed,
        max_images=request.test_images,
        resume_dir=resume_dir,
        world=current(),
    )
    for warning in report.warnings:
        progress.say(f"warning: {warning}")
    return report


def describe_data(data: DataSplits) -> dict[str, Any]:
    """What a result says of its data."""
    told = {
        "name": Path(data.name).name,
        "sha256": data.sha256,
        "classes": list(data.classes),
        "image_shape": list(data.image_shape),
        "train": len(data.train),
        "val": len(data.val),
        "test": len(data.test),
    }
    return told if data.extra is None else told | {"extra": data.extra.told()}


def settings_of(goal: Goal, device: torch.device, history: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What a result says of how it was trained, as plain JSON; `history` knows of a teacher."""
    settings = {
        "objective": goal.objective.to_json(),
        "recipe": goal.recipe.to_json(),
        "epochs": goal.epochs,
        "pretrained": goal.pretrained,
        "round_to": goal.round_to,
        "device": describe(device),
        "versions": versions(),
    }
    if goal.finetune is not None:
        settings["finetune"] = goal.finetune.to_json()
    for record in history:
        if record.get("event") == "teacher":
            settings["teacher"] = {key: value for key, value in record.items() if key not in ("phase", "event")}
    parsed: dict[str, Any] = json.loads(json.dumps(settings))
    return parsed


def versions() -> dict[str, str]:
    """What a result says of the software that made it."""
    from robustcompress import __version__

    return {"robustcompress": __version__, "torch": torch.__version__, "python": platform.python_version()}


def save_beside(result: CompressResult, out: Path, progress: Progress) -> Path:
    """Save; if the place was taken during the training, save beside it: hours of work are not thrown away."""
    target = out
    for number in range(2, 100):
        if not target.exists():
            break
        target = out.with_name(f"{out.name}-{number}")
    if target != out:
        progress.say(f"{out} came to be during the training; the result is saved to {target}")
    sweep(target)
    return result.save(target)


def sweep(out: Path) -> None:
    """Remove what an earlier save to the same place left half written when it was killed; nobody else writes there."""
    left = re.compile(rf"\.{re.escape(out.name)}-[a-z0-9_]{{8}}")  # as `tempfile` names what `save` asks it for
    for path in out.parent.iterdir():
        if left.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
