"""How attacks are judged: the model looks again at whatever an attack returns, within the ball."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustcompress.distributed import ALONE, World
from robustcompress.interrupt import listen, stop_if_asked
from robustcompress.robust.attacks import AttackSpec
from robustcompress.robust.hierarchy import Hierarchy, Severity
from robustcompress.robust.memory import memory_of_all
from robustcompress.robust.report import AttackResult
from robustcompress.robust.threat import ThreatModel

_POOL = 4  # batches that `apgd-fast` draws from


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProgress:
    """Where an evaluation stands; handed to `progress` after each batch, and before and after each chunk of AutoAttack.

    AutoAttack's attacks each go over all images that are left, unless there is a time limit. Then `done` is the share
    of the work that is done, as a number of images, and `accuracy` is that of all images, and only falls.

    Attributes:
        attack: Name of the attack that runs.
        done: Images it has judged.
        total: Images it is to judge.
        accuracy: Share of the judged images that are still right.
        seconds: Wall time since this attack began.
    """

    attack: str
    done: int
    total: int
    accuracy: float
    seconds: float


Progress = Callable[[EvaluationProgress], None]


class Judged(NamedTuple):
    """What came of some images under an attack: flags, bool [n] on the CPU; largest change; severity of mistakes."""

    correct: Tensor
    furthest: float
    severity: Severity | None


def _flags(judged: Mapping[int, Judged]) -> Tensor:
    return torch.cat([item.correct for item in judged.values()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """What all attacks of one evaluation share: the model and the images, and the last word on both.

    Attributes:
        model: In eval mode, on `device`.
        pixels: uint8 or float, [N, 3, H, W], in the order judged, on any device.
        labels: int64 [N].
        threat: What the adversary may do.
        batch_size: Images a batch.
        device: Where the model works.
        seed: Seed of the attacks.
        progress: Called after each batch.
        hierarchy: Says how severe mistakes are; None where nobody asks.
        world: The processes among which batches are dealt; each has all results in the end, which are those of one.
    """

    model: nn.Module
    pixels: Tensor
    labels: Tensor
    threat: ThreatModel
    batch_size: int
    device: torch.device
    seed: int
    progress: Progress | None
    hierarchy: Hierarchy | None = None
    world: World = ALONE

    def batch(self, which: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return images as float32 and their labels, both on the device."""
        index = which.to(self.pixels.device) if isinstance(which, Tensor) else which
        return as_float(self.pixels[index], self.device), self.labels[index].to(self.device)

    def clean(self) -> AttackResult:
        """Judge the images as they are."""
        began = time.perf_counter()
        starts = range(0, len(self.labels), self.batch_size)
        judged: dict[int, Judged] = {}
        with memory_of_all(self.world):
            for number in self.world.share(len(starts)):
                right, found = self.look(*self.batch(slice(starts[number], starts[number] + self.batch_size)))
                judged[number] = Judged(right, 0.0, None if self.hierarchy is None else found)
                self.report("clean", _flags(judged), len(self.labels), began)
        correct, _, severity = self._collected(judged)
        return AttackResult(name="clean", correct=correct, seconds=time.perf_counter() - began, severity=severity)

    def attack(self, spec: AttackSpec, clean: Tensor) -> AttackResult:
        """Attack what the clean model gets right; `clean` are its flags."""
        began = time.perf_counter()
        # On the CPU whatever the device, so that a seed means the same starts everywhere.
        generator = torch.Generator().manual_seed(self.seed)
        # An attack that drops what it has broken refills its batches from a larger pool.
        size = self.batch_size * (_POOL if spec.kind == "apgd-fast" else 1)
        starts, judged = range(0, len(clean), size), dict[int, Judged]()
        # A batch for each process at a time: before they take the next, they hear of each other.
        for first in range(0, len(starts), self.world.size):
            listen(self.world)
            stop_if_asked(f"stopped after {starts[first]} of {len(clean)} images of {spec.name}")
            with memory_of_all(self.world):
                for rank, at in enumerate(starts[first : first + self.world.size]):
                    flags = clean[at : at + size]
                    if rank != self.world.rank:
                        spec.draw(int(flags.sum()), self.pixels.shape[1:], self.threat, generator=generator)
                        continue
                    judged[first + rank] = self._attacked(spec, flags, at, generator)
                    self.report(spec.name, _flags(judged), len(clean), began)
        correct, furthest, severity = self._collected(judged)
        seconds = time.perf_counter() - began
        return AttackResult(
            name=spec.name, correct=correct, seconds=seconds, max_perturbation=furthest, severity=severity
        )

    def _attacked(self, spec: AttackSpec, clean: Tensor, at: int, generator: torch.Generator) -> Judged:
        """Attack what the clean model gets right of the images that begin `at`."""
        correct, furthest = clean.clone(), 0.0
        severity = self.wrong_anyway(self.no_mistakes(), at, clean)
        which = at + clean.nonzero().flatten()
        if len(which):
            x, y = self.batch(which)
            x_adv = spec.perturb(self.model, x, y, self.threat, generator=generator, batch_size=self.batch_size)
            x_adv = self.threat.project(torch.where(x_adv.isfinite(), x_adv, x), x)
            furthest = self.furthest(x_adv, x)
            correct[clean], found = self.look(x_adv, y)
            severity = None if severity is None else severity + found
        return Judged(correct, furthest, severity)

    def _collected(self, judged: Mapping[int, Judged]) -> Judged:
        """What all processes have judged, in the order of the batches."""
        mine: list[list[Any]] = [
            [number, item.correct, item.furthest, [] if item.severity is None else item.severity.to_json()]
            for number, item in judged.items()
        ]
        found = sorted((item for told in self.world.gather(mine) for item in told), key=lambda item: int(item[0]))
        severity = self.no_mistakes()
        for *_, counts in found:
            severity = None if severity is None else severity + Severity.from_json(counts)
        return Judged(torch.cat([item[1] for item in found]), max(item[2] for item in found), severity)

    def furthest(self, x_adv: Tensor, x: Tensor) -> float:
        """Measure the largest perturbation, and refuse one that no rounding explains."""
        size = float(self.threat.size(x_adv, x).max())
        low, high = self.threat.bounds
        assert size <= self.threat.limit, f"an attack left the ball: {size} > {self.threat.eps}"
        assert low <= float(x_adv.min()) and float(x_adv.max()) <= high, "an attack left the bounds"
        return size

    def report(self, name: str, judged: Tensor, total: int, began: float, *, done: int | None = None) -> None:
        """Tell `progress` about the flags `judged` so far; `done` is how many count as done, where not all of them."""
        if self.progress is not None and len(judged):
            self.progress(
                EvaluationProgress(
                    attack=name,
                    done=len(judged) if done is None else done,
                    total=total,
                    accuracy=float(judged.float().mean()),
                    seconds=time.perf_counter() - began,
                )
            )

    def look(self, x: Tensor, y: Tensor) -> tuple[Tensor, Severity]:
        """Whether the model is right about images, bool [N] on the CPU, and how severe its mistakes are."""
        with torch.no_grad():
            starts = range(0, len(x), self.batch_size)
            predicted = torch.cat([self.model(x[at : at + self.batch_size]).argmax(1) for at in starts])
        found = Severity() if self.hierarchy is None else Severity.of(self.hierarchy.distances, y, predicted)
        return (predicted == y).cpu(), found

    def no_mistakes(self) -> Severity | None:
        """Where counting begins; None where nobody asks how severe mistakes are."""
        return None if self.hierarchy is None else Severity()

    def wrong_anyway(self, severity: Severity | None, at: int, clean: Tensor) -> Severity | None:
        """Add the mistakes that need no attack, which are mistakes under every attack.

        Args:
            severity: What was counted so far; None, and then None comes back, where nobody asks.
            at: Where the images begin.
            clean: Their flags without an attack, bool [n].
        """
        if severity is None or bool(clean.all()):
            return severity
        return severity + self.look(*self.batch(at + (~clean).nonzero().flatten()))[1]


def as_float(pixels: Tensor, device: torch.device) -> Tensor:
    """Return pixels as float32 on the device; uint8 0..255 become [0, 1]."""
    if pixels.dtype == torch.uint8:
        return pixels.to(device).float().div_(255)
    return pixels.to(device, torch.float32)


def hash_of(*tensors: Tensor) -> str:
    """Return the SHA-256 of the tensors' types, shapes and values, in order; layout and device do not matter."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
