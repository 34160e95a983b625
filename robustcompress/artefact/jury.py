"""Attacks on a file, judged by the file itself: whatever they return is brought into the ball and looked at again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustcompress.artefact.file import OnnxFile
from robustcompress.artefact.rounding import within
from robustcompress.artefact.square import generator_of, square
from robustcompress.errors import ResultError
from robustcompress.interrupt import stop_if_asked
from robustcompress.robust import AttackResult, AttackSpec, EvaluationProgress, ThreatModel
from robustcompress.robust.autoattack import autoattack, suite_for
from robustcompress.robust.judge import hash_of
from robustcompress.robust.kept import Kept

CHUNK = 32
"""Images that are attacked together: so often results are kept."""

Craft = Callable[[Tensor, Tensor, int], Tensor]
"""Images [n, C, H, W], labels [n] and the place of the first among all to adversarial images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Jury:
    """What all attacks of one report share.

    Attributes:
        file: What is judged.
        images: As the file sees them: float32 [N, C, H, W], on the CPU.
        labels: int64 [N].
        indices: Which images of the data they are: int64 [N]. Random numbers of an image depend on its index.
        threat: What the adversary may do.
        seed: Of the attacks.
        progress: Called after each chunk.
        keep: Where finished chunks are kept.
        identity: What a kept chunk depends on beside the attack: the file's hash and more.
    """

    file: OnnxFile
    images: Tensor
    labels: Tensor
    indices: Tensor
    threat: ThreatModel
    seed: int
    progress: Callable[[EvaluationProgress], None] | None = None
    keep: Kept = field(default_factory=Kept)
    identity: Mapping[str, Any]

    def clean(self) -> AttackResult:
        """Judge the images as they are."""
        began = time.perf_counter()
        correct = self.right(self.images, self.labels)
        self._tell("clean", correct, len(correct), began)
        return AttackResult(name="clean", correct=correct, seconds=time.perf_counter() - began)

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether the file's answers are right: bool [n]."""
        return self.file.scores(images).argmax(1) == labels

    def replay(self, name: str, craft: Craft, clean: Tensor, *, depends_on: Any, suite: str = "") -> AttackResult:
        """Judge adversarial images that were made elsewhere.

        Args:
            name: Of the attack.
            craft: Makes them; asked for the images that the file gets right, chunk by chunk.
            clean: Flags of the first images without an attack; so many are judged.
            depends_on: What the images depend on, as plain JSON: kept chunks of other values are not used.
            suite: For the report.
        """

        def chunk(x: Tensor, y: Tensor, indices: Tensor) -> dict[str, Any]:
            x_adv = within(craft(x, y, int(indices[0])), x, self.threat, self.file.input_type)
            return {"right": self.right(x_adv, y).tolist(), "furthest": self._furthest(x_adv, x)}

        return self._in_chunks(name, chunk, clean, depends_on, suite)[0]

    def square(self, name: str, clean: Tensor, queries: int) -> tuple[AttackResult, list[int]]:
        """Attack the file's scores, and nothing else; also returns the queries that each broken image took."""
        kind = self.file.input_type

        def chunk(x: Tensor, y: Tensor, indices: Tensor) -> dict[str, Any]:
            found = square(
                self.file.scores,
                x,
                y,
                self.threat,
                queries=queries,
                seed=self.seed,
                indices=indices,
                within=lambda x_adv, origin: within(x_adv, origin, self.threat, kind),
            )
            right = self.right(found.x_adv, y)
            spent = found.queries[~right].tolist()
            return {"right": right.tolist(), "furthest": self._furthest(found.x_adv, x), "queries": spent}

        result, chunks = self._in_chunks(name, chunk, clean, {"queries": queries}, "", counted=True)
        return result, [count for kept in chunks for count in kept["queries"]]

    def _in_chunks(
        self,
        name: str,
        attack: Callable[..., dict[str, Any]],
        clean: Tensor,
        depends_on: Any,
        suite: str,
        *,
        counted: bool = False,
    ) -> tuple[AttackResult, list[dict[str, Any]]]:
        began, done = time.perf_counter(), 0.0
        correct, furthest, chunks = clean.clone(), 0.0, []
        for at in range(0, len(clean), CHUNK):
            which = at + clean[at : at + CHUNK].nonzero().flatten()
            if not len(which):
                continue
            x, y, indices = self.images[which], self.labels[which], self.indices[which]
            path = self._path({"attack": name, "of": depends_on, "images": hash_of(x, y, indices)})
            kept = as_kept(self.keep.read(path), len(which), counted=counted)
            if kept is None:
                stop_if_asked(f"stopped after {at} of {len(clean)} images of {name}{self.keep}")
                start = time.perf_counter()
                kept = attack(x, y, indices) | {"seconds": time.perf_counter() - start}
                self.keep.write(path, kept)
            correct[which] = torch.tensor(kept["right"])
            furthest, done = max(furthest, kept["furthest"]), done + kept["seconds"]
            chunks.append(kept)
            self._tell(name, correct[: at + CHUNK], len(clean), began)
        result = AttackResult(name=name, correct=correct, seconds=done, max_perturbation=furthest, suite=suite)
        return result, chunks

    def _furthest(self, x_adv: Tensor, x: Tensor) -> float:
        size = float(self.threat.size(x_adv, x).max())
        low, high = self.threat.bounds
        assert size <= self.threat.limit, f"an attack left the ball: {size} > {self.threat.eps}"
        assert low <= float(x_adv.min()) and float(x_adv.max()) <= high, "an attack left the bounds"
        return size

    def _path(self, what: Mapping[str, Any]) -> Path | None:
        return self.keep.path({**self.identity, "threat": self.threat.to_json(), "seed": self.seed, **what})

    def _tell(self, name: str, judged: Tensor, total: int, began: float) -> None:
        if self.progress is not None and len(judged):
            accuracy, seconds = float(judged.float().mean()), time.perf_counter() - began
            step = EvaluationProgress(attack=name, done=len(judged), total=total, accuracy=accuracy, seconds=seconds)
            self.progress(step)


