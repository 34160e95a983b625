"""One cell of a grid: run, judged, and written down as one JSON file; or its failure, which is written down too."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import FORMAT, commit, hardware, read_json, write_text
from benchmarks.grid import Cell
from benchmarks.training_cost import training_cost
from robustcompress import CompressResult, Fixed, OutOfTime, RobustReport, load, machine
from robustcompress.data import DataSplits
from robustcompress.errors import RobustCompressError
from robustcompress.recipe import RunRecipe
from robustcompress.robust import AutoAttackConfig

FAILED = "failed"
STATE = ".state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker needs to run a cell; it can be sent to another process.

    Attributes:
        grid: Name of the grid.
        cell: The cell.
        recipe: Its recipe, as plain data.
        data: Directory of images that stands for the recipe's own; None for that.
        out: Directory of the results.
        command: The command line, for the record.
        state: Directory of what a stopped run goes on from.
        device: Where to compute.
        threads: Torch threads.
        progress: Show progress.
        until: On the clock of `time.time`, when to stop and keep what is there; None for never.
        keep: Leave the trained network in `state` afterwards.
        judge_s: Seconds that judging takes at least: it is not begun when less is left.
        autoattack: Cuts AutoAttack short for a smoke run; None for the standard suite.
    """

    grid: str
    cell: Cell
    recipe: Mapping[str, Any]
    data: str | None
    out: Path
    command: str
    state: Path
    device: str = "cpu"
    threads: int = 1
    progress: bool = False
    until: float | None = None
    keep: bool = False
    judge_s: float = 0.0
    autoattack: AutoAttackConfig | None = None


def run_job(job: Job) -> dict[str, Any]:
    """Run a cell and write its file.

    Returns:
        Its record; or one with the key "error", which is written to `failed/`; or one with the key "stopped" where the
        deadline came first.
    """
    torch.set_num_threads(job.threads)
    failed = job.out / FAILED / f"{job.cell.name}.json"
    try:
        record = measure_cell(job)
    except OutOfTime as stop:
        return {"name": job.cell.name, "stopped": str(stop)}
    except Exception as error:  # whatever it was, the other cells shall go on and the table shall say so
        return note_failure(job.out, job.cell.name, error)
    write_text(job.out / f"{job.cell.name}.json", compact_json(record))
    failed.unlink(missing_ok=True)
    if not job.keep:
        shutil.rmtree(job.state, ignore_errors=True)
    return record


def note_failure(out: Path, name: str, error: BaseException) -> dict[str, Any]:
    """Write down that a cell failed, and where; what it says of places on this machine stays here."""
    said = f"{type(error).__name__}: {error}"
    for place in (out.resolve(), out, Path.cwd(), Path.home()):
        said = said.replace(f"{place}/", "")
    frames = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]
    record = {"format": FORMAT, "name": name, "error": said, "frames": frames[-8:]}
    write_text(out / FAILED / f"{name}.json", json.dumps(record, indent=1) + "\n")
    return record


_DATA: dict[str, DataSplits] = {}
"""Loaded once a process: cells of one grid mostly share their images."""


def data_of(recipe: RunRecipe, directory: str | None) -> DataSplits:
    """The images of a recipe; `directory` stands for a source that is not a named data set."""
    options = dict(recipe.data)
    if directory is not None and options.get("source") not in (None, "digits"):
        options["source"] = directory
    key = json.dumps(options, sort_keys=True)
    if key not in _DATA:
        _DATA[key] = replace(recipe, data=options).load_data()
    return _DATA[key]


_DESCRIBED: dict[int, tuple[DataSplits, dict[str, Any]]] = {}
"""By identity, and held: hashing all images takes seconds."""


def describe_data(data: DataSplits) -> dict[str, Any]:
    """Name, hash and sizes of the images. Of a directory only the last part: where it lies is nobody's business."""
    if id(data) not in _DESCRIBED:
        sizes = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
        _DESCRIBED[id(data)] = (data, {"name": Path(data.name).name, "sha256": data.sha256} | sizes)
    return dict(_DESCRIBED[id(data)][1])


