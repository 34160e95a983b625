"""`pareto()`: one reference compressed to several sizes, by several strategies, into one directory."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.api import carry_out
from robustcompress.budget import Budget, Cost, measure
from robustcompress.checkpoint import same_run
from robustcompress.durable import ground, write_json
from robustcompress.errors import DiskError, InputError, OutOfTime, Problems, ResultError, RobustCompressError
from robustcompress.export.timing import Stopwatch
from robustcompress.front import Front, Point, accuracies_of
from robustcompress.front_plot import plot_front
from robustcompress.lock import held
from robustcompress.models import ModelSpec
from robustcompress.plots import check_picture
from robustcompress.resolve import Request, check_granularity, check_times, resolve
from robustcompress.result import RESULT
from robustcompress.robust import RobustReport, ThreatModel, evaluate
from robustcompress.robust.objectives import Objective
from robustcompress.series import (
    AUTOATTACK,
    compress_in,
    identity_of,
    read_json,
    reference_editor,
    stop_in_time,
)
from robustcompress.strategies import Reference, Strategy, make_strategy
from robustcompress.train import Progress, Recipe

RECORD = "pareto.json"
PRECISION = 0.02
"""Standard error, relative, down to which a network is timed against the reference."""

Job = tuple[Strategy, Budget]


def pareto(
    model: nn.Module | ModelSpec | str,
    strategies: str | Strategy | Sequence[str | Strategy] = "grape",
    *,
    out: str | Path,
    budgets: Sequence[float | Budget] = (0.25, 0.5, 0.75),
    axis: str | None = None,
    data: Any = None,
    threat: ThreatModel | float = ThreatModel("linf", 8 / 255),
    objective: Objective | str | None = None,
    epochs: float | None = None,
    pretrained: bool = False,
    recipe: Recipe | None = None,
    round_to: int | None = None,
    attacks: Sequence[str] = ("clean", "pgd-20"),
    test_images: int | None = 1000,
    seed: int = 0,
    device: str | torch.device = "auto",
    progress: bool = True,
    checkpoint_every_s: float = 60.0,
    deadline: float | None = None,
    picture: str = "pareto.png",
    retry: bool = False,
) -> Front:
    """Compress to several budgets, by several strategies, and set accuracy under attack against cost.

    Everything goes into one directory: a saved result for each network, `pareto.json`, a picture. The same call goes on
    after a kill, at the last checkpoint, and repeats nothing; with more budgets, strategies or attacks it adds what
    is missing. A budget that cannot be met is listed with its reason.

    Args:
        model: The reference, as `compress` takes it.
        strategies: One or several; the reference itself ("none") always comes along.
        out: The directory; made if it does not exist.
        budgets: Fractions of the reference along `axis`, or `Budget`s.
        axis: "macs", "params", "latency" or "density"; by default "density" for strategies with granularity="weight",
            else "macs".
        data: As for `compress`, like all that is not explained here.
        threat: What the networks must withstand.
        objective: Loss of every phase.
        epochs: Passes over the training images, of each network.
        pretrained: The reference's weights are robust already: it is judged as it is.
        recipe: Training settings.
        round_to: Widths become multiples of this.
        attacks: What is measured on the test images. "Robust" is AutoAttack where it is among them, else the last.
        test_images: How many test images are attacked at most; None for all.
        seed: Seeds everything.
        device: "auto", "cpu", "cuda", ...
        progress: Show progress.
        checkpoint_every_s: Least seconds between two checkpoints within a phase.
        deadline: Seconds from this call after which it should have stopped.
        picture: Name of the picture in `out`, such as "pareto.svg"; "" for none.
        retry: Try again what failed in an earlier call.

    Returns:
        Every network with its costs and accuracies. Time is onnxruntime's, against the reference in turns.

    Raises:
        InputError: Something cannot work; all that was noticed is listed, before any training. Or `out` holds the
            networks of another reference, data or training.
        OutOfTime: The deadline was reached; call again to go on.
    """
    started, out = time.monotonic(), Path(out)
    base, jobs = prepare_front(
        strategies,
        budgets,
        axis=axis,
        out=out,
        picture=picture,
        deadline=deadline,
        model=model,
        data=data,
        threat=threat,
        objective=objective,
        epochs=epochs,
        recipe=recipe,
        round_to=round_to,
        attacks=attacks,
        test_images=test_images,
        seed=seed,
        device=device,
        pretrained=pretrained,
        checkpoint_every_s=checkpoint_every_s,
    )
    return carry_out_front(base, jobs, out, progress=progress, started=started, picture=picture, retry=retry)


def prepare_front(
    strategies: Any,
    budgets: Any,
    *,
    axis: str | None,
    out: Path,
    picture: str,
    deadline: float | None,
    problems: Problems | None = None,
    **settings: Any,
) -> tuple[Request, list[Job]]:
    """Check the arguments of `pareto()`; `settings` are those of `resolve`, `problems` earlier complaints.

    Returns:
        What all networks have in common, and the strategies with their budgets; the reference is none of them.

    Raises:
        InputError: Naming every argument that cannot work, with its remedy.
    """
    problems = problems or Problems("pareto() cannot start")
    jobs = _jobs(problems, strategies, budgets, axis, settings["round_to"])
    check_times(problems, settings["checkpoint_every_s"], deadline)
    problems.attempt(lambda: check_out(out))
    if picture and Path(picture).name != picture:
        problems.add(f"picture={picture!r}: name a file, which goes into {out}")
    elif picture:
        problems.attempt(lambda: check_picture(picture))
    strategy, budget = jobs[0] if jobs else (Reference(), Budget(macs=0.5))
    base = resolve(strategy=strategy, budget=budget, out=None, problems=problems, **settings)
    if not any(spec.kind != "clean" for spec in base.attacks):
        raise InputError(f"{problems.title}: no attack is named: give attacks=('clean', 'pgd-20')")
    return replace(base, deadline=deadline), jobs


def _jobs(problems: Problems, strategies: Any, budgets: Any, axis: str | None, round_to: Any) -> list[Job]:
    """Every strategy with every budget; the reference is none of them."""
    listed = [strategies] if isinstance(strategies, str | Strategy) else list(strategies)
    made = [problems.attempt(lambda kind=kind: make_strategy(kind)) for kind in listed]  # type: ignore[misc]
    budgets = [budgets] if isinstance(budgets, int | float | Budget) else list(budgets)
    if axis not in (None, "macs", "params", "latency", "density"):
        problems.add(f"axis={axis!r} does not exist (one of: macs, params, latency, density)")
        return []
    if not budgets or not listed:
        problems.add("there is nothing to compress: give at least one strategy and one budget")
    jobs: list[Job] = []
    for strategy in made:
        if strategy is None or strategy.direction == "none":
            continue
        for value in budgets:
            key = axis or ("density" if strategy.granularity == "weight" else "macs")
            given = isinstance(value, Budget)
            budget = value if given else problems.attempt(lambda key=key, value=value: Budget(**{key: value}))  # type: ignore[misc]
            if budget is None:
                continue
            if budget.demand is not None:
                problems.add("min_robust looks for its own size: give it to compress()")
                continue
            check_granularity(problems, strategy, budget, round_to)
            if (strategy, budget) not in jobs:
                jobs.append((strategy, budget))
    return jobs


def check_out(out: Path) -> None:
    """Raise one InputError when the directory cannot hold a front."""
    if not out.exists():
        if not ground(out).is_dir():
            raise InputError(f"out={out}: {ground(out)} is no directory; choose another place")
    elif not out.is_dir():
        raise InputError(f"out={out} is a file; name a directory")
    elif any(out.iterdir()) and not (out / RECORD).is_file():
        raise InputError(f"out={out} holds other things, and no {RECORD}; choose an empty directory, or a new one")


def carry_out_front(
    base: Request,
    jobs: Iterable[Job],
    out: Path,
    *,
    progress: bool = True,
    started: float | None = None,
    picture: str = "pareto.png",
    retry: bool = False,
) -> Front:
    """Do what `pareto()` does, for arguments that are resolved."""
    with held(out):
        return _Run(base, out, Progress(progress), time.monotonic() if started is None else started).all(
            list(jobs), picture, retry
        )


class _Run:
    def __init__(self, base: Request, out: Path, progress: Progress, started: float) -> None:
        for note in base.data.notes:
            progress.say(note)
        self._base = replace(base, data=replace(base.data, notes=()))
        self._out, self._progress, self._started = out, progress, started
        self._points: list[Point] = []
        self._attack = next(
            (spec.name for spec in base.attacks if spec.kind == "autoattack"),
            next(spec.name for spec in reversed(base.attacks) if spec.kind != "clean"),
        )
        self._identity = identity_of(base)
        self._reference_ms: float | None = None
        self._stopwatch: Stopwatch | None = None
        self._open()

    def all(self, jobs: list[Job], picture: str, retry: bool) -> Front:
        total, begun = len(jobs) + 1, False
        for number, (strategy, budget) in enumerate([(Reference(), None), *jobs], 1):
            known = self._known(strategy, budget)
            if known is not None and self._is_done(known, retry):
                continue
            if begun:  # each call gets somewhere
                stop_in_time(self._base, self._started)
            begun, point = True, known or self._begin(strategy, budget)
            self._progress.say(f"network {number} of {total}: {point.label}, {point.asked_for}")
            self._put(self._made(point, strategy, budget))
        front = self._front()
        if picture and front.made:
            plot_front(front, self._out / picture)
        return front

    def _made(self, point: Point, strategy: Strategy, budget: Budget | None) -> Point:
        try:
            network, cost, report = self._network(point, strategy, budget)
            ms = point.onnx_ms if point.onnx_ms is not None else self._time(network)
        except (OutOfTime, DiskError):  # neither is the network's fault: the same call goes on
            raise
        except RobustCompressError as error:
            if budget is None:
                raise  # without the reference there is nothing to measure against
            self._progress.say(f"failed: {error}")
            return replace(point, failed=" ".join(str(error).split())[:400])
        judged = replace(point, onnx_ms=ms, accuracies=accuracies_of(report), failed="")
        return replace(judged, macs=cost.macs, params=cost.params, size=cost.size)

    def _network(self, point: Point, strategy: Strategy, budget: Budget | None) -> tuple[nn.Module, Cost, RobustReport]:
        """The network, made or read back, and judged where it was not yet."""
        base = self._base
        if budget is None and base.pretrained:
            model = copy.deepcopy(base.model)
            example = torch.zeros(1, *base.data.image_shape, device=base.device)
            return model, measure(model, example), self._judge(model, point)
        asked = replace(base, strategy=strategy, budget=budget or Budget(macs=1.0))
        result = compress_in(
            self._out, point.name, asked, carry_out, progress=self._progress.enabled, started=self._started
        )
        report = result.report
        if report is None or not self._covers(accuracies_of(report)):
            report = self._judge(result.model, point)
            replace(result, report=report).save(self._out / point.name, overwrite=True)
        return result.model, result.after, report

    def _judge(self, model: nn.Module, point: Point) -> RobustReport:
        base = self._base
        report = evaluate(
            model,
            base.data.test,
            base.threat,
            attacks=base.attacks,
            device=base.device,
            seed=base.seed,
            max_images=base.test_images,
            resume_dir=self._out / AUTOATTACK if self._attack == "autoattack" else None,
        )
        for warning in report.warnings:
            self._progress.say(f"warning: {warning}")
        found = report.result(self._attack)
        self._progress.say(
            f"{point.label}: {self._attack} accuracy {100 * found.accuracy:.1f} % ({100 * found.low:.1f} to "
            f"{100 * found.high:.1f}, n={found.n})"
        )
        return report

    def _covers(self, accuracies: Any) -> bool:
        """Whether these tell all attacks that are asked for, on as many images."""
        n = min(len(self._base.data.test), self._base.test_images or len(self._base.data.test))
        return all(spec.name in accuracies and accuracies[spec.name]["n"] == n for spec in self._base.attacks)

    def _time(self, network: nn.Module) -> float:
        """Milliseconds of one image, on the scale of the first measurement of the reference."""
        if self._stopwatch is None:
            self._stopwatch = Stopwatch(reference_editor(self._base)[0], self._base.data.image_shape)
        timing = self._stopwatch.time(network, precision=PRECISION)
        if self._reference_ms is None:
            self._reference_ms = timing.reference_ms
        return timing.ratio * self._reference_ms

    def _known(self, strategy: Strategy, budget: Budget | None) -> Point | None:
        asked = _asked(strategy, budget)
        return next((point for point in self._points if (point.strategy, point.budget) == asked), None)

    def _is_done(self, point: Point, retry: bool) -> bool:
        if point.failed:
            return not retry
        there = (self._out / point.name / RESULT).is_file() or (point.is_reference and self._base.pretrained)
        return there and point.onnx_ms is not None and self._covers(point.accuracies)

    def _begin(self, strategy: Strategy, budget: Budget | None) -> Point:
        """A point with a name of its own, written down before anything is made in its place."""
        told, limits = _asked(strategy, budget)
        labels = {point.label: point.strategy for point in self._points}
        candidates = [strategy.name, *(f"{strategy.name}-{number}" for number in range(2, 100))]
        label = next(label for label in candidates if labels.get(label, told) == told)
        size = "-".join(f"{key}-{value:g}" for key, value in limits.items())
        point = Point(name=f"{label}-{size}" if size else label, label=label, strategy=told, budget=limits)
        self._put(point)
        return point

    def _put(self, point: Point) -> None:
        places = {known.name: place for place, known in enumerate(self._points)}
        if point.name in places:
            self._points[places[point.name]] = point
        else:
            self._points.append(point)
        record = self._front().to_json() | {"identity": self._identity, "reference_ms": self._reference_ms}
        write_json(self._out / RECORD, record)

    def _front(self) -> Front:
        base = self._base
        shown = Path(base.data.name).name
        return Front(points=tuple(self._points), attack=self._attack, threat=base.threat, data=shown, seed=base.seed)

    def _open(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        record = read_json(self._out / RECORD)
        if record is None:
            return
        self._points = list(Front.from_json(record).points)
        if not isinstance(record.get("identity"), dict):
            raise ResultError(f"{self._out / RECORD} does not say what it is of; choose another directory")
        same_run(f"out={self._out}", record["identity"], self._identity)
        self._reference_ms = record.get("reference_ms")
        done = sum(self._is_done(point, False) for point in self._points)
        self._progress.say(f"going on in {self._out}: {done} of its {len(self._points)} entries are done")


def _asked(strategy: Strategy, budget: Budget | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What tells one point from another, as JSON reads it back."""
    told: dict[str, Any] = json.loads(json.dumps(strategy.identity()))
    return told, {} if budget is None else json.loads(json.dumps(budget.to_json()))


def read_front(directory: str | Path) -> Front:
    """Read the front in a directory of `pareto()`; its networks are read by `load(directory / point.name)`.

    Raises:
        ResultError: There is none, or it is damaged.
    """
    record = read_json(Path(directory) / RECORD)
    if record is None:
        raise ResultError(f"{directory} holds no {RECORD}; was it written by `robustcompress pareto`?")
    return Front.from_json(record)
