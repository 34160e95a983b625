"""Processes to kill: a server that forks one child after the other, and what is read of what they leave."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.endurance_jobs import digest

ROOT = Path(__file__).parents[1]
PATIENCE_S = 300.0
"""After so long a run that nobody kills hangs."""


class Server:
    """A process that forks one child after the other.

    Args:
        log: Where it says what goes wrong with itself.
    """

    def __init__(self, log: IO[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.endurance_jobs"]
        place = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": place}
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": log,
            "text": True,
            "start_new_session": True,
        }
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def begin(self, directory: Path, job: str, *arguments: str, **settings: Any) -> int:
        """Start a job; return its process number."""
        assert self._process.stdin is not None
        told = {"directory": str(directory), "job": job, "arguments": arguments, "settings": settings}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return int(self._answer()["pid"])

    def ended(self, timeout: float) -> int | None:
        """How the child ended: its exit code, or minus the signal; None where it still runs after `timeout` seconds."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            return None
        return int(self._answer()["status"])

    def run(self, directory: Path, job: str, *arguments: str, **settings: Any) -> int:
        """Start a job and wait for its end."""
        self.begin(directory, job, *arguments, **settings)
        status = self.ended(PATIENCE_S)
        if status is None:
            raise RuntimeError(f"{job} {arguments} hangs in {directory}")
        return status

    def kill(self) -> None:
        """End it at once, with its child."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the server of jobs died")
        answer: dict[str, Any] = json.loads(line)
        return answer


def in_memory() -> str | None:
    """Where files lie in memory; None where there is no such place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Servers:
    """One server for each worker."""

    def __init__(self, directory: Path, workers: int) -> None:
        self._log = (directory / "servers.log").open("w")
        self._free = [Server(self._log) for _ in range(workers)]

    @contextmanager
    def borrowed(self) -> Iterator[Server]:
        """One that nobody else uses meanwhile."""
        server = self._free.pop()
        try:
            yield server
        except BaseException:  # its child may still run, and its answers would be taken for those of the next one
            server.kill()
            server = Server(self._log)
            raise
        finally:
            self._free.append(server)

    def close(self) -> None:
        """End them all."""
        for server in self._free:
            server.close()
        self._log.close()


@contextmanager
def servers_of(directory: Path, workers: int) -> Iterator[Servers]:
    servers = Servers(directory, workers)
    try:
        yield servers
    finally:
        servers.close()


def whole(server: Server, place: Path, job: str, arguments: Sequence[str]) -> tuple[str, float]:
    """What a job leaves that nobody kills, and the seconds that it takes."""
    directory = fresh(place / "whole")
    at = time.perf_counter()
    done = server.run(directory, job, *arguments)
    seconds = time.perf_counter() - at
    if done != 0:
        raise RuntimeError(f"{job} {arguments} ends with {done}: {log_of(directory)}")
    made = digest(directory)
    shutil.rmtree(directory)
    return made, seconds


def standing(directory: Path) -> dict[str, Any] | None:
    """What the newest checkpoint says of itself."""
    try:
        record: dict[str, Any] = json.loads((directory / "checkpoint" / "checkpoint.json").read_text())["record"]
    except (OSError, ValueError, KeyError):
        return None
    return record


def fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def log_of(directory: Path) -> str:
    path = directory / "log"
    return " ".join(path.read_text(errors="replace").split()) if path.is_file() else ""


def went_well(status: int, directory: Path) -> bool:
    if status != 0:
        print(f"{directory} ended with {status}: {log_of(directory)[-2000:]}", file=sys.stderr)
    return status == 0
