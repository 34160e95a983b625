"""What one step of PGD adversarial training costs, against the bare cost of its passes.

Three loops take turns on the same kind of batch, step by step, so that load and drift hit all of them alike:
  ours    a step of `robustcompress.train.train` as strategies run it: augmentation (crop and flip, from bytes), PGD in
          eval mode, loss, backward, SGD with Nesterov momentum, averaged weights, the running metrics, and the look at
          clean images, a forward pass that is made every 25th step of epochs as long as CIFAR-10's
  bare    what no implementation can do without, in plain torch: K times forward + gradient to the images (eval mode),
          then once forward + backward (train mode) + the optimizer's step; channels_last and weights that ask for no
          gradient in the attack, as ours; a fused optimizer; no projection, no augmentation, no average, no metrics
  public  the loop most public code has: NCHW, and `loss.backward()` in the attack, which computes gradients of all
          weights too and throws them away; otherwise as bare, with projection
  library the same loop with the attack of a public library, `foolbox.attacks.LinfPGD` as its users call it (which also
          judges what it returns: one more forward pass); only where foolbox is installed (`pip install foolbox`)
"efficiency" is bare / ours; the aim is at least 0.95. "speed-up" is public / ours, "library" is library / ours. Medians
of single steps; those of ours that look at the clean images are weighted with their share. Pixels and labels are random
bytes. On a machine that is shared, `--clock cpu` counts processor time in place of wall time. Each loop makes one step
with a single attack step first, which is not timed. `--full` times networks of full width, for an hour and more, and
keeps them in a file of their own; the file is written anew after each network, so that what is done is not lost. With
`--keep` what the file holds of other cells stays, each row with the command and the commit that it comes from.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    add_out,
    command,
    commit,
    make_parser,
    out_path,
    positive,
    provenance,
    read_json,
    record,
    summary,
    table,
    threads,
    write_json,
)
from robustcompress import Images, Recipe, ThreatModel, build_model, measure
from robustcompress.data import Batches
from robustcompress.distributed import Parts
from robustcompress.robust import PGDAT
from robustcompress.train import averaged, make_optimizer, train
from robustcompress.train.loop import clean_every

MODULE = "training_step"
FULL = "training_step_full"
MODELS = ("resnet8", "resnet20", "resnet18@0.25")
FULL_CELLS = (
    *("resnet18:128:1", "resnet18:128:7", "resnet18:128:10", "resnet18:512:1", "resnet18:1024:1"),
    *("wrn_28_10:128:1", "wrn_28_10:128:10"),
)
EPOCH = 50_000
LOOK = clean_every(EPOCH)
THREAT = ThreatModel("linf", 8 / 255)
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    module = FULL if options.full else MODULE
    path = out_path(options, module)
    models = options.models or (FULL_CELLS if options.full else MODELS)
    if options.quick:
        models, options.batch_size, options.attack_steps, options.steps = ["resnet8", "resnet8:4:1"], 8, 2, 3
    results = earlier(path) if options.keep else []
    wanted = cells(models, options.batch_size, options.attack_steps)
    for _, batch_size, _ in wanted:
        check_fits(batch_size, options.steps)
    pixels = random_images(max(batch_size for _, batch_size, _ in wanted), options.seed).pixels
    data = {"name": "random bytes", "sha256": hashlib.sha256(pixels.numpy().data).hexdigest()}
    with threads(options.threads):
        for name, batch_size, attack_steps in wanted:
            row = compare(
                name,
                batch_size=batch_size,
                attack_steps=attack_steps,
                steps=options.steps,
                seed=options.seed,
                clock=options.clock,
            )
            row |= {"command": command(MODULE, argv), "commit": commit()["commit"], "threads": options.threads}
            results = [other for other in results if _cell(other) != _cell(row)] + [row]
            results.sort(key=lambda row: (row["macs"], row["batch_size"], row["attack_steps"]))
            said = f"{name}, batch {batch_size}, K={attack_steps}: efficiency {row['efficiency']:.3f}"
            print(said, file=sys.stderr, flush=True)
            value = record(MODULE, options, argv, results, data=data) | {"benchmark": module}
            write_json(path, value)
    print(markdown(value))
    return 0


def earlier(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, each with where it comes from; none where there is no file."""
    if not path.exists():
        return []
    value = read_json(path)
    origin = {"command": value["command"], "commit": value["code"]["commit"], "threads": value["hardware"]["threads"]}
    return [origin | row for row in value["results"]]


