"""How far the training dynamics of a masked network are from those of the dense one: as a loss, and as a record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustcompress.data import Batches
from robustcompress.distributed import ALONE, World
from robustcompress.robust.attacks import eval_mode, kept_buffers
from robustcompress.robust.objective import Objective, ObjectiveStep
from robustcompress.robust.tangent import draw_direction, relative_square, tangent_kernel, trained_parameters
from robustcompress.robust.threat import ThreatModel
from robustcompress.session import Session
from robustcompress.strategies.units import Channels, Scores, Weights
from robustcompress.structure.masks import largest_entries
from robustcompress.train import STATISTICS_BATCHES, estimate_statistics, with_auxiliary

PROBES = 16
"""Kernels, each of other images and another output, that a record is of."""


class TangentDistance(Objective):
    """Distance to the dense network, in its outputs and in its mixed tangent kernel.

    `||f_s - f_d||^2 / ||f_d||^2` over the logits of the clean batch, plus `weight` times `||K_s - K_d||^2 / ||K_d||^2`,
    both networks in eval mode, the student's running statistics moved first by one pass of the clean batch. Each step
    draws one output (a unit vector of logits) from the attack's generator.

    Args:
        dense: The network to stay close to, frozen, its batch-norm statistics estimated.
        attack: Finds the attacked images, on the dense network and with the labels, for the first `samples` of a batch.
        parameters: The names of the parameters, as the dense network has them, that tangents are taken in.
        samples: Images in a kernel; fewer where a batch has fewer.
        weight: Of the kernel's term.
    """

    name: ClassVar[str] = "tangent-distance"

    def __init__(
        self,
        dense: nn.Module,
        attack: Objective,
        parameters: Mapping[str, nn.Parameter],
        *,
        samples: int,
        weight: float,
    ) -> None:
        self._dense = dense
        self._attack = attack
        self._names = set(parameters)
        self._moving = {id(p) for p in parameters.values()}
        self._samples = samples
        self._weight = weight
        self._direction: Tensor | None = None
        self._sums: list[Tensor] = []

    def attack(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Objective.attack`; here the dense network is attacked, in `samples` images. The others stay clean."""
        n = self._samples
        with eval_mode(self._dense), torch.no_grad():
            outputs = self._dense(x[:1]).shape[1]
        self._direction = draw_direction(outputs, device=x.device, generator=generator)
        x_adv = self._attack.attack(self._dense, x[:n], y[:n], threat, generator=generator)
        self._sums.append(torch.zeros(2, device=x.device))
        return torch.cat([x_adv, x[n:]])

    def loss_on(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> ObjectiveStep:
        """See `Objective.loss_on`; its logits are those on the clean images."""
        assert self._direction is not None
        with torch.no_grad():
            model(x)  # moves the running statistics, in whatever mode the caller wants them moved
            with eval_mode(self._dense):
                wanted = self._dense(x)
        # An ordinary pass comes before the kernel's: masks remember which units they keep, and what is remembered
        # must not have been computed inside the kernel's function transforms.
        with eval_mode(model):
            logits = model(x)
        apart = relative_square(logits.float(), wanted.float())
        clean, attacked = x[: self._samples], x_adv[: self._samples]
        there = {n: p.detach() for n, p in self._dense.named_parameters() if n in self._names}
        here = {n: p.detach() for n, p in model.named_parameters() if id(p) in self._moving}
        with torch.no_grad():
            dense = tangent_kernel(self._dense, clean, attacked, self._direction, there)
        kernel = relative_square(tangent_kernel(model, clean, attacked, self._direction, here), dense)
        # Of a step's passes the last: above an ascent, where there is one.
        self._sums[-1:] = [torch.stack([apart.detach(), kernel.detach()])]
        return ObjectiveStep(apart + self._weight * kernel, logits.detach(), x_adv, logits.detach())

    def read(self, world: World = ALONE) -> dict[str, float]:
        """The mean relative distances since the last call (roots of the mean squares in the loss).

        Args:
            world: The processes that share the batches, all of which call this: the mean is over all of them.
        """
        found = self.memory()["distances"]
        found = found[found.isfinite().all(1)]  # a step that was left out has none
        outputs, kernel, count = world.totals([*found.sum(0).tolist(), len(found)])
        self._sums.clear()
        if not count:
            return {}
        return {"output_distance": (outputs / count) ** 0.5, "kernel_distance": (kernel / count) ** 0.5}

    def memory(self) -> dict[str, Tensor]:
        """See `Objective.memory`: what `read` will tell the mean of, `[steps, 2]`."""
        return {"distances": torch.stack(self._sums) if self._sums else torch.zeros(0, 2)}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """See `Objective.remember`."""
        self._sums = list(memory["distances"]) if memory else []

    def to_json(self) -> dict[str, Any]:
        """See `Objective.to_json`; it cannot be read back, since a network belongs to it."""
        return {"name": self.name, "samples": self._samples, "weight": self._weight}


@contextlib.contextmanager
def calibrated(session: Session) -> Iterator[None]:
    """Run with batch-norm statistics of the network as it is masked now; what it had comes back.

    Estimated on training images as they are, always the same ones, so that networks can be compared.
    """
    size = session.goal.recipe.batch_size
    images = session.goal.data.train.first(STATISTICS_BATCHES * size)
    batches = Batches(images, min(size, len(images)), device=_device(session), channels_last=False)
    with kept_buffers(session.model):
        estimate_statistics(session.model, batches)
        yield


def compare_tickets(
    session: Session, units: Channels | Weights, found: Scores, *, samples: int
) -> dict[str, dict[str, float]]:
    """How far three tickets are from the dense network: that of magnitude, a random one, and the one found.

    All keep as many units of each tensor as the found one, and are judged in eval mode, each with batch-norm statistics
    of its own, on the same held-out images (of the validation split; of the training images where there is none), the
    same images attacked on the dense network, and the same outputs. The weights must be those of the dense network.

    Args:
        session: The network; draws the random ticket and the outputs from its generator.
        units: What was chosen among.
        found: The scores of the ticket found.
        samples: Images in each kernel of the record.

    Returns:
        By ticket, "outputs" and "kernel": Frobenius norms of the difference over that of the dense network's; and
        "cosine" of the two kernels, which a change of scale alone (fewer parameters move) leaves at 1.
    """
    model, goal, device = session.model, session.goal, _device(session)
    counts = units.counts(found)
    random = {n: torch.rand(s.shape, generator=session.generator).to(s.device) for n, s in found.items()}
    scores = {"magnitude": units.first_scores(units.magnitudes()), "random": random, "found": found}
    seed = int(torch.randint(2**62, (), generator=session.generator))
    held_out = goal.data.val if len(goal.data.val) else goal.data.train
    batches = [
        (x, y) for x, y in Batches(held_out.first(PROBES * samples), samples, device=device, channels_last=False)
    ]

    def all_open(name: str) -> Tensor:
        return torch.ones_like(found[name], dtype=torch.bool)

    with _masked(session, units, {name: all_open(name) for name in found}):
        noise = torch.Generator(device).manual_seed(seed)
        objective = with_auxiliary(goal.objective, session.editor)
        probes = [(x, objective.attack(model, x, y, goal.threat, generator=noise)) for x, y in batches]
        dense = _look(model, probes, seed)
    result = {}
    for ticket, values in scores.items():
        bits = {name: largest_entries(s, counts[name]) for name, s in values.items()}
        with _masked(session, units, bits):
            logits, kernels = _look(model, probes, seed)
        result[ticket] = {
            "outputs": float(relative_square(logits, dense[0]).sqrt()),
            "kernel": float(relative_square(kernels, dense[1]).sqrt()),
            "cosine": float(F.cosine_similarity(kernels, dense[1], dim=0)),
        }
    return result


def tell(session: Session, distances: Mapping[str, Mapping[str, float]]) -> None:
    """Record what `compare_tickets` found, and say it to the person who waits."""
    session.record({"phase": "search", "event": "tangent", "distances": {k: dict(v) for k, v in distances.items()}})
    for what, label in (("kernel", "tangent kernels"), ("outputs", "outputs")):
        told = ", ".join(f"{ticket} {of[what]:.3f}" for ticket, of in distances.items())
        session.say(f"distance to the dense network's {label}: {told}")


@contextlib.contextmanager
def _masked(session: Session, units: Channels | Weights, bits: Mapping[str, Tensor]) -> Iterator[None]:
    with units.gates({name: b.float() for name, b in bits.items()}, dict), calibrated(session):
        yield


def _look(model: nn.Module, probes: Sequence[tuple[Tensor, Tensor]], seed: int) -> tuple[Tensor, Tensor]:
    """All clean logits, `[N, K]`, and all kernels in one row."""
    generator = torch.Generator().manual_seed(seed)
    with eval_mode(model), torch.no_grad():
        logits = torch.cat([model(x) for x, _ in probes])
        kernels = []
        for x, x_adv in probes:
            direction = draw_direction(logits.shape[1], device=logits.device, generator=generator)
            kernels.append(tangent_kernel(model, x, x_adv, direction, trained_parameters(model)).flatten())
    return logits, torch.cat(kernels)


def _device(session: Session) -> torch.device:
    return next(session.model.parameters()).device
