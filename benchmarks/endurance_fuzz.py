"""Files from strangers: every reader of the package, fed with damaged and hostile files.

Each case takes a small valid set of files, spoils one of them, and reads it in another process. It must load, or be
refused with one clear `RobustCompressError`, within a few seconds, without more memory than small files can need, and
without running anything that the files hold. All else is a failure: another exception, a hang, a crash, gigabytes.

A case is its reader, its number and the seed:

    python -m benchmarks.endurance_fuzz --replay load:17 --seed 0

shows what was done to the file and what came of it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

from benchmarks import common
from benchmarks.fuzz_readers import READERS
from benchmarks.fuzz_seeds import OWNED, make_seeds
from robustcompress.errors import LONGEST, RobustCompressError

MODULE = "endurance_fuzz"
CASES, QUICK_CASES = 12_000, 520
LIMIT_S = 20.0
"""Seconds of a case; a loaded machine included. Damaged files are refused in milliseconds."""

LIMIT_BYTES = 1 << 30
"""By which the process may grow during a case: the files have kilobytes."""

ROOM = 4 << 30
"""Bytes of addresses that a case may ask for, whether it uses them or not."""

READY = "ready"
LOADED, REFUSED, FAILED = "loaded", "refused", "failed"


def run_case(seeds: Path, reader: str, number: int, seed: int) -> dict[str, Any]:
    """Carry one case out, here.

    Returns:
        "reader", "number", "damage", "verdict", "message", "seconds", "grew" (bytes).
    """
    rng, found = Random(f"{seed}/{reader}/{number}"), READERS[reader]
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        folder = Path(temporary) / "files"
        shutil.copytree(seeds / found.seed, folder)
        damage = found.damage(rng, folder)
        os.chdir(folder)  # a factory in the working directory could be imported
        began, before = time.perf_counter(), _resident()
        try:
            verdict, message = _read(found.read, folder)
        finally:
            os.chdir(here)
        seconds, grew = time.perf_counter() - began, max(0, _resident() - before)
        if (folder / OWNED).exists():
            verdict, message = FAILED, "code of the file was run"
    if verdict != FAILED and grew > LIMIT_BYTES:
        verdict, message = FAILED, f"took {grew / 1e9:.1f} GB: {message}"
    if verdict != FAILED and seconds > LIMIT_S:
        verdict, message = FAILED, f"took {seconds:.0f} s: {message}"
    case = {"reader": reader, "number": number, "damage": damage, "verdict": verdict, "message": message}
    return case | {"seconds": round(seconds, 3), "grew": grew}


def _read(read: Any, folder: Path) -> tuple[str, str]:
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            read(folder)
    except RobustCompressError as error:
        said = str(error)
        clear = 0 < len(said) <= LONGEST + 100 and "Traceback" not in said and said.isprintable() | ("\n" in said)
        return (REFUSED if clear else FAILED), said[:500]
    except BaseException:
        return FAILED, traceback.format_exc(limit=-6)[-3000:]
    return LOADED, ""


def _resident() -> int:
    """Most bytes of memory since the last call, where the system says so."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        Path("/proc/self/clear_refs").write_text("5")
        return peak
    return 0


def _work(channel: Connection, seeds: Path, seed: int) -> None:
    """Answer cases until told to stop; the body of a process."""
    import resource

    import torch

    torch.set_num_threads(1)
    for name in sorted(READERS):  # what is imported on the way is no case's memory
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(seeds / READERS[name].seed, folder, dirs_exist_ok=True)
            verdict, message = _read(READERS[name].read, Path(folder))
            if verdict != LOADED:  # else all that is spoilt would be refused for that
                channel.send(f"{name} does not read a valid file: {message}")
                return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    channel.send(READY)
    while (asked := channel.recv()) is not None:
        channel.send(run_case(seeds, *asked, seed))


class _Worker:
    """A process that is replaced where a case hangs or kills it."""

    def __init__(self, seeds: Path, seed: int) -> None:
        self._seeds, self._seed = seeds, seed
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._channel, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._seeds, self._seed), daemon=True)
        self._process.start()
        theirs.close()
        if (said := self._channel.recv()) != READY:
            raise RuntimeError(said)

    def ask(self, reader: str, number: int) -> dict[str, Any]:
        """The verdict of a case, also where it took the process with it."""
        self._channel.send((reader, number))
        said = f"no answer in {2 * LIMIT_S:.0f} s"
        if self._channel.poll(2 * LIMIT_S):
            try:
                answer: dict[str, Any] = self._channel.recv()
                return answer
            except EOFError:
                self._process.join()
                said = f"the process died ({self._process.exitcode})"
        self.close()
        self._start()
        case = {"reader": reader, "number": number, "damage": "", "verdict": FAILED, "message": said}
        return case | {"seconds": 2 * LIMIT_S, "grew": 0}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._channel.close()