def _cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["batch_size"], row["attack_steps"]


def cells(models: Sequence[str], batch_size: int, attack_steps: int) -> list[tuple[str, int, int]]:
    """Network, batch and attack steps of each "factory[@width][:batch[:steps]]"; raises SystemExit for others."""
    found = []
    for text in models:
        name, *numbers = text.split(":")
        if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
            raise SystemExit(f"--models: {text!r} is not FACTORY[@WIDTH][:BATCH[:STEPS]], such as resnet18:512:1")
        batch, steps, *_ = [*map(int, numbers), *(batch_size, attack_steps)[len(numbers) :]]
        found.append((name, batch, steps))
    return found


def compare(
    name: str, *, batch_size: int, attack_steps: int, steps: int, seed: int, clock: str = "wall"
) -> dict[str, Any]:
    """Time the three loops on one network, "factory" or "factory@width"."""
    torch.manual_seed(seed)
    model = build(name)
    bare = BareStep(copy.deepcopy(model).to(memory_format=torch.channels_last), attack_steps, batch_size, seed)
    public = PublicStep(copy.deepcopy(model), attack_steps, batch_size, seed)
    ours = model.to(memory_format=torch.channels_last)
    _run(ours, {}, batch_size, 1, 1, seed, clock)
    bare(1)
    public(1)
    rivals: dict[str, Callable[..., object]] = {"bare": bare, "public": public}
    if library_is_installed():
        rivals["library"] = LibraryStep(copy.deepcopy(model), attack_steps, batch_size, seed)
        rivals["library"](1)
    ours_times, others = _run(ours, rivals, batch_size, attack_steps, steps, seed, clock)
    looking = [t for i, t in enumerate(ours_times) if i % LOOK == 0]
    plain = [t for i, t in enumerate(ours_times) if i % LOOK] or looking
    share = 1 / LOOK
    ours_s = share * statistics.median(looking) + (1 - share) * statistics.median(plain)
    medians = {key: statistics.median(values) for key, values in others.items()}
    bare_s, public_s, library_s = (medians.get(key) for key in ("bare", "public", "library"))
    assert bare_s is not None and public_s is not None
    return {
        "model": name,
        "macs": measure_macs(model),
        "batch_size": batch_size,
        "attack_steps": attack_steps,
        "clock": clock,
        "ours_s": round(ours_s, 7),
        "bare_s": round(bare_s, 7),
        "public_s": round(public_s, 7),
        "efficiency": round(bare_s / ours_s, 4),
        "speed_up": round(public_s / ours_s, 4),
        "library_s": None if library_s is None else round(library_s, 7),
        "over_library": None if library_s is None else round(library_s / ours_s, 4),
        "images_per_s": round(batch_size / ours_s, 2),
        "times": {"ours": summary(plain), "ours_looking": summary(looking)}
        | {key: summary(values) for key, values in others.items()},
    }


def measure_macs(model: nn.Module) -> int:
    return measure(model, torch.zeros(1, 3, 32, 32)).macs


def random_images(count: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.randint(10, (count,), generator=generator))


