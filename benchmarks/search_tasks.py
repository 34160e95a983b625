"""What is every compact network within a few small robust teachers worth? Measured once, on images.

A space is a teacher and a budget. A teacher is a network trained adversarially on one data set at one radius: resnet8,
resnet20 at half its width and, for the digits alone, wrn_16_4 at an eighth of it; on the embedded digits at 16x16
(radii 16/255 and 32/255) and on 1,000 CIFAR-10 images (JPEG; 4/255 and 8/255). Every teacher has the budget 0.5, every
second one 0.75 too. Of the space of `rcnas` some options are left out, so that all networks of it can be looked at: of
9 widths a stage 5 (resnet8) or 3 stay, of its depths the least and the whole.

Each network is evaluated by the ladder of `rcnas`: it inherits channels, its batch-norm statistics are estimated, it
recovers for 20 steps of 32 images and is attacked by PGD-10 on 160 held-out images. The networks in the upper quarter
by what a search would go by are looked at a second time with other batches and noise: a search sees the first look,
and is judged by the second (see `search_meta`).

A file a space, written while it grows: a killed run goes on, and skips what is there. Teachers are kept beside them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import robustcompress as rc
from benchmarks.common import RESULTS, make_parser, read_json, record, threads, write_json
from robustcompress.checkpoint.disk import save_tensors
from robustcompress.reach import default_rounding
from robustcompress.robust.objectives import FGSMRS
from robustcompress.search.domain import Config, Domain
from robustcompress.search.evaluate import Job
from robustcompress.search.hunt import FIRST_LOOK
from robustcompress.search.space import Space
from robustcompress.session import Goal, Session
from robustcompress.strategies.rcnas import RCNAS

MODULE = "search_tasks"
WIDTHS = {"resnet8": (0, 2, 4, 6, 8), "resnet20": (0, 4, 8), "wrn_16_4": (0, 4, 8)}
"""By network, the numbers of the width options that stay; of depths the first and the last stay."""

SHRUNK = {"resnet8": 1.0, "resnet20": 0.5, "wrn_16_4": 0.125}
RADII = {"digits": (16, 32), "cifar10": (4, 8)}
EPOCHS = {"digits": 6, "cifar10": 30}
STEM_STRIDE = {"digits": 2, "cifar10": 4}
ALPHAS = {"clean": 0.0, "pgd": 0.7}
"""By attack, what robust accuracy counts in the reward, as `RCNAS.alpha`."""

EVERY_S = 20.0
RECIPE = rc.Recipe(batch_size=32, val_images=160)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One space.

    Attributes:
        data: "digits" or "cifar10".
        network: The teacher's.
        eps: Radius in 1/255.
        budget: Share of its multiply-adds.
    """

    data: str
    network: str
    eps: int
    budget: float

    @property
    def teacher(self) -> str:
        """Name of the teacher."""
        return f"{self.data}-{self.network}-{self.eps}"

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.teacher}-{self.budget:g}"


def settings() -> list[Setting]:
    """All spaces, those of the budget that all teachers have first."""
    found = []
    for (i, data), (j, network), k in itertools.product(enumerate(RADII), enumerate(SHRUNK), range(2)):
        if (data, network) != ("cifar10", "wrn_16_4"):
            for budget in (0.5, 0.75)[: 1 + (i + j + k + 1) % 2]:
                found.append(Setting(data=data, network=network, eps=RADII[data][k], budget=budget))
    return sorted(found, key=lambda setting: setting.budget)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.quick and options.out is None:
        raise SystemExit("--quick gives no figure worth keeping: say --out DIR, so that no committed result is lost")
    out = RESULTS / MODULE if options.out is None else options.out
    chosen = [s for s in settings() if options.only is None or s.name in options.only]
    if options.quick:
        chosen = chosen[:1]
    with threads(options.threads):
        for look in (0, 1):
            for setting in chosen:
                fill(setting, look, out, options, argv)
    return 0


