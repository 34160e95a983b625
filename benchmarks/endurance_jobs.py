"""What the kill suite kills: small runs in processes of their own, forked from one that has imported everything.

    python -m benchmarks.endurance_jobs

reads one job a line on standard input, as JSON; answers with a line that says the child's number, and with another one
that says how it ended: `{"pid": 12}`, then `{"status": -9}`. A child is a process like any other, but that it need not
import torch, which would take ten times as long as what it does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

import robustcompress as rc
from robustcompress.cli import main as command_line
from robustcompress.data import DataSplits
from robustcompress.result import HISTORY, WEIGHTS
from robustcompress.robust import AutoAttackConfig
from robustcompress.robust.objectives import PGDAT
from robustcompress.strategies import make_strategy

MODEL = rc.ModelSpec("resnet8", {"num_classes": 10, "width": 0.5, "stem_stride": 2})
RECIPE = rc.Recipe(batch_size=16, val_images=16)
SMALL = AutoAttackConfig(apgd_iterations=10, fab_iterations=4, square_queries=20, target_classes=2, chunk_size=4)
OPTIONS: dict[str, dict[str, Any]] = {
    "rcnas": {"evaluations": 6, "batch": 2, "finalists": 1, "recovery_steps": 1, "searcher": "random", "alpha": 1.0}
}
"""Of strategies whose defaults are a search of minutes."""
VARYING = ("images_per_s",)


def strategies() -> list[str]:
    """All that are registered: a new one is killed by being there."""
    return sorted(rc.STRATEGIES)


@functools.cache
def data() -> DataSplits:
    """Real digits: 115 to train on, 13 to validate, 20 to test."""
    return rc.load_data("digits", image_size=16, train_limit=128, test_limit=20)


def compress(strategy: str, directory: Path, *, every_s: float = 0.0, epochs: float = 3.0, **also: Any) -> None:
    """One compression, with a checkpoint beside its result; nothing where the result is there."""
    if (directory / "out").exists():
        return
    rc.compress(
        MODEL,
        make_strategy(strategy, **OPTIONS.get(strategy, {})),
        data=data(),
        epochs=epochs,
        objective=PGDAT(steps=1),
        recipe=RECIPE,
        attacks=("clean",),
        device="cpu",
        out=directory / "out",
        checkpoint=directory / "checkpoint",
        checkpoint_every_s=every_s,
        **also,
    )


def graceful(strategy: str, directory: Path) -> int:
    """A compression that listens to signals."""
    try:
        with rc.graceful():
            print("listening", file=sys.stderr, flush=True)
            compress(strategy, directory)
    except rc.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    return 0


def limited(strategy: str, directory: Path, *, size: int) -> None:
    """A compression whose files may not grow beyond `size` bytes: a disk that is full."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    compress(strategy, directory)


def humble(strategy: str, directory: Path) -> None:
    """A compression without root's right to write where nobody may."""
    drop_capabilities()
    compress(strategy, directory)


def drop_capabilities() -> None:
    """Give up what lets root pass over permissions; where there is nothing to give up, do nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))


def attack(directory: Path) -> None:
    """AutoAttack on an untrained network, in chunks that are kept."""
    torch.manual_seed(0)
    report = rc.evaluate(
        MODEL.build().eval(),
        data().test,
        rc.ThreatModel("linf", 0.02),
        attacks=("clean", "autoattack"),
        device="cpu",
        resume_dir=directory / "chunks",
        autoattack_config=SMALL,
    )
    found = report.result("autoattack")
    told = {"correct": found.correct.tolist(), "broken_by": found.broken_by, "furthest": found.max_perturbation}
    part = directory / "report.json.part"
    part.write_text(json.dumps(told))
    part.replace(directory / "report.json")


SEVERAL: dict[str, Any] = {
    "threat": rc.ThreatModel("linf", 0.02),
    "objective": PGDAT(steps=1),
    "epochs": 2.0,
    "recipe": RECIPE,
    "device": "cpu",
    "checkpoint_every_s": 0.0,
}


def front(directory: Path) -> None:
    """A reference and two sizes, into one directory."""
    settings = SEVERAL | {"attacks": ("clean", "pgd-2"), "budgets": (0.5, 0.75), "picture": ""}
    rc.pareto(MODEL, "magnitude", out=directory / "front", data=data(), **settings)


def smallest(directory: Path) -> None:
    """The smallest network that keeps an accuracy: up to three compressions."""
    if (directory / "out").exists():
        return
    demand = rc.MinRobust(0.01, attack="pgd-2", trials=2, images=13)
    places = {"out": directory / "out", "checkpoint": directory / "checkpoint"}
    budget = rc.Budget(min_robust=demand)
    rc.compress(MODEL, "magnitude", data=data(), budget=budget, attacks=("clean",), **places, **SEVERAL)


def shell(*words: str, directory: Path) -> int:
    """A command of the command line, in `directory`."""
    os.chdir(directory)
    return command_line(words)


def digest(directory: Path) -> str:
    """What a job has made, without times: bit for bit the same of every run, however often it was killed."""
    made = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.name == WEIGHTS or path.name == "report.json":
            made.update(path.relative_to(directory).as_posix().encode() + path.read_bytes())
        if path.name == HISTORY:
            for line in path.read_text().splitlines():
                record = {key: value for key, value in json.loads(line).items() if key not in VARYING}
                made.update(json.dumps(record, sort_keys=True).encode())
        if path.name == "pareto.json":
            for point in json.loads(path.read_text())["points"]:
                told = {key: point[key] for key in ("name", "macs", "params", "accuracies")}
                made.update(json.dumps(told, sort_keys=True).encode())
    return made.hexdigest()


JOBS = {
    **{job.__name__: job for job in (compress, graceful, limited, humble)},
    **{job.__name__: job for job in (attack, front, smallest)},
    "shell": shell,
}


def child(job: dict[str, Any]) -> None:
    """Carry a job out in this process, which ends with it."""
    code = 1
    try:
        directory = Path(job["directory"])
        log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        done = JOBS[job["job"]](*job["arguments"], directory=directory, **job["settings"])  # type: ignore[operator]
        code = int(done or 0)
    except rc.RobustCompressError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> int:
    """Answer jobs until standard input ends."""
    import rich.progress  # noqa: F401 - what a child would import
    import safetensors.torch  # noqa: F401

    torch.set_num_threads(1)
    data()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(serve())
