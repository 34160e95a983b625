"""Other ways to fail than a kill: damage, SIGTERM, a disk that is full or read-only, a second process."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.endurance_jobs import digest
from benchmarks.endurance_server import PATIENCE_S, Server, fresh, log_of, standing, went_well
from robustcompress.errors import InputError
from robustcompress.lock import held

STRATEGY = "magnitude"
"""Of the other ways to fail: cheap, with a phase before its cut and one behind it."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a way to fail is tried with.

    Attributes:
        server: Carries jobs out.
        place: Directory for them.
        dice: For the instants.
        times: How often.
        wanted: What is left at the end (see `digest`) where nothing fails.
        length: Seconds that it takes then.
    """

    server: Server
    place: Path
    dice: random.Random
    times: int
    wanted: str
    length: float


def _until_checkpoint(server: Server, directory: Path, steps: int) -> None:
    """Begin a compression and kill it when at least two checkpoints stand."""
    pid = server.begin(directory, "compress", STRATEGY)
    while server.ended(0.001) is None:
        told = standing(directory)
        if told is not None and (directory / "checkpoint" / "checkpoint.before.json").is_file():
            reached = sum(phase["steps"] for phase in told["phases"]) + told["phase"]["done"]
            if reached >= steps:
                os.kill(pid, signal.SIGKILL)
                server.ended(PATIENCE_S)
                return
    raise RuntimeError(f"it was done before it could be killed: {log_of(directory)}")


def _wait(server: Server, directory: Path, ready: Callable[[], bool]) -> None:
    """Wait for something that a job does on its way."""
    while not ready():
        if server.ended(0.001) is not None:
            raise RuntimeError(f"it ended too soon: {log_of(directory)}")


def damaged_newest(case: Case) -> dict[str, int]:
    """The newest checkpoint truncated, changed or gone: the one before it must be used, and the end be the same."""
    counts = {"runs": 0, "noticed": 0, "identical": 0}
    for number in range(case.times):
        directory = fresh(case.place / str(number))
        _until_checkpoint(case.server, directory, case.dice.randrange(2, 12))
        index = directory / "checkpoint" / "checkpoint.json"
        states = [index.parent / item["name"] for item in json.loads(index.read_text())["files"]]
        path = case.dice.choice([index, states[0]])
        held = bytearray(path.read_bytes())
        held[case.dice.randrange(len(held))] ^= 1 << case.dice.randrange(8)
        path.write_bytes(case.dice.choice([bytes(held), bytes(held[: case.dice.randrange(len(held))])]))
        done = case.server.run(directory, "compress", STRATEGY)
        counts["runs"] += 1
        counts["noticed"] += "the newest checkpoint cannot be used" in log_of(directory)
        counts["identical"] += went_well(done, directory) and digest(directory) == case.wanted
    return counts


def sigterm(case: Case) -> dict[str, int]:
    """SIGTERM at a random time: exit code 143 with a checkpoint, and the same end when begun again."""
    counts = {"runs": 0, "exit_143": 0, "identical": 0, "done_before": 0}
    for number in range(case.times):
        directory = fresh(case.place / str(number))
        pid = case.server.begin(directory, "graceful", STRATEGY)
        _wait(case.server, directory, lambda directory=directory: "listening" in log_of(directory))
        if case.server.ended(case.dice.uniform(0, case.length / 2)) is not None:
            counts["done_before"] += 1
            continue
        os.kill(pid, signal.SIGTERM)
        status = case.server.ended(PATIENCE_S)
        counts["runs"] += 1
        counts["exit_143"] += status == 128 + signal.SIGTERM and "goes on from there" in log_of(directory)
        done = case.server.run(directory, "compress", STRATEGY)
        counts["identical"] += went_well(done, directory) and digest(directory) == case.wanted
    return counts


def disk_full(case: Case) -> dict[str, int]:
    """A disk that takes no file of more than some bytes: training goes on to the end, the last checkpoint stands."""
    counts = {"runs": 0, "warned": 0, "kept": 0, "identical": 0}
    for number in range(case.times):
        directory = fresh(case.place / str(number))
        _until_checkpoint(case.server, directory, case.dice.randrange(2, 12))
        stood = standing(directory)
        status = case.server.run(directory, "limited", STRATEGY, size=case.dice.randrange(6_000, 30_000))
        log = log_of(directory)
        counts["runs"] += 1
        counts["warned"] += "training goes on" in log and status == 2 and "could not be written" in log
        counts["kept"] += stood is not None and standing(directory) == stood
        done = case.server.run(directory, "compress", STRATEGY)
        counts["identical"] += went_well(done, directory) and digest(directory) == case.wanted
    return counts


def read_only(case: Case) -> dict[str, int]:
    """The checkpoint's directory becomes read-only while the run lasts: it goes on, and ends the same."""
    counts = {"runs": 0, "warned": 0, "identical": 0}
    for number in range(case.times):
        directory = fresh(case.place / str(number))
        case.server.begin(directory, "humble", STRATEGY)
        _wait(case.server, directory, lambda directory=directory: standing(directory) is not None)
        (directory / "checkpoint").chmod(0o555)
        status = case.server.ended(PATIENCE_S)
        (directory / "checkpoint").chmod(0o755)
        counts["runs"] += 1
        counts["warned"] += log_of(directory).count("training goes on") == 1
        counts["identical"] += went_well(status or 0, directory) and digest(directory) == case.wanted
    return counts


def second_process(case: Case) -> dict[str, int]:
    """A second process on the directory of one that runs is refused at once; of one that was killed, it goes on."""
    counts = {"runs": 0, "refused": 0, "free_after_kill": 0}
    for number in range(case.times):
        directory = fresh(case.place / str(number))
        pid = case.server.begin(directory, "compress", STRATEGY)
        _wait(case.server, directory, lambda directory=directory: standing(directory) is not None)
        counts["runs"] += 1
        try:
            with held(directory / "checkpoint"):
                pass
        except InputError as error:
            counts["refused"] += f"process {pid} on" in str(error)
        os.kill(pid, signal.SIGKILL)
        case.server.ended(PATIENCE_S)
        with held(directory / "checkpoint"):
            counts["free_after_kill"] += 1
    return counts


OTHERS = (damaged_newest, sigterm, disk_full, read_only, second_process)