def fill(setting: Setting, look: int, out: Path, options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Look at every network of a space that is to be looked at and was not yet."""
    path = out / f"{setting.name}.json"
    rows = read_rows(path)
    if rows is not None and not missing(rows, look):
        return
    session, space, shown = opened(setting, out / ".state", options.seed, quick=options.quick)
    if rows is None:
        rows = laid_out(setting, session, space, shown)
    architectures = dict(zip(rows["networks"], rows["first"], strict=True))
    evaluator = RCNAS().evaluator(session)
    written = started = time.monotonic()
    todo = missing(rows, look)[: 3 if options.quick else None]
    for place, number in enumerate(todo):
        config = tuple(architectures[rows["networks"][number]])
        steps = 1 if options.quick else RCNAS().recovery_steps
        job = Job(space.project(config), steps, FIRST_LOOK, 1_000_000 * look + number)
        outcome = evaluator.evaluate(job)
        rows["looks"][look][number] = [round(outcome.clean, 6), round(outcome.robust, 6)]
        if place == len(todo) - 1 or time.monotonic() > written + EVERY_S:
            write_json(path, record(MODULE, options, argv, rows, data={"name": setting.data, "sha256": rows["sha256"]}))
            written = time.monotonic()
    each = (time.monotonic() - started) / max(1, len(todo))
    print(f"{setting.name}: look {look + 1} at {len(todo)}, {each:.2f} s each", file=sys.stderr, flush=True)


def read_rows(path: Path) -> dict[str, Any] | None:
    """The rows of a file, if it is there."""
    return read_json(path)["results"] if path.exists() else None


def missing(rows: dict[str, Any], look: int) -> list[int]:
    """Numbers of the networks to look at: all at first, then the upper quarter by any of the rewards."""
    first, again = rows["looks"]
    if look == 0:
        return [number for number, found in enumerate(first) if found is None]
    if any(found is None for found in first):
        return []
    wanted: set[int] = set()
    for alpha in ALPHAS.values():
        worth = [reward(found, rows["task"], alpha) for found in first]
        least = sorted(worth)[3 * len(worth) // 4]
        wanted |= {number for number, value in enumerate(worth) if value >= least}
    return [number for number in sorted(wanted) if again[number] is None]


def reward(found: Sequence[float], task: dict[str, Any], alpha: float) -> float:
    """What `rcnas` makes of clean and robust accuracy: over the teacher's, weighted as exponents."""
    floor = 0.01
    clean, robust = found[0] / max(floor, task["clean"]), found[1] / max(floor, task["robust"])
    return float(robust**alpha * clean ** (1 - alpha))


def laid_out(setting: Setting, session: Session, space: Space, shown: list[tuple[int, ...]]) -> dict[str, Any]:
    """A space without a look at it: its coordinates, its networks, and which network each configuration is."""
    domain = space.domain
    numbers: dict[str, int] = {}
    first: list[Config] = []
    configs = []
    for config in itertools.product(*shown):
        key = space.project(config).key
        if key not in numbers:
            numbers[key] = len(numbers)
            first.append(config)
        configs.append(numbers[key])
    return {
        **asdict(setting),
        "sha256": session.goal.data.sha256,
        "images": {"train": len(session.goal.data.train), "val": len(session.goal.data.val)},
        "task": asdict(domain.task),
        "tokens": [asdict(token) for token in domain.tokens],
        "coordinates": [
            {"stage": c.stage, "kind": c.kind, "options": [c.options[option] for option in kept]}
            for c, kept in zip(domain.coordinates, shown, strict=True)
        ],
        "networks": list(numbers),
        "first": [list(config) for config in first],
        "configs": configs,
        "looks": [[None] * len(numbers), [None] * len(numbers)],
    }


def opened(setting: Setting, cache: Path, seed: int, *, quick: bool) -> tuple[Session, Space, list[tuple[int, ...]]]:
    """The teacher with its budget, its space, and of every coordinate the numbers of the options that are looked at."""
    torch.manual_seed(seed)
    data = images(setting.data, seed)
    model, _ = rc.build_model(
        setting.network,
        num_classes=data.num_classes,
        width=SHRUNK[setting.network],
        stem_stride=STEM_STRIDE[setting.data],
    )
    path = cache / f"{setting.teacher}.safetensors"
    if path.exists():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(path))
    example = torch.zeros(2, *data.image_shape)
    editor = rc.StructuralEditor(model, example, seed=seed)
    session = Session(
        model,
        editor,
        example,
        Goal(
            data=data,
            threat=rc.ThreatModel("linf", setting.eps / 255),
            objective=FGSMRS(),
            budget=rc.Budget(macs=setting.budget),
            reference=rc.measure(model, example),
            epochs=1 if quick else EPOCHS[setting.data],
            recipe=RECIPE,
            seed=seed,
            pretrained=path.exists(),
            round_to=default_rounding(editor),
        ),
    )
    if not path.exists():
        session.train("teacher", share=1.0)
        session.settle()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {name: value.contiguous() for name, value in model.state_dict().items()}, {})
        return opened(setting, cache, seed, quick=quick)  # as every other space of this teacher begins
    space = RCNAS().lay_out(session)
    places = range(len(space.domain.coordinates))
    return session, space, [kept(space.domain, place, setting.network) for place in places]


def kept(domain: Domain, place: int, network: str) -> tuple[int, ...]:
    """Numbers of the options of a coordinate that are looked at."""
    coordinate = domain.coordinates[place]
    return WIDTHS[network] if coordinate.kind == "width" else (0, len(coordinate.options) - 1)


def images(name: str, seed: int) -> rc.DataSplits:
    """The data set's images: of CIFAR-10 1,000 training images, of which a fifth is held out."""
    if name == "digits":
        return rc.load_data("digits", image_size=16, val_fraction=0.15, seed=seed)
    return rc.load_data(Path("data") / "cifar10", train_limit=1000, test_limit=20, val_fraction=0.2, seed=seed)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.search_tasks --only digits-resnet8-16-0.5")
    parser.add_argument("--out", type=Path, help=f"directory (default: benchmarks/results/{MODULE})")
    parser.add_argument("--only", nargs="+", metavar="SPACE", choices=[s.name for s in settings()], help="these spaces")
    return parser


if __name__ == "__main__":
    sys.exit(main())
