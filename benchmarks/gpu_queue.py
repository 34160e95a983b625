"""The grids at full size, run in order on any CUDA machine, in pieces of minutes.

    python -m benchmarks.gpu_queue --data data/cifar10 --minutes 60

begins where the last call ended: finished cells are skipped, a run that was stopped goes on from its checkpoint, and
AutoAttack from its last finished chunk. First every cell of every grid with AutoAttack on the first 1,000 test images,
then AutoAttack on all of them, for the networks that are still in `--state`. Training is in bf16 and channels_last with
the images on the GPU; passes are compiled where a short measurement says that it pays. After each cell it says
images/s, and which share of the machine's measured peak of bf16 matrix products the passes of the training reach.

`--state` holds what runs go on from. `--carry DIR` leaves a copy at the end that is small enough to carry to another
machine (in files of at most 15 MiB, rounded: the run goes on approximately), and takes it up again at the beginning of
the next call. See `benchmarks/carry.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.carry import check, leave, take_up
from benchmarks.cells import Job, as_read_today, data_of, extend, read_cells, read_failures, run_job, settings_of
from benchmarks.common import RESULTS, ROOT, command, make_parser
from benchmarks.gpu_speed import Speed, known_speed, shapes_of
from benchmarks.grid import Cell, Grid, read_grid, select
from robustcompress.errors import InputError, RobustCompressError
from robustcompress.recipe import RunRecipe, merged
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
RESERVE_S = 20.0
"""Seconds kept back for writing."""
JUDGE_S = 90.0
"""Seconds without which judging is not begun: all test images under PGD-20, and one chunk of AutoAttack."""
CHUNK = 250
"""Images that AutoAttack attacks together: 1,000 and 10,000 are whole chunks, so none is judged twice."""


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
        self.stale: list[str] = []
        if options.carry is not None:
            check(options.carry)
        if not options.list and torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
            raise InputError("device='cuda' cannot be used: there is no GPU; --quick --device cpu is a smoke run")

    def _reserve(self) -> float:
        return 0.0 if self.options.quick else RESERVE_S

    def run(self) -> int:
        """Run what fits into the time."""
        carry = self.options.carry
        if carry is not None and carry.exists():
            for name in take_up(carry, self.state):
                print(f"{name}: taken up from {carry}", file=sys.stderr)
        failures = 0
        try:
            for grid, cell, finished in self._entries():
                print(f"{grid.name} {cell.name} ...", file=sys.stderr, flush=True)
                record = run_job(self._job(grid, cell, finished))
                failures += "error" in record
                print(f"{grid.name} {cell.name}: {self._said(record)}", file=sys.stderr, flush=True)
                if "stopped" in record:
                    break
            else:
                failures += self._extend_all()
        finally:
            if carry is not None:
                size = leave(self.state, carry, self._begun())
                print(f"{carry}: {size / 1e6:.1f} MB to carry", file=sys.stderr)
        self.show(short=True)
        return 1 if failures or self.stale else 0

    def _begun(self) -> list[str]:
        """Runs that are not finished, as paths below the state."""
        names = [(grid, cell.name) for grid in self.grids for cell in grid.cells]
        return [
            f"{grid.name}/{name}"
            for grid, name in names
            if self._state_of(grid, name).is_dir() and not (self.out / grid.name / f"{name}.json").is_file()
        ]

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
                    wanted = settings_of(recipe, data_of(recipe, self.options.data), self.options.device)
                    if wanted != as_read_today(finished[cell.name]["settings"]):
                        self.stale.append(f"{grid.name} {cell.name}")
                        at = out / f"{cell.name}.json"
                        print(f"{at} was made with other settings: move it away to run it anew", file=sys.stderr)
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
        recipe, state = grid.recipe(cell, finished), self._state_of(grid, cell.name)
        compiles = False
        if not (state / "result").is_dir():
            speed = self._measured(recipe)
            steps = (recipe.epochs or 0) * len(data_of(recipe, self.options.data).train) / recipe.training.batch_size
            compiles = speed.compiling_pays(steps, shapes_of(recipe.strategy.to_json()))
        recipe = replace(recipe, training=replace(recipe.training, compile=compiles))
        return Job(
            grid=grid.name,
            cell=cell,
            recipe=recipe.to_json(),
            data=self.options.data,
            out=self.out / grid.name,
            command=command(MODULE, self.argv),
            state=state,
            device=self.options.device,
            threads=torch.get_num_threads(),
            progress=not self.options.quick,
            until=self.until,
            keep=True,
            judge_s=0.0 if self.options.quick else JUDGE_S,
            autoattack=SMOKE_AUTOATTACK if self.options.quick else AutoAttackConfig(chunk_size=CHUNK),
        )

    def _measured(self, recipe: RunRecipe) -> Speed:
        """How fast this machine is, measured once."""
        if self.speed is None:
            self.state.mkdir(parents=True, exist_ok=True)
            self.speed = known_speed(self.state / "speed.json", recipe, self.options.device, quick=self.options.quick)
            print(self.speed, file=sys.stderr, flush=True)
        return self.speed

    def _said(self, record: Mapping[str, Any]) -> str:
        if "stopped" in record:
            return f"stopped in time: {record['stopped']}"
        if "error" in record:
            return f"FAILED: {record['error']}"
        results = record["results"]
        said = ", ".join(f"{a['name']} {100 * a['accuracy']:.2f}" for a in results["report"]["attacks"])
        training = results["training"]
        rate = 2 * training["macs"] / training["seconds"]
        said += f"; {training['images_per_s']:.0f} images/s, {rate / 1e12:.2f} TFLOP/s"
        return said if self.speed is None else f"{said}, {100 * rate / self.speed.peak:.1f} % of the measured peak"

    def _extend_all(self) -> int:
        """AutoAttack on all test images, where the trained network is still there; returns how many failed."""
        failures = 0
        for grid in self.grids:
            cells = {cell.name: cell for cell in _cells(grid, self.options)}
            finished = read_cells(self.out / grid.name, cells)
            for name, record in finished.items():
                attacks = {a["name"]: a["n"] for a in record["results"]["report"]["attacks"]}
                saved = self._state_of(grid, name) / "result"
                if attacks.get("autoattack", 0) == record["results"]["report"]["n"] or not saved.is_dir():
                    continue
                if not self._time_left():
                    return failures
                print(f"{grid.name} {name}: AutoAttack on all test images ...", file=sys.stderr, flush=True)
                try:
                    said = extend(self._job(grid, cells[name], finished), record)
                except (RobustCompressError, RuntimeError) as error:  # the shorter report stands
                    said, failures = f"FAILED: {error}", failures + 1
                print(f"{grid.name} {name}: {said}", file=sys.stderr, flush=True)
        return failures


def _paths(names: Sequence[str]) -> list[Path]:
    return [ROOT / "benchmarks" / "grids" / f"{name}.yaml" for name in names]


def _cells(grid: Grid, options: argparse.Namespace) -> tuple[Cell, ...]:
    return select(grid.cells, options.only) if options.only else grid.cells


def _smoke(grid: Grid, options: argparse.Namespace) -> Grid:
    """The grid itself; for a smoke run with a recipe of seconds, whatever its axes say of model, data and epochs."""
    if not options.quick:
        return grid
    changed = [
        replace(cell, changes={key: value for key, value in cell.changes.items() if key not in SMOKE})
        if cell.matched is None
        else cell
        for cell in grid.cells
    ]
    return replace(grid, base=merged(grid.base, SMOKE), cells=tuple(changed))


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        MODULE, __doc__, example="python -m benchmarks.gpu_queue --data data/cifar10 --minutes 9", cells=True
    )
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
