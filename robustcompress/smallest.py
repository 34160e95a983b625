"""The smallest network that stays robust: `compress()` under a demand for accuracy in place of a size."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.budget import Budget, measure
from robustcompress.checkpoint import same_run
from robustcompress.durable import write_json
from robustcompress.errors import BudgetError, CheckpointError, ResultError, first_line
from robustcompress.min_robust import (
    LOG,
    REFERENCE,
    WORKPLACE,
    MinRobust,
    Trial,
    images_needed,
    lines_of,
    propose,
    smallest_of,
)
from robustcompress.reach import default_rounding, least_fraction
from robustcompress.resolve import Request
from robustcompress.result import CompressResult
from robustcompress.robust import attack_by_name, evaluate, wilson
from robustcompress.series import (
    AUTOATTACK,
    CarryOut,
    compress_in,
    identity_of,
    read_json,
    reference_editor,
    stop_in_time,
)
from robustcompress.strategies import Reference
from robustcompress.train import Progress

FORMAT = 1


@contextmanager
def workplace(directory: Path | None, *, keep: bool = False) -> Iterator[Path]:
    """Where a search keeps what it has tried; emptied when the search has ended, and not when it was interrupted.

    Args:
        directory: One of the caller's, which a search that was killed is resumed from; None for a temporary one.
        keep: Leave emptying it to the caller (see `clear`).
    """
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="robustcompress-") as temporary:
            yield Path(temporary)
        return
    directory.mkdir(parents=True, exist_ok=True)
    yield directory
    if not keep:
        clear(directory)


def clear(directory: Path) -> None:
    """Remove what a search has kept in a directory, and the directory unless it holds anything else."""
    for path in directory.iterdir():
        if re.fullmatch(WORKPLACE, path.name) and path.is_dir():
            shutil.rmtree(path)
    (directory / LOG).unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


def find_smallest(
    request: Request, place: Path, carry_out: CarryOut, progress: Progress, started: float
) -> CompressResult:
    """Compress the reference to several sizes, and choose the smallest network that meets the demand.

    The reference comes first, trained as strategy "none" trains it; then bisection over sizes. All are judged on the
    same validation images; the test images are not looked at.

    Args:
        request: Its budget holds a demand.
        place: What `workplace` gives.
        carry_out: Compresses to a budget without one.
        progress: Told what is tried, and what came of it.
        started: When the call came, on the clock of `time.monotonic`.

    Returns:
        The network that was chosen, without a report; what was tried is at the end of its history.

    Raises:
        BudgetError: The reference does not meet the demand, or none of the networks that were tried does.
        OutOfTime: The deadline was reached; call again to go on.
    """
    return _Search(request, place, carry_out, progress, started).run()


class _Search:
    def __init__(self, request: Request, place: Path, carry_out: CarryOut, progress: Progress, started: float) -> None:
        demand = request.budget.demand
        assert demand is not None
        self._demand: MinRobust = demand
        self._request, self._place, self._carry_out = request, place, carry_out
        self._progress, self._started = progress, started
        self._quiet = replace(request, data=replace(request.data, notes=()))  # which were said once
        self._images = min(len(request.data.val), demand.images or len(request.data.val))
        self._begun = 0
        self._check_images()
        self._log = self._open()

    def run(self) -> CompressResult:
        ceiling, floor = self._ceiling(), float(self._log["floor"])
        if floor >= ceiling:
            raise BudgetError(
                f"{ceiling:.3g} of the reference's {self._demand.axis} cannot be reached: with every group at its "
                f"narrowest {floor:.3g} are left; raise the other limits, or lower round_to"
            )
        if not self._log["trials"]:
            self._add(self._reference())
        self._refuse_weak_reference()
        while True:
            tried = self._tried[1:]
            limit = propose(tried, floor=floor, ceiling=ceiling, trials=self._demand.trials)
            if limit is None:
                break
            self._add(self._try(limit, len(tried) + 1))
        best = smallest_of(tried)
        if best is None:
            raise BudgetError(self._nothing_found())
        chosen = self._compress(f"trial-{1 + tried.index(best)}", self._at(best.limit))
        self._say(f"chosen: {best.size:.3f} of the reference's {self._demand.axis}, of {len(tried)} networks tried")
        return replace(chosen, history=(*chosen.history, *(trial.to_json() for trial in self._tried)))

    def _ceiling(self) -> float:
        """The largest fraction that the limits along the same axis allow."""
        budget, axis = self._request.budget, self._demand.axis
        fractions = [1.0, getattr(budget, axis) or 1.0]
        most = getattr(budget, f"max_{axis}", None)
        if most is not None:  # of macs and params
            fractions.append(most / self._log["reference"][axis])
        return float(min(fractions))

    @property
    def _tried(self) -> list[Trial]:
        return [self._demand.read(Trial.from_json(record)) for record in self._log["trials"]]

    def _say(self, line: str) -> None:
        self._progress.say(line)

    def _add(self, trial: Trial) -> None:
        self._log["trials"].append(trial.to_json())
        write_json(self._place / LOG, self._log)
        low, high = trial.interval
        found = (
            f"{self._demand.attack} accuracy {100 * trial.accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f}, "
            f"n={trial.n}) on validation images"
        )
        said = trial.reason or f"{trial.size:.3f} of the {self._demand.axis}, {found}"
        self._say(f"{self._name(trial)}: {said}: {'holds' if trial.holds else 'does not hold'}")

    def _name(self, trial: Trial) -> str:
        return "reference" if trial.limit == 1 else f"asked for {trial.limit:.3f}"

    def _reference(self) -> Trial:
        request = self._quiet
        if request.pretrained:
            network = copy.deepcopy(request.model)
            cost = measure(network, torch.zeros(1, *request.data.image_shape, device=request.device))
            return self._judged(network, limit=1.0, size=1.0, macs=cost.macs, params=cost.params)
        self._say("the reference is trained first")
        asked = replace(request, strategy=Reference(), finetune=None, budget=Budget(macs=1.0))
        result = self._compress(REFERENCE, asked)
        return self._judged(result.model, limit=1.0, size=1.0, macs=result.after.macs, params=result.after.params)

    def _at(self, limit: float) -> Request:
        """What asks for a network of this fraction of the reference's size."""
        budget = replace(self._request.budget, min_robust=None, **{self._demand.axis: limit})
        return replace(self._quiet, budget=budget)

    def _try(self, limit: float, number: int) -> Trial:
        self._say(
            f"trial {number} of at most {self._demand.trials}: {limit:.3f} of the reference's {self._demand.axis}"
        )
        try:
            result = self._compress(f"trial-{number}", self._at(limit))
        except BudgetError as error:
            return Trial(limit=limit, reason=first_line(error))
        size = self._size(result)
        return self._judged(result.model, limit=limit, size=size, macs=result.after.macs, params=result.after.params)

    def _compress(self, name: str, request: Request) -> CompressResult:
        if self._begun:
            stop_in_time(request, self._started)
        self._begun += 1
        return compress_in(
            self._place, name, request, self._carry_out, progress=self._progress.enabled, started=self._started
        )

    def _size(self, result: CompressResult) -> float:
        before, after = result.before, result.after
        if self._demand.axis == "density":
            return (after.nonzeros or 0) / (before.weights or 1)
        key = {"macs": "macs", "params": "params", "latency": "onnx_ms"}[self._demand.axis]
        return float(getattr(after, key) / getattr(before, key))

    def _judged(self, network: nn.Module, **size: Any) -> Trial:
        request, demand = self._request, self._demand
        report = evaluate(
            network,
            request.data.val,
            request.threat,
            attacks=("clean", attack_by_name(demand.attack)),
            device=request.device,
            seed=request.seed,
            max_images=demand.images,
            resume_dir=self._place / AUTOATTACK if demand.attack == "autoattack" else None,
        )
        for warning in report.warnings:
            self._say(f"warning: {warning}")
        found = report.result(demand.attack)
        right = int(found.correct.sum())
        return demand.read(Trial(**size, clean=report.clean_accuracy, right=right, n=found.n))

    def _open(self) -> dict[str, Any]:
        """What was tried before; else a new record, with the smallest size that can be reached."""
        request, demand, path = self._request, self._demand, self._place / LOG
        identity = identity_of(request) | {"strategy": request.strategy.identity(), "budget": request.budget.to_json()}
        identity = json.loads(json.dumps(identity))
        for key in ("accuracy", "trials"):  # another demand is another reading of the same trials
            del identity["budget"]["min_robust"][key]
        log = read_json(path)
        if log is None:
            floor, reference = self._look()
            self._say(
                f"{demand}: the reference, then at most {demand.trials} networks between {floor:.3g} and 1 of its "
                f"{demand.axis}, each compressed in full; chosen on {self._images} validation images"
            )
            log = {"format": FORMAT, "identity": identity, "floor": floor, "reference": reference, "trials": []}
            write_json(path, log)
            return log
        try:
            if type(log["format"]) is int and log["format"] > FORMAT:
                raise ResultError(f"{path} has format {log['format']}; this version reads up to {FORMAT}: upgrade")
            known, _ = (
                dict(log["identity"]),
                (float(log["floor"]), log["reference"]["macs"] + log["reference"]["params"]),
            )
            tried = [Trial.from_json(record) for record in log["trials"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); remove {self._place} to begin anew") from error
        same_run(f"checkpoint={self._place}", known, identity)
        self._say(f"going on with the search in {self._place}: {len(tried)} networks were judged")
        return log

    def _look(self) -> tuple[float, dict[str, int]]:
        """The smallest fraction that can be reached, and what the reference costs."""
        request = self._request
        editor, example = reference_editor(request)
        cost = measure(editor.model, example)
        step = request.round_to or default_rounding(editor)
        floor = least_fraction(request.strategy, editor, example, self._demand.axis, step)
        return floor, {"macs": cost.macs, "params": cost.params}

    def _check_images(self) -> None:
        best, demand = wilson(self._images, self._images)[0], self._demand
        if best < demand.accuracy:
            raise BudgetError(
                f"{demand} cannot be shown on {self._images} validation images: were all of them right, the lower end "
                f"would be {100 * best:.1f} %; give more images, or ask for less"
            )

    def _refuse_weak_reference(self) -> None:
        reference, demand = self._tried[0], self._demand
        if reference.holds:
            return
        low, high = reference.interval
        remedy = "train longer, start from a larger model, or ask for less"
        needed = images_needed(reference.accuracy, demand.accuracy)
        if needed is not None and needed > reference.n:
            remedy = (
                f"the interval is wide: from about {needed} validation images on its lower end would reach it "
                f"(images=..., and val_fraction=... of load_data); or {remedy}"
            )
        raise BudgetError(
            f"the reference itself does not reach {demand}: {100 * reference.accuracy:.1f} % ({100 * low:.1f} to "
            f"{100 * high:.1f}, n={reference.n} validation images); {remedy}"
        )

    def _nothing_found(self) -> str:
        kept = ""
        if self._request.checkpoint is not None:
            kept = f" (what was trained stays in {self._place}, and the same call with more trials goes on from there)"
        table = "\n".join(f"  {line}" for line in lines_of(self._tried))
        return (
            f"only the reference was found to reach {self._demand}, none of the smaller networks that were tried; ask "
            f"for less, train longer, or allow more trials{kept}:\n{table}"
        )