def crafted(model: nn.Module, spec: AttackSpec, threat: ThreatModel, *, seed: int, num_classes: int) -> Craft:
    """How a model's own adversarial images are made, of every chunk with random numbers of its own.

    Args:
        model: On the CPU in eval mode, without gradients to its weights.
        spec: The attack.
        threat: What it may do.
        seed: Its seed.
        num_classes: Number of logits.
    """

    def craft(x: Tensor, y: Tensor, first: int) -> Tensor:
        if spec.kind == "autoattack":
            return autoattack(model, x, y, threat, num_classes=num_classes, seed=seed).x_adv
        return spec.perturb(model, x, y, threat, generator=generator_of(seed, first))

    return craft


def suite_of(spec: AttackSpec, num_classes: int) -> str:
    """Which attacks AutoAttack is made of for so many classes; "" for others."""
    return suite_for(num_classes).name if spec.kind == "autoattack" else ""


def as_kept(kept: Any, n: int, *, counted: bool = False) -> dict[str, Any] | None:
    """What is kept of a chunk of `n` images; None where it cannot be relied on: then it is made again.

    Args:
        kept: As it was read.
        n: How many flags there must be.
        counted: Whether there must be the queries that each broken image took.
    """
    try:
        if len(kept["right"]) != n or not all(type(flag) is bool for flag in kept["right"]):
            raise ResultError("not the flags of these images")
        if counted:
            queries = kept["queries"]
            if len(queries) != kept["right"].count(False) or not all(type(count) is int for count in queries):
                raise ResultError("not the queries of these images")
        return {**kept, "furthest": float(kept["furthest"]), "seconds": float(kept["seconds"])}
    except (ValueError, KeyError, TypeError, AttributeError, ResultError, OverflowError):
        return None