def plan(cases: int) -> list[tuple[str, int]]:
    """Which cases: as many of each reader as its share says, readers in turns."""
    shares = sum(reader.share for reader in READERS.values())
    counts = {name: max(1, round(cases * reader.share / shares)) for name, reader in READERS.items()}
    numbered = [(number / counts[name], name, number) for name in counts for number in range(counts[name])]
    return [(name, number) for _, name, number in sorted(numbered)]


def run(*, quick: bool, seed: int, workers: int | None = None, only: Sequence[str] = ()) -> dict[str, Any]:
    """Carry out all cases.

    Args:
        quick: A twentieth of them.
        seed: Of the damage.
        workers: Processes; as many as there are cores, at most two, where None.
        only: Readers; all by default.

    Returns:
        "cases", "loaded", "refused", "failed", "by_reader", "slowest_s", "largest_growth_mb", and "failures": those
        cases, each with what is needed to replay it.
    """
    count = workers or min(2, os.cpu_count() or 1)
    waiting = deque(item for item in plan(QUICK_CASES if quick else CASES) if not only or item[0] in only)
    done: list[dict[str, Any]] = []
    with _seeds() as seeds:

        def work() -> None:
            worker = _Worker(seeds, seed)
            try:
                while True:
                    try:
                        item = waiting.popleft()
                    except IndexError:
                        return
                    done.append(worker.ask(*item))
            finally:
                worker.close()

        threads = [threading.Thread(target=work) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return summary(done, seed)


@contextmanager
def _seeds() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz-seeds-") as temporary:
        make_seeds(Path(temporary))
        yield Path(temporary)


def summary(done: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """What came of the cases."""
    verdicts = (LOADED, REFUSED, FAILED)
    total = Counter(case["verdict"] for case in done)
    by_reader: dict[str, dict[str, float]] = {}
    for name in READERS:
        own = [case for case in done if case["reader"] == name]
        if own:
            counts = Counter(case["verdict"] for case in own)
            by_reader[name] = {"cases": len(own), **{verdict: counts[verdict] for verdict in verdicts}}
            by_reader[name]["seconds"] = round(sum(case["seconds"] for case in own), 2)
    return {
        "cases": len(done),
        **{verdict: total[verdict] for verdict in verdicts},
        "by_reader": by_reader,
        "slowest_s": max((case["seconds"] for case in done), default=0.0),
        "largest_growth_mb": round(max((case["grew"] for case in done), default=0) / 1e6),
        "failures": [case | {"seed": seed} for case in done if case["verdict"] == FAILED],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or replay one case."""
    parser = common.make_parser(MODULE, __doc__, example=f"python -m benchmarks.{MODULE} --out fuzz.json")
    common.add_out(parser, MODULE)
    parser.add_argument("--workers", type=common.positive, help="processes (default: the cores, at most 2)")
    parser.add_argument("--only", action="append", default=[], choices=sorted(READERS), help="this reader only")
    parser.add_argument("--replay", metavar="READER:NUMBER", help="carry out one case here, and say what happened")
    options = parser.parse_args(argv)
    if options.replay:
        return _replay(options)
    found = run(quick=options.quick, seed=options.seed, workers=options.workers, only=options.only)
    for case in found["failures"]:
        print(f"{case['reader']}:{case['number']} ({case['damage']}): {case['message'].strip().splitlines()[-1]}")
    print(json.dumps({key: value for key, value in found.items() if key != "failures"}, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["failed"] else 0


def _replay(options: argparse.Namespace) -> int:
    reader, _, number = options.replay.rpartition(":")
    with _seeds() as seeds:
        case = run_case(seeds, reader, int(number), options.seed)
    print("\n".join(f"{key}: {value}" for key, value in case.items()))
    return 1 if case["verdict"] == FAILED else 0


if __name__ == "__main__":
    raise SystemExit(main())
