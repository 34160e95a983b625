"""The grids at full size, run in order on any CUDA machine, in pieces of minutes.

    python -m benchmarks.gpu_queue --data data/cifar10 --minutes 60

begins where the last call ended: finished cells are skipped, a run that was stopped goes on from its checkpoint, and
AutoAttack from its last finished chunk. First every cell of every grid with AutoAttack on the first 1,000 test images,
then AutoAttack on all of them, for the networks that are still in `--state`. Training is in bf16 and channels_last with
the images on the GPU; passes are compiled where a short measurement says that it pays. After each cell it says
images/s, and which share of the machine's measured peak of bf16 matrix products the passes of the training reach.

`--state` holds what runs go on from. A checkpoint of ResNet-18 is 179 MB; `--carry DIR` leaves a copy at the end that
is small enough to carry to another machine (45 MB, in files of at most 15 MiB, rounded: the run goes on approximately),
and takes it up again at the beginning of the next call.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Job, data_of, extend, read_cells, read_failures, run_job, settings_of
from benchmarks.common import RESULTS, ROOT, command, make_parser
from benchmarks.gpu_speed import Speed, measure_speed
from benchmarks.grid import Cell, Grid, read_grid, select
from robustcompress import checkpoint
from robustcompress.errors import InputError, RobustCompressError
from robustcompress.recipe import merged
from robustcompress.robust import AutoAttackConfig

MODULE = "gpu_queue"
QUEUE = ("gpu-short", "gpu-long")
SMOKE: dict[str, Any] = {
    "model": {"name": "resnet8", "width": 0.5, "stem_stride": 4},
    "data": {"source": "digits", "train_limit": 200, "test_limit": 16},
    "objective": {"name": "pgd-at", "steps": 1},
    "epochs": 2,
    "training": {"batch_size": 64},
    "evaluate": {"attacks": ["clean", "pgd-20", "autoattack"], "autoattack_images": 4, "curve": [0.1]},
}
SMOKE_AUTOATTACK = AutoAttackConfig(
    apgd_iterations=2, fab_iterations=2, square_queries=5, target_classes=2, chunk_size=4
)
RESERVE_S = 15.0
"""Seconds kept back for writing."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.quick and (options.out is None or options.state is None):
        raise SystemExit("--quick gives no figure worth keeping: say --out DIR and --state DIR")
    try:
        queue = Queue(options, argv)
        if options.list:
            queue.show()
            return 0
        return queue.run()
    except RobustCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class Queue:
    """The ordered cells, and what is finished of them."""

    def __init__(self, options: argparse.Namespace, argv: Sequence[str]) -> None:
        self.options, self.argv = options, argv
        self.out = Path(options.out or RESULTS)
        self.state = Path(options.state or ROOT / "runs" / MODULE)
        self.until = None if options.minutes is None else time.time() + 60 * options.minutes - self._reserve()
        self.grids = [_smoke(read_grid(p), options) for p in _paths(options.grids)]
        self.speed: Speed | None = None
        if not options.list and torch.device(options.device).type == "cuda":
            if not torch.cuda.is_available():
                raise InputError("device='cuda' cannot be used: there is no GPU; --quick --device cpu is a smoke run")
            torch.backends.cudnn.benchmark = True  # every phase has one shape

    def _reserve(self) -> float:
        return 0.0 if self.options.quick else RESERVE_S

    def run(self) -> int:
        """Run what fits into the time."""
        if self.options.carry is not None:
            self._take_up()
        failures = 0
        for grid, cell, finished in self._entries():
            job = self._job(grid, cell, finished)
            print(f"{grid.name} {cell.name} ...", file=sys.stderr, flush=True)
            record = run_job(job)
            if "stopped" in record:
                print(f"{grid.name} {cell.name}: stopped in time: {record['stopped']}", file=sys.stderr, flush=True)
                break
            failures += "error" in record
            print(self._said(grid, record), file=sys.stderr, flush=True)
        else:
            self._extend_all()
        self._leave()
        self.show(short=True)
        return 1 if failures else 0

    def show(self, *, short: bool = False) -> None:
        """List every cell and its state."""
        for grid in self.grids:
            cells = _cells(grid, self.options)
            names = [cell.name for cell in cells]
            finished = read_cells(self.out / grid.name, names)
            failed = read_failures(self.out / grid.name, names)
            if not short:
                for name in names:
                    found = "finished" if name in finished else f"failed: {failed[name]}" if name in failed else "-"
                    begun = " (begun)" if found == "-" and self._state_of(grid, name).is_dir() else ""
                    print(f"{grid.name} {name}: {found}{begun}")
            print(f"{grid.name}: {len(finished)} of {len(names)} cells finished, {len(failed)} failed", flush=True)

    def _entries(self) -> Iterator[tuple[Grid, Cell, dict[str, dict[str, Any]]]]:
        """Cells to run, in order; those whose parents failed are left out."""
        for grid in self.grids:
            cells = _cells(grid, self.options)
            out = self.out / grid.name
            finished = read_cells(out, [cell.name for cell in cells])
            for cell in cells:
                if not all(parent in finished for parent in cell.parents):
                    continue
                if cell.name in finished:
                    recipe = grid.recipe(cell, finished)
                    there = finished[cell.name]["settings"]
                    if settings_of(recipe, data_of(recipe, self.options.data)) != there:
                        at = out / f"{cell.name}.json"
                        raise InputError(f"{at} was made with other settings: move it away, or choose another --out")
                    continue
                if not self._time_left():
                    return
                yield grid, cell, finished
                finished |= read_cells(out, [cell.name])

    def _time_left(self) -> bool:
        return self.until is None or time.time() < self.until

    def _state_of(self, grid: Grid, name: str) -> Path:
        return self.state / grid.name / name

    def _job(self, grid: Grid, cell: Cell, finished: Mapping[str, Mapping[str, Any]]) -> Job:
        recipe = grid.recipe(cell, finished)
        if self.speed is None:
            self.speed = measure_speed(recipe, self.options.device, quick=self.options.quick)
            print(self.speed, file=sys.stderr, flush=True)
        steps = (recipe.epochs or 30) * len(data_of(recipe, self.options.data).train) / recipe.training.batch_size
        recipe = replace(recipe, training=replace(recipe.training, compile=self.speed.compiling_pays(steps)))
        return Job(
            grid=grid.name,
            cell=cell,
            recipe=recipe.to_json(),
            data=self.options.data,
            out=self.out / grid.name,
            command=command(MODULE, self.argv),
            state=self._state_of(grid, cell.name),
            device=self.options.device,
            threads=torch.get_num_threads(),
            progress=not self.options.quick,
            until=self.until,
            keep=True,
            autoattack=SMOKE_AUTOATTACK if self.options.quick else AutoAttackConfig(chunk_size=500),
        )

    def _said(self, grid: Grid, record: Mapping[str, Any]) -> str:
        if "error" in record:
            return f"{grid.name} {record['name']}: FAILED: {record['error']}"
        results = record["results"]
        accuracies = ", ".join(f"{a['name']} {100 * a['accuracy']:.2f}" for a in results["report"]["attacks"])
        training = results["training"]
        rate = 2 * training["macs"] / training["seconds"]
        assert self.speed is not None
        return (
            f"{grid.name} {record['name']}: {accuracies}; {training['images_per_s']:.0f} images/s, "
            f"{rate / 1e12:.2f} TFLOP/s, {100 * rate / self.speed.peak:.1f} % of the measured peak"
        )

    def _extend_all(self) -> None:
        """AutoAttack on all test images, where the trained network is still there."""
        for grid in self.grids:
            cells = {cell.name: cell for cell in _cells(grid, self.options)}
            finished = read_cells(self.out / grid.name, cells)
            for name, record in finished.items():
                attacks = {a["name"]: a["n"] for a in record["results"]["report"]["attacks"]}
                saved = self._state_of(grid, name) / "result"
                if attacks.get("autoattack", 0) == record["results"]["report"]["n"] or not saved.is_dir():
                    continue
                if not self._time_left():
                    return
                print(f"{grid.name} {name}: AutoAttack on all test images ...", file=sys.stderr, flush=True)
                job = self._job(grid, cells[name], finished)
                said = extend(job, record)
                print(f"{grid.name} {name}: {said}", file=sys.stderr, flush=True)

    def _take_up(self) -> None:
        """Put carried checkpoints where runs look for them."""
        for path in sorted(Path(self.options.carry).glob("*/*/checkpoint")):
            target = self.state / path.relative_to(self.options.carry)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(path, target)

    def _leave(self) -> None:
        """Leave small copies of unfinished checkpoints."""
        if self.options.carry is None:
            return
        carry = Path(self.options.carry)
        shutil.rmtree(carry, ignore_errors=True)
        for path in sorted(self.state.glob("*/*/checkpoint")):
            target = carry / path.relative_to(self.state)
            target.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.shrink(path, target)
            print(f"{target}: {sum(f.stat().st_size for f in target.iterdir()) / 1e6:.1f} MB", file=sys.stderr)


