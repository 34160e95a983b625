"""How fast this machine multiplies matrices and trains, and whether compiling a training run pays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write_json
from benchmarks.training_cost import passes
from robustcompress import Images, build_model, measure
from robustcompress.data import Batches
from robustcompress.recipe import RunRecipe
from robustcompress.train import CompiledNetwork, make_optimizer, train

TIMED_STEPS = 20
"""Training steps that are timed, eager and compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was measured.

    Attributes:
        peak: Operations a second in large matrix products: bf16 on a GPU, float32 on a CPU.
        eager_s: Seconds of one training step of the reference.
        compiled_s: The same, compiled; None where it was not tried or failed.
        compile_s: Seconds that compiling it took.
        macs: Multiply-adds of one step.
        batch: Images of a step.
    """

    peak: float
    eager_s: float
    compiled_s: float | None
    compile_s: float
    macs: float
    batch: int

    def compiling_pays(self, steps: float, shapes: int) -> bool:
        """Whether a run of so many steps is shorter compiled, with every shape of a network that it goes through."""
        return self.compiled_s is not None and steps * (self.eager_s - self.compiled_s) > shapes * self.compile_s

    def __str__(self) -> str:
        def line(name: str, seconds: float) -> str:
            rate = 2 * self.macs / seconds
            return (
                f"{name}: {self.batch / seconds:.0f} images/s, {rate / 1e12:.2f} TFLOP/s, "
                f"{100 * rate / self.peak:.1f} % of the peak"
            )

        lines = [f"measured peak: {self.peak / 1e12:.2f} TFLOP/s", line("a training step, eager", self.eager_s)]
        if self.compiled_s is not None:
            lines.append(f"{line('compiled', self.compiled_s)} (compiling took {self.compile_s:.0f} s)")
        return "\n".join(lines)


def shapes_of(strategy: Mapping[str, Any]) -> int:
    """How many phases of a strategy train weights, each compiled anew: grape one more than it grows, pruning two."""
    if strategy["name"] == "grape":
        return int(strategy["events"]) + 1
    return 2 if {"pretrain", "host"} & strategy.keys() else 1


def known_speed(path: Path, recipe: RunRecipe, device: str, *, quick: bool = False) -> Speed:
    """Read what was measured on this kind of machine before, or measure it and write it down."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    kind = {"machine": name, "torch": torch.__version__, "model": recipe.model.to_json(), "quick": quick}
    kind |= {"batch": recipe.training.batch_size, "objective": recipe.objective.to_json()}
    if path.is_file():
        found = json.loads(path.read_text())
        if found["kind"] == kind:
            return Speed(**found["speed"])
    speed = measure_speed(recipe, device, quick=quick)
    write_json(path, {"kind": kind, "speed": asdict(speed)})
    return speed


def measure_speed(recipe: RunRecipe, device: str, *, quick: bool = False) -> Speed:
    """Measure the machine, and a training step of a recipe's reference on random images, eager and compiled.

    Args:
        recipe: Model, objective and batch size.
        device: Where.
        quick: One step, and nothing is compiled.
    """
    where = torch.device(device)
    model = build_model(recipe.model.name, **recipe.model.kwargs)[0].to(where, memory_format=torch.channels_last)
    batch = recipe.training.batch_size
    steps = 1 if quick else TIMED_STEPS
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (steps * batch, 3, 32, 32), dtype=torch.uint8, generator=random)
    images = Images(pixels, torch.randint(10, (steps * batch,), generator=random))

    def run(network: torch.nn.Module, share: float) -> float:
        source = torch.Generator().manual_seed(2)
        batches = Batches(images, batch, device=where, augment="crop-flip", generator=source, drop_last=True)
        optimizer = make_optimizer(recipe.training, list(model.parameters()), lr=1e-3)
        return _clocked(
            where,
            lambda: train(
                network,
                batches,
                recipe.objective,
                recipe.threat,
                recipe.training,
                epochs=share,
                optimizer=optimizer,
                lr=1e-3,
                schedule="constant",
                generator=torch.Generator(where).manual_seed(0),
                autocast=where.type == "cuda",
            ),
        )

    run(model, 1 if quick else 0.25)
    eager = run(model, 1) / steps
    compiled, compile_s = None, 0.0
    if not quick and where.type == "cuda":
        try:
            network = CompiledNetwork(model)
            compile_s = run(network, 0.1)
            compiled = run(network, 1) / steps
        except Exception as error:  # a machine without a compiler trains eagerly
            print(f"compiling failed, training goes on without: {type(error).__name__}: {str(error)[:300]}")
    macs = measure(model, torch.zeros(1, 3, 32, 32, device=where)).macs * batch * passes(recipe.objective.to_json())
    return Speed(
        peak=measure_peak(where, quick=quick),
        eager_s=eager,
        compiled_s=compiled,
        compile_s=compile_s,
        macs=macs,
        batch=batch,
    )


def measure_peak(device: torch.device, *, quick: bool = False) -> float:
    """Operations a second in the product of two large square matrices of random numbers."""
    size = 256 if quick else 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    once = _clocked(device, lambda: [a @ b for _ in range(3)]) / 3
    count = max(3, round((0.02 if quick else 1.0) / once))
    return count * 2 * size**3 / _clocked(device, lambda: [a @ b for _ in range(count)])


def _clocked(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that some work takes, the device's part of it included."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start
