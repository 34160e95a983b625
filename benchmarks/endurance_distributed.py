"""Several processes end where one does: every strategy, uninterrupted, killed, and with other numbers of processes.

  equal      batches in 2 parts, by 1 and by 2 processes: the same bits
  near       batches in 4 parts, by 1, 2 and 4 processes: sums are made in another order, so the same kept channels and
             answers, and weights that differ by rounding
  killed     one of 2 processes is ended by SIGKILL in the middle of each run, and torchrun starts both again
  resized    4 processes stop after an epoch, and 2 go on

Usage: python -m benchmarks.endurance_distributed [--quick] [--seed N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
NEAR = 2e-2
"""Largest difference of a weight that sums in another order may make over a run of some twenty steps.

Most runs stay within 1e-5. Now and then a gradient that is nearly zero changes its sign by it, and an attack makes a
whole step of that.
"""

FEWER: dict[str, dict[str, Any]] = {"rcnas": {"evaluations": 4, "finalists": 2, "recovery_steps": 1}}
"""Where a strategy's defaults would take most of the time: the same in all else."""

QUICK = ("grape", "magnitude")
PATIENCE_S = 600.0
"""After so long a run counts as hung."""


def run(*, quick: bool, seed: int) -> dict[str, Any]:
    """Count what held.

    Args:
        quick: Two strategies, no torchrun.
        seed: Of all runs.

    Returns:
        "runs": compressions carried out; "equal" of "compared" ended with the bits of one process; "near" of
        "compared_near" within `NEAR` and with the same channels; "largest_difference" and "median_difference" of a
        weight among these; "kills" processes killed, "killed_equal" of "killed" runs then ended with the same bits;
        "resized_near" of "resized" runs.
    """
    import robustcompress as rc

    names = [name for name in sorted(rc.STRATEGIES) if not quick or name in QUICK]
    with tempfile.TemporaryDirectory(prefix="endurance-") as directory:
        place = Path(directory)
        alone = _carry_out(place / "alone-2", names, seed, parts=2, processes=1)
        pair = _carry_out(place / "pair-2", names, seed, parts=2, processes=2)
        found: dict[str, Any] = {
            "strategies": names,
            "runs": 2 * len(names),
            "compared": len(names),
            "equal": sum(_same(alone, pair, name) for name in names),
        }
        if quick:
            return found
        one = _carry_out(place / "alone-4", names, seed, parts=4, processes=1)
        others = [_carry_out(place / f"{n}-4", names, seed, parts=4, processes=n) for n in (2, 4)]
        distances = {name: max(_distance(one, other, name) for other in others) for name in names}
        found |= {
            "compared_near": len(names),
            "near": sum(distance <= NEAR for distance in distances.values()),
            "distances": distances,
            "largest_difference": max(distances.values()),
            "median_difference": statistics.median(distances.values()),
        }
        killed, kills = _killed(place / "killed", names, seed)
        found |= {"killed": len(names), "kills": kills, "killed_equal": sum(_same(pair, killed, n) for n in names)}
        resized = _resized(place / "resized", names, seed)
        near = [_distance(one, resized, name) <= NEAR for name in names]
        found |= {"resized": len(names), "resized_near": sum(near), "runs": 7 * len(names)}
    return found


Outcome = dict[str, dict[str, Any]]
"""By strategy, its weights, edits and answers."""


def _carry_out(place: Path, names: list[str], seed: int, *, parts: int, processes: int, **more: Any) -> Outcome:
    """Compress with each strategy, in so many processes."""
    place.mkdir(exist_ok=True)
    spec = {"place": str(place), "names": names, "seed": seed, "parts": parts, **more}
    port, started = _free_port(), []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        environment = _environment() | {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in ranks.items()}
        started.append(subprocess.Popen(_worker(spec), cwd=ROOT, env=environment))
    try:
        for process in started:
            if process.wait(PATIENCE_S):
                raise RuntimeError(f"a process of {processes} ended with code {process.returncode}")
    finally:
        for process in started:
            process.kill()
            process.wait()
    return _read(place, names)


