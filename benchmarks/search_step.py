"""What one step of a score search costs, and what S2AP adds to it.

On one network, for channels and for single weights, four kinds of step take turns on the same batch, so that load and
drift hit all of them alike:
  train   PGD adversarial training of all weights, the measure of the others
  hydra   a step of HYDRA's search: the attack and the loss under the masks, scores and batch-norm affines trained
  s2ap    the same with S2AP's ascent in the scores, its radius chosen before (as it is once an epoch)
  harp    a step of HARP's search: rates and their cost besides
Medians of processor time, which a busy machine disturbs least; "s2ap over hydra" is their ratio. By its passes a step
of K attack steps costs 2 K + 3 forward passes, and S2AP's ascent 3 more: at K = 10 that is 13 %. (Reported for the
paper: about 15 %.) Random bytes for images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks.common import (
    add_out,
    interleaved,
    make_parser,
    out_path,
    provenance,
    record,
    summary,
    table,
    threads,
    write_json,
)
from benchmarks.training_step import THREAT, add_step_arguments, build, measure_macs, random_images
from robustcompress import Budget, Recipe, load_data, measure
from robustcompress.goal import Goal
from robustcompress.robust import PGDAT
from robustcompress.session import Session
from robustcompress.strategies.base import Granularity
from robustcompress.strategies.harp import LearnedTopK, Price, PricedObjective, Rates
from robustcompress.strategies.scores import norm_parameters
from robustcompress.strategies.units import granular
from robustcompress.structure import StructuralEditor
from robustcompress.structure.masks import ScoreMasks, TopK
from robustcompress.train import make_optimizer
from robustcompress.train.ascent import Ascent, forward_backward
from robustcompress.train.frozen import frozen_but
from robustcompress.train.score_ascent import ScoreAscent

MODULE = "search_step"
MODELS = ("resnet8", "resnet20")
BUDGETS: Mapping[str, Budget] = {"channel": Budget(macs=0.5), "weight": Budget(density=0.1)}
Step = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    path = out_path(options, MODULE)
    if options.quick:
        options.models, options.batch_size, options.attack_steps, options.steps = ["resnet8"], 8, 2, 2
    results = []
    with threads(options.threads):
        for name in options.models:
            for granularity in get_args(Granularity):
                row = compare(
                    name,
                    granularity,
                    batch_size=options.batch_size,
                    attack_steps=options.attack_steps,
                    steps=options.steps,
                    seed=options.seed,
                )
                results.append(row)
                print(f"{name}, {granularity}: {row['s2ap_over_hydra']:.3f}", file=sys.stderr, flush=True)
    value = record(MODULE, options, argv, results)
    write_json(path, value)
    print(markdown(value))
    return 0


def compare(
    name: str, granularity: Granularity, *, batch_size: int, attack_steps: int, steps: int, seed: int
) -> dict[str, Any]:
    """Time the four kinds of step on one network."""
    torch.manual_seed(seed)
    model = build(name)
    images = random_images(batch_size, seed)
    x, y = images.as_float(), images.labels
    with contextlib.ExitStack() as stack:
        made: dict[str, Step] = {"train": _training(copy.deepcopy(model), x, y, attack_steps)}
        for kind in ("hydra", "s2ap", "harp"):
            session = _session(copy.deepcopy(model), BUDGETS[granularity], attack_steps, seed)
            made[kind] = stack.enter_context(_searching(session, granularity, x, y, kind))
        times = interleaved(made, steps, clock=time.process_time)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        "model": name,
        "granularity": granularity,
        "macs": measure_macs(model),
        "batch_size": batch_size,
        "attack_steps": attack_steps,
        "times": {kind: summary(values) for kind, values in times.items()},
        "hydra_over_train": round(medians["hydra"] / medians["train"], 4),
        "s2ap_over_hydra": round(medians["s2ap"] / medians["hydra"], 4),
        "harp_over_hydra": round(medians["harp"] / medians["hydra"], 4),
    }


def _session(model: nn.Module, budget: Budget, attack_steps: int, seed: int) -> Session:
    example = torch.zeros(2, 3, 32, 32)
    editor = StructuralEditor(model, example)
    goal = Goal(
        data=load_data("digits", train_limit=64),
        threat=THREAT,
        objective=PGDAT(steps=attack_steps),
        budget=budget,
        reference=measure(model, example),
        epochs=1.0,
        recipe=Recipe(batch_size=16),
        seed=seed,
        pretrained=True,
        round_to=1,
    )
    return Session(model, editor, example, goal)


def _training(model: nn.Module, x: Tensor, y: Tensor, attack_steps: int) -> Step:
    optimizer = make_optimizer(Recipe(), list(model.parameters()), lr=0.01)
    return _stepping(model, PGDAT(steps=attack_steps), optimizer, None, x, y)


@contextlib.contextmanager
def _searching(session: Session, granularity: Granularity, x: Tensor, y: Tensor, kind: str) -> Iterator[Step]:
    """A step of a search, under its masks."""
    units = granular(session, granularity=granularity)
    first = units.first_scores(units.magnitudes())
    objective: Any = session.goal.objective
    rule: Any = TopK(units.counts)
    extra: list[nn.Parameter] = []
    if kind == "harp":
        rates = Rates(session, units, floor=0.1)
        rule, extra = LearnedTopK(rates), rates.parameters()
        objective = PricedObjective(Price(objective, rates, weight=0.1, steps=100))
    norms = norm_parameters(session.model)
    with units.gates(first, rule) as gates, frozen_but(session.model, [*gates.parameters(), *norms]):
        optimizer = torch.optim.Adam([*gates.parameters(), *norms, *extra], lr=0.001)
        ascent = _ascent(gates) if kind == "s2ap" else None
        yield _stepping(session.model, objective, optimizer, ascent, x, y)


def _ascent(gates: ScoreMasks) -> Ascent:
    return ScoreAscent(gates, gamma=None, flips=0.01)


def _stepping(
    model: nn.Module, objective: Any, optimizer: torch.optim.Optimizer, ascent: Ascent | None, x: Tensor, y: Tensor
) -> Step:
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        forward_backward(
            model, x, y, objective, THREAT, generator=generator, precision=contextlib.nullcontext(), ascent=ascent
        )
        optimizer.step()

    return step


def markdown(value: Mapping[str, Any]) -> str:
    """The table."""
    head = ("model", "granularity", "batch", "PGD steps", "train s", "hydra / train", "s2ap / hydra", "harp / hydra")
    rows = [
        (
            row["model"],
            row["granularity"],
            str(row["batch_size"]),
            str(row["attack_steps"]),
            f"{row['times']['train']['median']:.3f}",
            f"{row['hydra_over_train']:.3f}",
            f"{row['s2ap_over_hydra']:.3f}",
            f"{row['harp_over_hydra']:.3f}",
        )
        for row in value["results"]
    ]
    return f"{table(head, rows)}\n\n{provenance(value)}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(MODULE, __doc__, example="python -m benchmarks.search_step --models resnet8 --steps 20")
    add_out(parser, MODULE)
    said = "factory or factory@width (default: %(default)s)"
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=said)
    add_step_arguments(parser, batch_size=64, steps=15)
    return parser


if __name__ == "__main__":
    sys.exit(main())