def settings_of(recipe: RunRecipe, data: DataSplits, device: str = "cpu") -> dict[str, Any]:
    """All that a cell's result depends on: two cells with equal settings are the same run.

    Runs on a CPU and on a GPU are not: the precision differs.
    """
    value = recipe.to_json()
    value["data"] = describe_data(data)
    del value["about"], value["training"]["compile"]  # how fast, not what
    return value if torch.device(device).type == "cpu" else value | {"device": torch.device(device).type}


def as_read_today(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an older cell with the keys and options that recipes have been given since, at their defaults.

    So whoever gives anything an option owes it a default that leaves runs as they were.
    """
    aside = {key: settings[key] for key in ("data", "device") if key in settings}
    try:
        recipe = RunRecipe.from_mapping({key: value for key, value in settings.items() if key not in aside})
    except RobustCompressError:  # an option that is gone: whatever that run was, it is none of today's
        return dict(settings)
    value: dict[str, Any] = json.loads(json.dumps(recipe.to_json()))
    del value["about"], value["training"]["compile"]
    return value | aside


def measure_cell(job: Job) -> dict[str, Any]:
    """Compress, attack the test images, and return the record; what was done before a stop is not done again.

    Raises:
        OutOfTime: The deadline came first; a later call with the same state goes on.
    """
    recipe = RunRecipe.from_mapping(job.recipe)
    data = data_of(recipe, job.data)
    job.state.mkdir(parents=True, exist_ok=True)
    cuda = torch.device(job.device).type == "cuda"
    result = _train(job, recipe, data)
    training = _cost(recipe, data, result) | {"seconds": round(_clock(job, "training"), 2)}
    if cuda:
        training["peak_memory_bytes"] = round(_clock(job, "memory"))
    report, curve = _judge(job, recipe, data, result)
    return {
        "format": FORMAT,
        "benchmark": "compare",
        "grid": job.grid,
        "name": job.cell.name,
        "arm": job.cell.arm,
        "labels": dict(job.cell.labels),
        "account": job.cell.account,
        "seed": job.cell.seed,
        "command": job.command,
        "settings": settings_of(recipe, data, job.device),
        "recipe": recipe.to_json(),
        "hardware": hardware(job.threads) | ({"gpu": torch.cuda.get_device_name()} if cuda else {}),
        "versions": machine.versions(),
        "code": commit(),
        "results": {
            "before": result.before.to_json(),
            "after": result.after.to_json(),
            "meets_budget": result.meets_budget,
            "widths": dict(Fixed.of(result).widths),  # what `fixed` needs to take this shape again
            "training": training,
            "evaluation_seconds": round(_clock(job, "evaluation"), 2),
            "report": report.to_json(),
            "curve": curve,
            "history": [dict(entry) for entry in result.history],
        },
    }


def _train(job: Job, recipe: RunRecipe, data: DataSplits) -> CompressResult:
    """The compact network: from where it was saved, or trained, from its last checkpoint on."""
    saved = job.state / "result"
    if saved.is_dir():
        return load(saved)
    with _timed(job, "training"), _on_gpu(job):
        return recipe.run(
            data,
            device=job.device,
            progress=job.progress,
            out=saved,
            checkpoint=job.state / "checkpoint",
            deadline=_left(job),
        )


def _judge(
    job: Job, recipe: RunRecipe, data: DataSplits, result: CompressResult
) -> tuple[RobustReport, list[dict[str, float]]]:
    """Attack the test images; AutoAttack's finished chunks are kept."""
    left = _left(job)
    if left is not None and left < job.judge_s:
        raise OutOfTime(f"trained; judging it takes more than the {left:.0f} s that are left")
    with _timed(job, "evaluation"):
        report = recipe.judge(
            result,
            data,
            device=job.device,
            resume_dir=job.state / "attacks",
            autoattack_config=job.autoattack,
            time_limit_s=None if left is None else max(0.001, left - job.judge_s / 2),
        )
        for found in report.attacks:
            if found.name == "autoattack" and found.n < min(recipe.evaluate.autoattack_images or report.n, report.n):
                raise OutOfTime(f"AutoAttack has judged {found.n} images so far")
        return report, recipe.security_curve(result, data, device=job.device)


def extend(job: Job, record: Mapping[str, Any]) -> str:
    """Judge the trained network of a finished cell with AutoAttack on all test images, and write its file anew.

    The images that were judged before are the first of these, so a longer report takes nothing away from the shorter.

    Returns:
        The accuracy, or how far it came.
    """
    recipe = RunRecipe.from_mapping(job.recipe)
    data = data_of(recipe, job.data)
    result = load(job.state / "result")
    whole = replace(recipe, evaluate=replace(recipe.evaluate, autoattack_images=None))
    try:
        report, _ = _judge(job, whole, data, result)
    except OutOfTime as stop:
        return str(stop)
    results = {**record["results"], "report": report.to_json()}
    results["evaluation_seconds"] = round(_clock(job, "evaluation"), 2)
    write_text(job.out / f"{job.cell.name}.json", compact_json({**record, "results": results}))
    found = report.result("autoattack")
    return f"AutoAttack {100 * found.accuracy:.2f} % of {found.n}"


def _left(job: Job) -> float | None:
    """Seconds until the deadline; None where there is none."""
    return None if job.until is None else max(0.001, job.until - time.time())


@contextlib.contextmanager
def _on_gpu(job: Job) -> Iterator[None]:
    """Train as a GPU likes it, and note the most memory that any piece of the training took."""
    if torch.device(job.device).type != "cuda":
        yield
        return
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # a phase has one shape
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
        most = max(_clock(job, "memory"), torch.cuda.max_memory_allocated())
        write_text(job.state / "memory-so-far", f"{most}")


@contextlib.contextmanager
def _timed(job: Job, what: str) -> Iterator[None]:
    """Add the time that this takes to what it took before a stop."""
    before, start = _clock(job, what), time.perf_counter()
    try:
        yield
    finally:
        write_text(job.state / f"{what}-so-far", f"{before + time.perf_counter() - start}")


def _clock(job: Job, what: str) -> float:
    path = job.state / f"{what}-so-far"
    return float(path.read_text()) if path.is_file() else 0.0


def _cost(recipe: RunRecipe, data: DataSplits, result: CompressResult) -> dict[str, Any]:
    batch = min(recipe.training.batch_size, len(data.train))
    return training_cost(
        result.history,
        batch=batch,
        objective=recipe.objective.to_json(),
        finetune=None if recipe.finetune is None else recipe.finetune.to_json(),
        teacher_macs=result.before.macs,
        probes=min(recipe.training.val_images, len(data.val)),
        scored=result.strategy.get("score_batches", 0) * batch,
    )


def compact_json(record: Mapping[str, Any]) -> str:
    """JSON with one line for every key of the first two levels: short, and still fit for a diff."""

    def line(key: str, value: object, indent: str) -> str:
        return f"{indent}{json.dumps(key)}: {json.dumps(value, allow_nan=False)}"

    lines = []
    for key, value in record.items():
        if key == "results":
            inner = ",\n".join(line(k, v, "  ") for k, v in value.items())
            lines.append(f' "results": {{\n{inner}\n }}')
        else:
            lines.append(line(key, value, " "))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_cells(out: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Records of the finished cells among `names`, by name."""
    return {name: read_json(out / f"{name}.json") for name in names if (out / f"{name}.json").is_file()}


def read_failures(out: Path, names: Iterable[str]) -> dict[str, str]:
    """What went wrong, by cell."""
    paths = {name: out / FAILED / f"{name}.json" for name in names}
    return {name: str(json.loads(path.read_text())["error"]) for name, path in paths.items() if path.is_file()}