class TakingTurns(Batches):
    """Batches that, before each of them, stop the clock of the training loop and run its rivals."""

    rivals: Mapping[str, Callable[[], object]]
    clock: Callable[[], float]
    count: int
    own: list[float]
    times: dict[str, list[float]]
    since: float

    def start(self, rivals: Mapping[str, Callable[[], object]], clock: str, steps: int) -> None:
        """Name the rivals and the clock; an epoch ends once so many steps are timed."""
        self.rivals, self.clock, self.count = rivals, CLOCKS[clock], steps + 1
        self.own, self.times = [], {name: [] for name in rivals}

    def iterate(self, epoch: int, *, start: int = 0, parts: Parts | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches; the loop's own time runs from one request for a batch to the next."""
        self.since = self.clock()
        for batch in super().iterate(epoch, start=start, parts=parts):
            yield batch
            self.own.append(self.clock() - self.since)
            names = list(self.rivals) if len(self.own) > 1 else []
            for name in names if len(self.own) % 2 else names[::-1]:
                start = self.clock()
                self.rivals[name]()
                self.times[name].append(self.clock() - start)
            if len(self.own) == self.count:
                return
            self.since = self.clock()


def check_fits(batch_size: int, steps: int) -> None:
    """Raise SystemExit where so many steps, from the first look at clean images on, leave an epoch."""
    if (LOOK + steps + 1) * batch_size > EPOCH:
        said = f"{LOOK + steps + 1} steps of {batch_size} images are more than an epoch of {EPOCH:,}"
        raise SystemExit(f"{said}: time fewer of them (--steps), or smaller ones")


def _run(
    model: nn.Module,
    rivals: Mapping[str, Callable[[], object]],
    batch_size: int,
    attack_steps: int,
    steps: int,
    seed: int,
    clock: str,
) -> tuple[list[float], dict[str, list[float]]]:
    """Train for so many steps, with rivals between them; seconds of each step, and of each rival's.

    A step before them is not timed: it takes memory for the first time. The first of those that are looks at the clean
    images, as every `LOOK`th after it does.
    """
    check_fits(batch_size, steps)
    recipe = Recipe(batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    batches = TakingTurns(random_images(EPOCH, seed), batch_size, augment="crop-flip", generator=generator)
    batches.start(rivals, clock, steps)
    batches.epoch = 1
    train(
        model,
        batches,
        PGDAT(steps=attack_steps),
        THREAT,
        recipe,
        epochs=1,
        optimizer=make_optimizer(recipe, list(model.parameters()), lr=0.01),
        lr=0.01,
        schedule="constant",
        generator=torch.Generator().manual_seed(seed),
        ema=averaged(model, recipe.ema),
        start=LOOK - 1,
    )
    return batches.own[1:], batches.times


def step_seconds(model: nn.Module, batch_size: int, attack_steps: int, steps: int, seed: int) -> list[float]:
    """Seconds of each of so many steps of `train`, alone."""
    return _run(model, {}, batch_size, attack_steps, steps, seed, "wall")[0]


class BareStep:
    """The passes of one step and nothing else."""

    def __init__(self, model: nn.Module, attack_steps: int, batch_size: int, seed: int) -> None:
        images = random_images(batch_size, seed)
        self.x = images.as_float().to(memory_format=torch.channels_last)
        self.y = images.labels
        self.model, self.attack_steps = model, attack_steps
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )

    def __call__(self, attack_steps: int | None = None) -> None:
        """Make one step, with as many steps of the attack as given, else as planned."""
        self.model.eval()
        self.model.requires_grad_(False)  # or torch keeps what only their gradients would need
        for _ in range(attack_steps or self.attack_steps):
            x = self.x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(self.model(x), self.y), x)
        self.model.requires_grad_(True)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(F.cross_entropy(self.model(self.x), self.y))
        self.optimizer.step()


class PublicStep:
    """The same step as most public code writes it."""

    def __init__(self, model: nn.Module, attack_steps: int, batch_size: int, seed: int) -> None:
        images = random_images(batch_size, seed)
        self.x, self.y = images.as_float(), images.labels
        self.model, self.attack_steps = model, attack_steps
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def __call__(self, attack_steps: int | None = None) -> None:
        """Make one step, with as many steps of the attack as given, else as planned."""
        self.model.eval()
        delta = torch.zeros_like(self.x).uniform_(-THREAT.eps, THREAT.eps).requires_grad_()
        for _ in range(attack_steps or self.attack_steps):
            torch.autograd.backward(F.cross_entropy(self.model(torch.clamp(self.x + delta, 0, 1)), self.y))
            grad = delta.grad
            assert grad is not None
            moved = torch.clamp(delta.detach() + THREAT.eps / 4 * grad.sign(), -THREAT.eps, THREAT.eps)
            delta.data = torch.clamp(moved, -self.x, 1 - self.x)
            delta.grad = None
        self.model.train()
        self.optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(self.model(torch.clamp(self.x + delta.detach(), 0, 1)), self.y))
        self.optimizer.step()


