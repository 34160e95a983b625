"""Strategies and controls compared over a declared grid: budgets, seeds, equal epochs and equal training compute.

A grid is a YAML file under `benchmarks/grids/` (see `benchmarks/grid.py`). Each of its cells is a run of a recipe, and
leaves one JSON file with everything: recipe, seeds, hardware, versions, hash of the data, costs, history, clean, PGD-20
and AutoAttack accuracy with the flag of every image, wall time, images/s and the multiply-adds of the whole training.
Cells that are there with the same settings are skipped, so a killed run goes on where it was; a cell that failed is
listed and tried again. Within a seed all arms begin with the same reference weights; data, validation split and test
images are the same for all cells. Selection looks at the validation split alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from benchmarks.cells import (
    STATE,
    Job,
    as_read_today,
    data_of,
    note_failure,
    read_cells,
    read_failures,
    run_job,
    settings_of,
)
from benchmarks.common import RESULTS, ROOT, command, make_parser, positive
from benchmarks.grid import Cell, Grid, read_grid, select
from robustcompress.errors import RobustCompressError
from robustcompress.recipe import RunRecipe
from robustcompress.robust import AutoAttackConfig

MODULE = "compare"
QUICK = {
    "epochs": 1,
    "evaluate": {"attacks": ["clean", "pgd-20", "autoattack"], "images": 16, "autoattack_images": 4, "curve": [0.1]},
}
QUICK_AUTOATTACK = AutoAttackConfig(apgd_iterations=2, fab_iterations=2, square_queries=5, target_classes=2)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    try:
        grid = read_grid(options.grid)
        cells = select(grid.cells, options.only)
    except RobustCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.quick and options.out is None:
        raise SystemExit("--quick gives no figure worth keeping: say --out DIR, so that no committed result is lost")
    out = options.out or RESULTS / grid.name
    if options.list:
        _list(grid, cells, out)
        return 0
    try:
        return _Scheduler(grid, cells, options, argv, out).run()
    except RobustCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class _Scheduler:
    """Gives cells to worker processes, parents before children."""

    def __init__(
        self, grid: Grid, cells: Sequence[Cell], options: argparse.Namespace, argv: Sequence[str], out: Path
    ) -> None:
        self.grid, self.cells, self.options, self.argv, self.out = grid, list(cells), options, argv, out
        self.finished: dict[str, Mapping[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.stale: list[str] = []
        self.ran = self.stopped = 0
        self.start = time.monotonic()
        minutes = options.minutes
        self.until = None if minutes is None else time.time() + 60 * minutes

    def run(self) -> int:
        there = read_cells(self.out, [cell.name for cell in self.cells])
        waiting = self._adopt(list(self.cells), there)
        while self._time_left() and self._next(waiting) is not None:
            waiting = self._work(waiting, there)
        return self._close(waiting)

    def _work(self, waiting: list[Cell], there: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
        """Run cells until none is left that can run, the time is over, or a worker dies; returns those that wait."""
        running: dict[Future[dict[str, Any]], Cell] = {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.options.workers, mp_context=context, initializer=_die_with_parent) as pool:
            while True:
                while len(running) < self.options.workers and self._time_left() and (cell := self._next(waiting)):
                    waiting.remove(cell)
                    running[pool.submit(run_job, self._job(cell))] = cell
                if not running:
                    return waiting
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    cell = running.pop(future)
                    try:
                        record = future.result()
                    except BrokenProcessPool:  # nobody can say whose process it was that died
                        for lost in (cell, *running.values()):
                            died = RuntimeError("a worker process was killed (too little memory?)")
                            self._note(lost, note_failure(self.out, lost.name, died), len(waiting))
                        return waiting
                    self._note(cell, record, len(waiting) + len(running))
                waiting = self._adopt(waiting, there)

    def _adopt(self, waiting: list[Cell], there: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
        """Take over cells that were finished before with the settings they would have now."""
        left = []
        for cell in waiting:
            if cell.name in there and all(parent in self.finished for parent in cell.parents):
                recipe = self._recipe(cell)
                if settings_of(recipe, data_of(recipe, self.options.data), self.options.device) == as_read_today(
                    there[cell.name]["settings"]
                ):
                    self.finished[cell.name] = there[cell.name]
                    continue
                if not self.options.overwrite:
                    self.stale.append(cell.name)
                    continue
            left.append(cell)
        return left

    def _next(self, waiting: Sequence[Cell]) -> Cell | None:
        for cell in waiting:
            if all(parent in self.finished for parent in cell.parents):
                return cell
        return None

    def _recipe(self, cell: Cell) -> RunRecipe:
        recipe = self.grid.recipe(cell, self.finished)
        if not self.options.quick:
            return recipe
        return RunRecipe.from_mapping(recipe.to_json() | QUICK)

    def _job(self, cell: Cell) -> Job:
        return Job(
            grid=self.grid.name,
            cell=cell,
            recipe=self._recipe(cell).to_json(),
            data=self.options.data,
            out=self.out,
            state=self.out / STATE / cell.name,
            command=command(MODULE, self.argv),
            device=self.options.device,
            threads=self.options.threads,
            until=self.until,
            autoattack=QUICK_AUTOATTACK if self.options.quick else AutoAttackConfig(chunk_size=64),
        )

    def _time_left(self) -> bool:
        return self.until is None or time.time() < self.until

    def _note(self, cell: Cell, record: Mapping[str, Any], left: int) -> None:
        minutes = (time.monotonic() - self.start) / 60
        at = f"[{minutes:5.1f} min, {left} left]"
        if "stopped" in record:
            print(f"{at} {cell.name}: stopped in time: {record['stopped']}", file=sys.stderr, flush=True)
            self.stopped += 1
            return
        if "error" in record:
            self.failed[cell.name] = record["error"]
            self.ran += 1
            print(f"{at} {cell.name}: FAILED: {record['error']}", file=sys.stderr, flush=True)
            return
        self.finished[cell.name] = record
        self.ran += 1
        accuracies = ", ".join(
            f"{attack['name']} {100 * attack['accuracy']:.1f}" for attack in record["results"]["report"]["attacks"]
        )
        print(f"{at} {cell.name}: {accuracies}", file=sys.stderr, flush=True)

    def _close(self, waiting: Sequence[Cell]) -> int:
        for name, error in self.failed.items():
            print(f"failed: {name}: {error}", file=sys.stderr)
        if self.stale:
            print(
                f"results with other settings are there: {', '.join(self.stale)}; choose another --out, or pass "
                "--overwrite",
                file=sys.stderr,
            )
        print(
            f"{len(self.finished)} of {len(self.cells)} cells are finished, {self.ran} of them ran now; "
            f"{len(waiting) + self.stopped} wait. Tables and plots: python -m benchmarks.report",
            file=sys.stderr,
        )
        return 1 if self.failed or self.stale else 0


def _die_with_parent() -> None:
    """End a worker whose scheduler was killed: nobody would know of it, and its cell would run twice."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _list(grid: Grid, cells: Sequence[Cell], out: Path) -> None:
    finished, failed = read_cells(out, [c.name for c in cells]), read_failures(out, [c.name for c in cells])
    for cell in cells:
        state = "finished" if cell.name in finished else f"failed: {failed[cell.name]}" if cell.name in failed else "-"
        after = f" (after {', '.join(cell.parents)})" if cell.parents else ""
        print(f"{cell.name}{after}: {state}")
    print(f"{grid.name}: {len(finished)} of {len(cells)} cells finished")


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        MODULE, __doc__, example="python -m benchmarks.compare benchmarks/grids/digits.yaml --workers 2", cells=True
    )
    add = parser.add_argument
    add("grid", type=Path, help=f"a grid, such as {Path('benchmarks/grids/digits.yaml')}")
    add("--data", metavar="DIR", help="directory of images that stands for the recipe's own")
    add("--out", type=Path, help=f"directory of the cells (default: {RESULTS.relative_to(ROOT)}/GRID)")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="only cells of these names, and their parents")
    add("--workers", type=positive, default=1, help="cells at a time, each in a process (default: %(default)s)")
    add("--minutes", type=float, metavar="M", help="stop after so many minutes; a later call goes on")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace cells that were made with other settings")
    add("--list", action="store_true", help="only list the cells and what became of them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