def _killed(place: Path, names: list[str], seed: int) -> tuple[Outcome, int]:
    """Have torchrun start two processes, one of which dies once in each run."""
    place.mkdir()
    spec = {"place": str(place), "names": names, "seed": seed, "parts": 2, "checkpoint": True, "kill": True}
    started = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    started += ["--max-restarts", str(2 * len(names)), *_worker(spec)[1:]]
    subprocess.run(started, cwd=ROOT, env=_environment(), check=True, timeout=3 * PATIENCE_S, stderr=subprocess.DEVNULL)
    return _read(place, names), len(list(place.glob("*.killed")))


def _resized(place: Path, names: list[str], seed: int) -> Outcome:
    """Have four processes begin, and two end."""
    _carry_out(place, [], seed, parts=4, processes=4, begin=names, checkpoint=True)
    return _carry_out(place, names, seed, parts=4, processes=2, checkpoint=True)


def _work(spec: dict[str, Any]) -> None:
    """One process of them."""
    import robustcompress as rc
    from robustcompress.distributed import start
    from robustcompress.robust.objectives import PGDAT
    from robustcompress.strategies import make_strategy

    world, place = start(), Path(spec["place"])
    data = rc.load_data("digits", image_size=16, train_limit=128, test_limit=40)

    def compress(name: str, **more: Any) -> rc.CompressResult:
        torch.manual_seed(spec["seed"])
        kept = {"checkpoint": place / f"{name}.checkpoint", "checkpoint_every_s": 0} if spec.get("checkpoint") else {}
        return rc.compress(
            rc.build_model("resnet8", num_classes=10, stem_stride=2)[0],
            make_strategy(name, **FEWER.get(name, {})),
            data=data,
            epochs=2.0,
            objective=PGDAT(steps=1),
            recipe=rc.Recipe(batch_size=32, val_images=13, accumulate=spec["parts"]),
            attacks=("clean", "pgd-3"),
            test_images=40,
            seed=spec["seed"],
            progress=False,
            device="cpu",
            **kept,
            **more,
        )

    for name in spec.get("begin", ()):
        try:
            compress(name, deadline=0)
        except rc.OutOfTime:
            continue
    for name in spec["names"]:
        done = world.broadcast((place / f"{name}.json").is_file())
        if done:
            continue
        if spec.get("kill") and world.rank == 1 and not (place / f"{name}.killed").exists():
            _die_later(place / f"{name}.killed", steps=3)
        result = compress(name)
        if world.first:
            _write(place, name, result)
        world.barrier()


def _die_later(mark: Path, *, steps: int) -> None:
    """Have this process killed after some more steps of training."""
    from robustcompress.train import loop

    listen, left = loop.listen, steps

    def count(world: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        listen(world)

    loop.listen = count  # type: ignore[attr-defined]


def _write(place: Path, name: str, result: Any) -> None:
    from safetensors.torch import save_file

    save_file(result.model.state_dict(), place / f"{name}.safetensors")
    report = result.report.to_json()
    told = {"edits": [edit.to_json() for edit in result.edits], "answers": [a["correct"] for a in report["attacks"]]}
    (place / f"{name}.json").write_text(json.dumps(told))


def _read(place: Path, names: list[str]) -> Outcome:
    from safetensors.torch import load_file

    return {
        name: {"weights": load_file(place / f"{name}.safetensors"), **json.loads((place / f"{name}.json").read_text())}
        for name in names
    }


def _same(a: Outcome, b: Outcome, name: str) -> bool:
    """Bit for bit."""
    return _distance(a, b, name) == 0 and a[name]["answers"] == b[name]["answers"]


def _distance(a: Outcome, b: Outcome, name: str) -> float:
    """Largest difference of a weight; infinite where other channels were kept."""
    if a[name]["edits"] != b[name]["edits"]:
        return float("inf")
    mine, theirs = a[name]["weights"], b[name]["weights"]
    return max(float((mine[key].double() - theirs[key].double()).abs().max()) for key in mine)


def _worker(spec: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.endurance_distributed", "--work", json.dumps(spec)]


def _environment() -> dict[str, str]:
    return dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two strategies, without torchrun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        _work(json.loads(options.work))
        return
    found = run(quick=options.quick, seed=options.seed)
    print(json.dumps(found, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
