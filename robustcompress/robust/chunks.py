"""AutoAttack over many images: in chunks that are kept, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.errors import InputError, ResultError
from robustcompress.interrupt import listen, stop_if_asked
from robustcompress.robust.autoattack import AutoAttackConfig, autoattack, suite_for, version
from robustcompress.robust.judge import Judge, hash_of
from robustcompress.robust.memory import memory_of_all
from robustcompress.robust.report import AttackResult, pack_flags
from robustcompress.untrusted import read_json

CHUNK = 64
"""Images that are attacked together where nobody says otherwise."""


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
    """Judge the first images with AutoAttack, chunk after chunk.

    Args:
        judge: The evaluation this is part of.
        clean: Flags of those images without an attack, bool [n].
        num_classes: Number of logits.
        config: What to change of the standard.
        time_limit_s: Start no chunk that would not end in time, going by the slowest so far; but run one at least.
        resume_dir: Where finished chunks are kept, one JSON file each, and found again; each process keeps its own.
        warn: Told once where they cannot be kept; the attack goes on.

    Returns:
        Flags of as many images as the time allowed.

    Raises:
        InputError: `resume_dir` cannot be made, or is not a directory.
    """
    began = time.perf_counter()
    size = min(config.chunk_size or (CHUNK if time_limit_s is None else 16), judge.batch_size)
    suite = suite_for(num_classes, config)
    settings = {
        "suite": asdict(suite),
        "config": {**asdict(config), "chunk_size": size},
        "threat": judge.threat.to_json(),
        "seed": judge.seed,
        "pyautoattack": version(),
        "model": model_sha256(judge.model) if resume_dir is not None else None,
    }
    if judge.hierarchy is not None:
        settings["hierarchy"] = judge.hierarchy.to_json()
    if resume_dir is not None:
        try:
            resume_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"resume_dir={str(resume_dir)!r} cannot be made: {error}") from error
    parts: list[Tensor] = []
    broken_by = dict.fromkeys(suite.attacks, 0)
    furthest = seconds = slowest = 0.0
    severity, warned = judge.no_mistakes(), False
    # As many chunks at a time as there are processes.
    for first in range(0, len(clean), size * judge.world.size):
        at = first + size * judge.world.rank
        flags = clean[at : at + size]
        path: Path | None = None
        if resume_dir is not None and len(flags):
            images = hash_of(judge.pixels[at : at + size], judge.labels[at : at + size])
            path = resume_dir / f"autoattack-{_key({**settings, 'images': images, 'clean': pack_flags(flags)})}.json"
        kept = None if path is None else _read_chunk(path, len(flags), suite.attacks)
        missing = [number for number, done in enumerate(judge.world.gather(bool(kept) or not len(flags))) if not done]
        elapsed = time.perf_counter() - began
        late = bool(slowest) and time_limit_s is not None and elapsed + slowest > time_limit_s
        stopped = bool(missing) and judge.world.broadcast(late)
        listen(judge.world)
        if missing and not stopped:
            place = "" if resume_dir is None else f"; what it has found so far is kept in {resume_dir}"
            stop_if_asked(f"stopped after {first} of {len(clean)} images of AutoAttack{place}")
        with memory_of_all(judge.world):
            if kept is None and len(flags) and not stopped:
                kept = _attack_chunk(judge, flags, at, num_classes, config)
                if path is not None:
                    warned = warned or _keep(path, kept, warn)
        for number, told in enumerate(judge.world.gather(None if kept is None else kept.to_json())):
            if told is None:  # of this chunk, and all behind it, nothing is known
                break
            chunk = AttackResult.from_json(told)
            slowest = max(slowest, chunk.seconds if number in missing else 0.0)
            parts.append(chunk.correct)
            furthest = max(furthest, chunk.max_perturbation)
            seconds += chunk.seconds
            if severity is not None and chunk.severity is not None:
                severity = severity + chunk.severity
            for name, count in chunk.broken_by.items():
                broken_by[name] += count
            judge.report("autoattack", torch.cat(parts), len(clean), began)
        if stopped:
            break
    return AttackResult(
        name="autoattack",
        correct=torch.cat(parts),
        seconds=seconds,
        max_perturbation=furthest,
        suite=suite.name,
        broken_by=broken_by,
        severity=severity,
    )


def _attack_chunk(judge: Judge, clean: Tensor, at: int, num_classes: int, config: AutoAttackConfig) -> AttackResult:
    """Attack the chunk that begins `at`. Its result is an `AttackResult` of its own, and is kept as one."""
    began = time.perf_counter()
    suite = suite_for(num_classes, config)
    correct, furthest, broken_by = clean.clone(), 0.0, dict.fromkeys(suite.attacks, 0)
    which = at + clean.nonzero().flatten()
    severity = judge.wrong_anyway(judge.no_mistakes(), at, clean)
    if len(which):
        x, y = judge.batch(which)
        outcome = autoattack(judge.model, x, y, judge.threat, num_classes=num_classes, seed=judge.seed, config=config)
        furthest = judge.furthest(outcome.x_adv, x)
        correct[clean] = outcome.correct.cpu()
        broken_by = outcome.broken_by
        if severity is not None:
            severity = severity + judge.look(outcome.x_adv, y)[1]
    return AttackResult(
        name="autoattack",
        correct=correct,
        seconds=time.perf_counter() - began,
        max_perturbation=furthest,
        suite=suite.name,
        broken_by=broken_by,
        severity=severity,
    )


def model_sha256(model: nn.Module) -> str:
    """Return a hash of the model's structure as it prints, and of all its weights and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    names = ";".join(name for name, _ in named)
    tensors = hash_of(*(tensor for _, tensor in named))
    return hashlib.sha256(f"{model!r}\n{names}\n{tensors}".encode()).hexdigest()


def _key(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _read_chunk(path: Path, n: int, attacks: tuple[str, ...]) -> AttackResult | None:
    """Return a kept chunk, or None where there is none or it cannot be relied on: then it is made again."""
    try:
        chunk = AttackResult.from_json(read_json(path))
    except (OSError, ValueError, ResultError):
        return None
    return chunk if chunk.n == n and set(chunk.broken_by) == set(attacks) else None


def _keep(path: Path, chunk: AttackResult, warn: Callable[[str], None]) -> bool:
    """Write so that a reader, also after a crash, sees the whole file or none; return whether it had to be given up."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(chunk.to_json()), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        warn(f"finished chunks of AutoAttack could not be kept in {path.parent} ({error.strerror})")
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        return True
    return False
