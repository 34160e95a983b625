"""Long commands, killed at any instant and begun again until they are done: is the end bit for bit the same?

    python -m benchmarks.endurance_kills --quick

Every registered strategy, AutoAttack, a front of networks and the search for the smallest one run in processes of
their own (`endurance_jobs`), which are killed with SIGKILL at random times over their length, and at random writes:
right when a half-written file appears. Then they are begun again with the same arguments. What they leave at the end is
compared with what one run leaves that nobody killed: weights bit for bit, history without times. Beside that: the
newest checkpoint damaged, SIGTERM, a disk that takes no file of that size, a directory that became read-only, and a
second process on the same directory. All of it lies in memory where there is a file system for that: what a failing
power supply leaves on a disk is not tried here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.endurance_failures import OTHERS, STRATEGY, Case, damaged_newest
from benchmarks.endurance_jobs import digest, strategies
from benchmarks.endurance_server import (
    PATIENCE_S,
    Server,
    fresh,
    in_memory,
    log_of,
    servers_of,
    standing,
    went_well,
    whole,
)

WRITES = 0.4
"""Share of the kills that come with a write; the others come at a random time."""


@dataclass(slots=True)
class Tally:
    """What became of the kills of one job.

    Attributes:
        kills: Processes that were killed.
        in_writes: Those of them that were killed when a half-written file appeared.
        within_epochs: Those that left a checkpoint of the time within an epoch.
        phases: How many left their newest checkpoint in each phase; "" for none yet.
        runs: Runs that were killed and begun again to the end.
        identical: Those of them that ended as one that nobody killed.
    """

    kills: int = 0
    in_writes: int = 0
    within_epochs: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    identical: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def run(*, quick: bool, seed: int, workers: int = 1, kills: int | None = None) -> dict[str, Any]:
    """Kill everything.

    Args:
        quick: A few kills of a few jobs, in seconds.
        seed: Of the instants.
        workers: Jobs that run at a time, each on a core of its own.
        kills: Of each job, a third of it where that is several compressions; by default 30, or 2 of a quick run.

    Returns:
        Counts: "kills", "runs", "identical"; of each strategy, of the other long commands, and of each way to fail.
    """
    began = time.perf_counter()
    names = ["magnitude"] if quick else strategies()
    others = (damaged_newest,) if quick else OTHERS
    wanted_kills = kills or (2 if quick else 30)
    jobs: list[tuple[str, tuple[str, ...]]] = [("compress", (name,)) for name in names]
    if not quick:
        jobs += [("attack", ()), ("front", ()), ("smallest", ())]
    with (
        tempfile.TemporaryDirectory(prefix="endurance-", dir=in_memory()) as temporary,
        servers_of(Path(temporary), workers) as servers,
    ):
        with servers.borrowed() as server:
            wanted, length = whole(server, Path(temporary), "compress", [STRATEGY])

        def carry_out(number: int) -> Any:
            with servers.borrowed() as server:
                directory = Path(temporary) / f"job-{number}"
                dice = random.Random(f"{seed}/{number}")
                if number < len(jobs):
                    job, arguments = jobs[number]
                    few = max(2, wanted_kills // 3)  # of what is several compressions
                    times = few if job in ("front", "smallest") else wanted_kills
                    return killed(server, directory, job, arguments, kills=times, dice=dice)
                case = Case(
                    server, directory, dice, times=1 if quick else min(10, wanted_kills), wanted=wanted, length=length
                )
                return others[number - len(jobs)](case)

        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(carry_out, range(len(jobs) + len(others))))
    tallies: list[Tally] = found[: len(jobs)]
    return {
        "kills": sum(tally.kills for tally in tallies),
        "runs": sum(tally.runs for tally in tallies),
        "identical": sum(tally.identical for tally in tallies),
        "in_writes": sum(tally.in_writes for tally in tallies),
        "by_strategy": {name: tally.to_json() for name, tally in zip(names, tallies, strict=False)},
        "by_command": {job: tally.to_json() for (job, words), tally in zip(jobs, tallies, strict=True) if not words},
        **{other.__name__: counts for other, counts in zip(others, found[len(jobs) :], strict=True)},
        "seconds": round(time.perf_counter() - began, 1),
    }


def killed(
    server: Server, place: Path, job: str, arguments: Sequence[str], *, kills: int, dice: random.Random
) -> Tally:
    """Kill a job again and again, and begin it again each time, until there were so many kills and it is done."""
    wanted, length = whole(server, place, job, arguments)
    tally, number = Tally(), 0
    while tally.kills < kills:
        number += 1
        directory = fresh(place / str(number))
        while tally.kills < kills:
            if _kill_once(server, directory, job, arguments, length, dice, tally):
                break  # it was quicker, and is done
        done = server.run(directory, job, *arguments)
        tally.runs += 1
        tally.identical += went_well(done, directory) and digest(directory) == wanted
        shutil.rmtree(directory)
    return tally


def _kill_once(
    server: Server,
    directory: Path,
    job: str,
    arguments: Sequence[str],
    length: float,
    dice: random.Random,
    tally: Tally,
) -> bool:
    """Begin a job and kill it; returns whether it had ended before."""
    at_write, after = dice.random() < WRITES, dice.uniform(0.0, length)
    writes = dice.randrange(1, 12)
    pid = server.begin(directory, job, *arguments)
    began, seen = time.perf_counter(), set[str]()
    status = None
    while status is None:
        if at_write:
            seen |= _half_written(directory)
        if len(seen) >= writes or (not at_write and time.perf_counter() - began >= after):
            break
        status = server.ended(0.0005 if at_write else 0.005)
        if time.perf_counter() - began > PATIENCE_S:
            raise RuntimeError(f"{job} {arguments} hangs in {directory}: {log_of(directory)}")
    if status is not None:
        return True
    os.kill(pid, signal.SIGKILL)
    status = server.ended(PATIENCE_S)
    if status != -signal.SIGKILL:  # it ended in the same moment
        return True
    tally.kills += 1
    tally.in_writes += at_write
    told = standing(directory)
    phase = told["phase"]["name"] if told else ""
    tally.phases[phase] = tally.phases.get(phase, 0) + 1
    tally.within_epochs += bool(told and "midway" in told["state"])
    return False


def _half_written(directory: Path) -> set[str]:
    """Names, each with its moment, of files that are being written."""
    found = set()
    for _ in range(3):  # a directory that is removed meanwhile ends a search of it
        with contextlib.suppress(OSError):
            for path in [*directory.glob("*/*.part"), *directory.glob("*/.*.tmp")]:
                with contextlib.suppress(OSError):
                    found.add(f"{path.name} {path.stat().st_ctime_ns}")
            break
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, and print the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endurance_kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few kills of a few jobs")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="jobs at a time (default: %(default)s)")
    parser.add_argument("--kills", type=int, metavar="N", help="of each job (default: 30, or 2 of a quick run)")
    options = parser.parse_args(argv)
    counts = run(quick=options.quick, seed=options.seed, workers=options.workers, kills=options.kills)
    print(json.dumps(counts, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
