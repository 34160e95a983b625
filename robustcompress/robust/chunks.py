"""AutoAttack over many images: in chunks that are kept, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.distributed import ALONE, World
from robustcompress.errors import ResultError
from robustcompress.interrupt import listen, stop_if_asked
from robustcompress.robust.autoattack import AutoAttackConfig, Suite, attack_once, suite_for, version
from robustcompress.robust.judge import Judge, hash_of
from robustcompress.robust.kept import Kept
from robustcompress.robust.memory import memory_of_all
from robustcompress.robust.report import AttackResult

CHUNK, GPU_CHUNK, TIMED_CHUNK = 64, 128, 16
"""Images that are attacked together where nobody says otherwise: on the CPU, on a GPU, and under a time limit, which is
looked at after each. So many images at least are needed to keep each of several processes busy."""


def autoattack_in_chunks(
    judge: Judge,
    clean: Tensor,
    *,
    num_classes: int,
    config: AutoAttackConfig,
    time_limit_s: float | None,
    resume_dir: Path | None,
    warn: Callable[[str], None] = lambda line: None,
) -> AttackResult:
    """Judge the first images with AutoAttack.

    Each attack of the cascade takes what all before it left standing, packed into full chunks anew: the price falls
    with what is broken, and batches stay full. Under a time limit one chunk after another goes through the whole
    cascade, so that something is known of the first images whenever time ends.

    Args:
        judge: The evaluation this is part of.
        clean: Flags of those images without an attack, bool [n].
        num_classes: Number of logits.
        config: What to change of the standard.
        time_limit_s: Start no chunk that would not end in time, going by the slowest so far; but run one at least.
        resume_dir: Where finished chunks are kept, a JSON file for each attack of each, and found again; each process
            keeps its own.
        warn: Told once where they cannot be kept; the attack goes on.

    Returns:
        Flags of as many images as the time allowed.

    Raises:
        InputError: `resume_dir` cannot be made, or is not a directory.
    """
    cascade = _Cascade(
        judge=judge,
        clean=clean,
        num_classes=num_classes,
        config=config,
        size=chunk_size(judge, config, timed=time_limit_s is not None),
        kept=Kept(resume_dir, warn),
        model_sha256=None if resume_dir is None else model_sha256(judge.model),
        timed=time_limit_s is not None,
    )
    if time_limit_s is None:
        return cascade.run(0, len(clean), judge.world)
    return _in_time(cascade, time_limit_s)


def chunk_size(judge: Judge, config: AutoAttackConfig, *, timed: bool) -> int:
    """How many images are attacked together; not a question of how many processes there are, as the answers are not."""
    usual = TIMED_CHUNK if timed else GPU_CHUNK if judge.device.type == "cuda" else CHUNK
    return min(config.chunk_size or usual, judge.batch_size)


def _in_time(cascade: _Cascade, time_limit_s: float) -> AttackResult:
    """Put chunk after chunk through the cascade while there is time; as many at once as there are processes.

    What is known already is taken however late it is.
    """
    judge, world, total = cascade.judge, cascade.judge.world, len(cascade.clean)
    began, slowest = time.perf_counter(), 0.0
    found: list[AttackResult] = []
    for first in range(0, total, cascade.size * world.size):
        at = first + cascade.size * world.rank
        end, mine = min(at + cascade.size, total), None
        missing = world.any(at < total and not cascade.knows(at, end))
        late = bool(slowest) and time.perf_counter() - began + slowest > time_limit_s
        if missing and world.broadcast(late):
            break
        if missing and world.size > 1:  # alone, the cascade itself listens
            listen(world)
            stop_if_asked(f"stopped after {first} of {total} images of AutoAttack{cascade.kept}")
        since = time.perf_counter()
        with memory_of_all(world):
            if at < total:
                mine = cascade.run(at, end, ALONE if world.size > 1 else world).to_json()
        row: list[Any] = [time.perf_counter() - since, mine]
        told = world.gather(row)
        slowest = max(slowest, *(float(seconds) for seconds, _ in told)) if missing else slowest
        found += [AttackResult.from_json(part) for _, part in told if part is not None]
        judge.report("autoattack", torch.cat([part.correct for part in found]), total, began)
    severity = judge.no_mistakes()
    for part in found:
        severity = None if severity is None or part.severity is None else severity + part.severity
    return AttackResult(
        name="autoattack",
        correct=torch.cat([part.correct for part in found]),
        seconds=sum(part.seconds for part in found),
        max_perturbation=max(part.max_perturbation for part in found),
        suite=cascade.suite.name,
        broken_by={name: sum(part.broken_by[name] for part in found) for name in cascade.suite.attacks},
        severity=severity,
    )


@dataclass(slots=True, kw_only=True)
class _Cascade:
    """AutoAttack as one evaluation asks for it.

    Attributes:
        judge: The evaluation.
        clean: Flags without an attack, bool [n], of all images that may be judged.
        num_classes: Number of logits.
        config: What to change of the standard.
        size: Images attacked together.
        kept: Where what is finished is kept.
        model_sha256: Of the model, where anything is kept.
        timed: Whether it goes through the images in parts: then whoever does it tells of progress.
    """

    judge: Judge
    clean: Tensor
    num_classes: int
    config: AutoAttackConfig
    size: int
    kept: Kept
    model_sha256: str | None
    timed: bool

    @property
    def suite(self) -> Suite:
        """The attacks."""
        return suite_for(self.num_classes, self.config)

    def run(self, first: int, last: int, world: World) -> AttackResult:
        """Attack the images from `first` to before `last`, the chunks of each attack dealt over the processes."""
        judge, suite, began = self.judge, self.suite, time.perf_counter()
        standing = self.clean[first:last].clone()
        furthest = seconds = 0.0
        severity, broken_by = judge.no_mistakes(), dict.fromkeys(suite.attacks, 0)
        with memory_of_all(world):
            for at in range(first, last, judge.batch_size):
                severity = judge.wrong_anyway(severity, at, self.clean[at : min(at + judge.batch_size, last)])
        costs = {name: self.config.passes(name, self.num_classes) for name in suite.attacks}
        spent = 0

        def report(passed: int, left: int) -> None:
            """Tell how much of the work is done, as a number of images: what is broken is done."""
            if not self.timed:
                work = spent * left + costs[name] * passed
                done = len(standing) - left + work // sum(costs.values())
                judge.report("autoattack", standing, len(standing), began, done=done)

        name = suite.attacks[0]
        report(0, int(standing.sum()))
        for name in suite.attacks:
            left = standing.nonzero().flatten()
            pieces, stand = torch.split(left, self.size) if len(left) else (), 0
            for number in range(0, len(pieces), world.size):
                mine = pieces[number + world.rank] if number + world.rank < len(pieces) else None
                for which, part in self._together(name, first, mine, world, done=number * self.size, total=len(left)):
                    standing[which] = part.correct
                    furthest, seconds = max(furthest, part.max_perturbation), seconds + part.seconds
                    broken_by[name] += part.n - int(part.correct.sum())
                    severity = None if severity is None or part.severity is None else severity + part.severity
                    stand += int(part.correct.sum())
                report(stand, int(standing.sum()))
            spent += costs[name]
        return AttackResult(
            name="autoattack",
            correct=standing,
            seconds=seconds,
            max_perturbation=furthest,
            suite=suite.name,
            broken_by=broken_by,
            severity=severity,
        )

    def knows(self, first: int, last: int) -> bool:
        """Whether all that happens to these images was kept."""
        standing = self.clean[first:last].clone()
        for name in self.suite.attacks:
            left = standing.nonzero().flatten()
            for which in torch.split(left, self.size) if len(left) else ():
                kept = self._kept(self._path(name, first + which), len(which), name)
                if kept is None:
                    return False
                standing[which] = kept.correct
        return True

    def _kept(self, path: Path | None, n: int, name: str) -> AttackResult | None:
        """A chunk that an earlier run has finished."""
        kept = as_chunk(self.kept.read(path), n, name)
        asked = self.judge.hierarchy is not None
        return kept if kept is not None and (kept.severity is not None) == asked else None

    def _together(
        self, name: str, first: int, mine: Tensor | None, world: World, *, done: int, total: int
    ) -> list[tuple[Tensor, AttackResult]]:
        """Attack one chunk in each process: positions behind `first`, and what came of them, of all processes."""
        path = kept = None
        if mine is not None:
            path = self._path(name, first + mine)
            kept = self._kept(path, len(mine), name)
        if world is self.judge.world:
            missing = not all(world.gather(mine is None or kept is not None))
            listen(world)
            if missing:
                place = f"in AutoAttack's {name} after {done} of {total} images"
                if self.timed:
                    place = f"after {first} of {len(self.clean)} images of AutoAttack"
                stop_if_asked(f"stopped {place}{self.kept}")
        with memory_of_all(world):
            if mine is not None and kept is None:
                kept = _attack_chunk(self.judge, first + mine, name, self.num_classes, self.config)
                self.kept.write(path, kept.to_json())
        row: list[Any] | None = None if mine is None or kept is None else [mine, kept.to_json()]
        told = world.gather(row)
        return [(part[0], AttackResult.from_json(part[1])) for part in told if part is not None]

    def _path(self, name: str, which: Tensor) -> Path | None:
        """The file of a chunk, named after all that decides what is found."""
        if self.kept.directory is None:
            return None
        judge, index = self.judge, which.to(self.judge.pixels.device)
        settings = {
            "suite": asdict(self.suite),
            "attack": name,
            "config": {**asdict(self.config), "chunk_size": self.size},
            "threat": judge.threat.to_json(),
            "seed": judge.seed,
            "device": judge.device.type,  # which draws the random numbers
            "pyautoattack": version(),
            "model": self.model_sha256,
            "images": hash_of(judge.pixels[index], judge.labels[index.to(judge.labels.device)]),
        }
        if judge.hierarchy is not None:
            settings["hierarchy"] = judge.hierarchy.to_json()
        return self.kept.path(settings, "autoattack-{}.json")


def _attack_chunk(judge: Judge, which: Tensor, name: str, num_classes: int, config: AutoAttackConfig) -> AttackResult:
    """Run one attack on the images `which`, that all attacks before left standing. Its result is kept as it is."""
    began = time.perf_counter()
    x, y = judge.batch(which)
    found = attack_once(judge.model, x, y, judge.threat, name, num_classes=num_classes, seed=judge.seed, config=config)
    correct, severity = judge.look(found, y)
    return AttackResult(
        name=name,
        correct=correct,
        seconds=time.perf_counter() - began,
        max_perturbation=judge.furthest(found, x),
        severity=None if judge.hierarchy is None else severity,
    )


def model_sha256(model: nn.Module) -> str:
    """Return a hash of the model's structure as it prints, and of all its weights and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    names = ";".join(name for name, _ in named)
    tensors = hash_of(*(tensor for _, tensor in named))
    return hashlib.sha256(f"{model!r}\n{names}\n{tensors}".encode()).hexdigest()


def as_chunk(value: Any, n: int, name: str) -> AttackResult | None:
    """What is kept of a chunk of `n` images; None where it cannot be relied on: then it is made again."""
    try:
        chunk = AttackResult.from_json(value)
    except (TypeError, ResultError):
        return None
    return chunk if (chunk.n, chunk.name) == (n, name) else None