def library_is_installed() -> bool:
    """Whether foolbox can be compared with; the toolkit itself never needs it."""
    return importlib.util.find_spec("foolbox") is not None


def library() -> Any:
    """The package foolbox, without what it says of the age of its own imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("foolbox")


class LibraryStep:
    """The same step, the images attacked by foolbox's PGD as its users call it."""

    def __init__(self, model: nn.Module, attack_steps: int, batch_size: int, seed: int) -> None:
        self.attacks, self.attack_steps = library().attacks, attack_steps
        images = random_images(batch_size, seed)
        self.x, self.y = images.as_float(), images.labels
        self.model = model.eval()
        self.wrapped = library().PyTorchModel(self.model, bounds=(0, 1), device="cpu")
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def __call__(self, attack_steps: int | None = None) -> None:
        """Make one step, with as many steps of the attack as given, else as planned."""
        self.model.eval()
        attack = self.attacks.LinfPGD(abs_stepsize=THREAT.eps / 4, steps=attack_steps or self.attack_steps)
        _, attacked, _ = attack(self.wrapped, self.x, self.y, epsilons=THREAT.eps)
        self.model.train()
        self.optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(self.model(attacked), self.y))
        self.optimizer.step()


def markdown(value: Mapping[str, Any]) -> str:
    """The table, and where it comes from."""
    head = (
        "model",
        "MMACs",
        "batch",
        "PGD steps",
        "timed",
        "ours s",
        "bare s",
        "public s",
        "efficiency",
        "speed-up",
        "library",
        "images/s",
    )
    rows = [
        (
            row["model"],
            f"{row['macs'] / 1e6:.1f}",
            str(row["batch_size"]),
            str(row["attack_steps"]),
            str(row["times"]["bare"]["n"]),
            f"{row['ours_s']:.3f}",
            f"{row['bare_s']:.3f}",
            f"{row['public_s']:.3f}",
            f"{row['efficiency']:.3f}",
            f"{row['speed_up']:.2f}x",
            "-" if row.get("over_library") is None else f"{row['over_library']:.2f}x",
            f"{row['images_per_s']:.1f}",
        )
        for row in value["results"]
    ]
    others = {
        f"`{row['command']}`; commit {str(row['commit'])[:10]}"
        for row in value["results"]
        if row.get("command", value["command"]) != value["command"]
    }
    said = "\n\n" + "\n".join(f"- rows kept from: {origin}" for origin in sorted(others)) if others else ""
    return f"{table(head, rows)}\n\n{provenance(value)}{said}"


def add_step_arguments(parser: argparse.ArgumentParser, *, batch_size: int, steps: int) -> None:
    """Add what says which steps are timed, with these defaults."""
    add = parser.add_argument
    add("--batch-size", type=positive, default=batch_size, help="images a step (default: %(default)s)")
    add("--attack-steps", type=positive, default=10, help="PGD steps (default: %(default)s)")
    add("--steps", type=positive, default=steps, help="steps timed of each kind (default: %(default)s)")


def build(name: str) -> nn.Module:
    """A network by "factory" or "factory@width"."""
    factory, _, width = name.partition("@")
    options: dict[str, Any] = {"width": float(width)} if width else {}
    return build_model(factory, **options)[0]


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.training_step --models resnet8 --steps 20")
    add_out(parser, MODULE)
    said = f"factory[@width][:batch[:steps]] (default: {' '.join(MODELS)}; with --full: {' '.join(FULL_CELLS)})"
    parser.add_argument("--models", nargs="+", help=said)
    add_step_arguments(parser, batch_size=128, steps=20)
    parser.add_argument("--full", action="store_true", help="networks of full width, into a file of their own")
    parser.add_argument("--keep", action="store_true", help="keep the rows of other cells that the file holds")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall or processor time (default: wall)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