def _paths(names: Sequence[str]) -> list[Path]:
    return [ROOT / "benchmarks" / "grids" / f"{name}.yaml" for name in names]


def _cells(grid: Grid, options: argparse.Namespace) -> tuple[Cell, ...]:
    return select(grid.cells, options.only) if options.only else grid.cells


def _smoke(grid: Grid, options: argparse.Namespace) -> Grid:
    """The grid itself; for a smoke run with a recipe of seconds."""
    return replace(grid, base=merged(grid.base, SMOKE)) if options.quick else grid


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.gpu_queue --data data/cifar10 --minutes 9")
    add = parser.add_argument
    add("--grids", nargs="+", default=list(QUEUE), help=f"grids to run, in order (default: {' '.join(QUEUE)})")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="only cells of these names, and their parents")
    add("--minutes", type=float, metavar="M", help="stop within so many minutes; the next call goes on")
    add("--data", metavar="DIR", help="directory of images that stands for the recipe's own")
    add("--out", type=Path, help=f"where a directory a grid is left (default: {RESULTS.relative_to(ROOT)})")
    add("--state", type=Path, help=f"what stopped runs go on from (default: runs/{MODULE})")
    add("--carry", type=Path, metavar="DIR", help="take small checkpoints from here, and leave them here at the end")
    add("--device", default="cuda", help="default: %(default)s")
    add("--list", action="store_true", help="only list the cells and what became of them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
