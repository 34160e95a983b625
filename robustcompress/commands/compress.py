"""`robustcompress compress`: a compact robust model from a reference, under a budget."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch

from robustcompress.api import carry_out
from robustcompress.budget import Budget
from robustcompress.commands import run as run_recipe
from robustcompress.commands.arguments import (
    add_data_arguments,
    add_extra_arguments,
    add_model_arguments,
    add_run_arguments,
    add_teaching_arguments,
    add_training_arguments,
    assignment,
    count_or_all,
    data_from,
    finetune_from,
    load_weights,
    names,
    objective_from,
    recipe_from,
    teacher_from,
)
from robustcompress.commands.keeping import (
    add_keeping_arguments,
    checkpoint_of,
    discard,
    if_stopped,
    is_finished,
    is_result,
)
from robustcompress.commands.run import setting
from robustcompress.distributed import World, current, start
from robustcompress.errors import InputError, Problems
from robustcompress.lock import held
from robustcompress.min_robust import Axis, MinRobust, trials_of
from robustcompress.models import build_model
from robustcompress.resolve import Request, resolve
from robustcompress.result import check_target, load
from robustcompress.robust import ThreatModel, attack_by_name
from robustcompress.strategies import Strategy, make_strategy
from robustcompress.terminal import NOTHING, Output, say
from robustcompress.train import resolve_device

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "if_stopped", "run"]

NAME = "compress"
SUMMARY = "make a compact, robust model"
DESCRIPTION = """\
Make a compact network that withstands attacks.

MODEL is a built-in model (`robustcompress list models`), a torchvision classifier (torchvision:resnet18), a network of
timm's (timm:resnet26; `robustcompress list timm`), or package.module:factory, a function of yours that returns an
nn.Module; it maps images in [0, 1] to logits. Or it is a recipe, a file ending in .yaml, that says everything: this is
`robustcompress run` then.

Several processes share the work where torchrun starts them:
  torchrun --nproc-per-node 2 -m robustcompress compress MODEL ..."""
EXAMPLES = """\
examples:
  robustcompress compress recipes/digits.yaml --set budget.macs=0.25 --out runs/digits
  robustcompress compress resnet8 --model-arg stem_stride=2 --epochs 5 --out runs/digits
  robustcompress compress resnet20 --data cifar10 --root data --strategy hydra --macs 0.5 --out runs/hydra
  robustcompress compress resnet20 --data cifar10 --root data --latency 0.5 --round-to 8 --out runs/fast
  robustcompress compress resnet20 --data cifar10 --root data --min-robust 0.45 --checkpoint runs/c --out runs/smallest
  robustcompress compress resnet20 --data cifar10 --max-latency-ms 4 --latency-table phone/times.json --out runs/phone
  robustcompress compress resnet18 --data photos --image-size 32 --max-params 1000000 --epochs 20 --out runs/photos
  robustcompress compress resnet8 --strategy grape --option order=random --option events=6 --eps 0.1
  robustcompress compress resnet8 --strategy hydra --option granularity=weight --density 0.1 --eps 0.1
  robustcompress compress resnet8 --strategy hydra --finetune rslad --eps 0.1
  robustcompress compress resnet18 --data cifar10 --objective rslad --teacher runs/wide --strategy uniform
  robustcompress compress resnet8 --strategy s2ap --option 'host={"name": "harp", "search": 0.2}' --eps 0.1
  robustcompress compress timm:vit_tiny_patch16_224 --model-arg img_size=32 --model-arg patch_size=4 --data cifar10
  robustcompress compress my_models:small_net --eps 0.5 --norm l2 --objective trades --attack-steps 7 --json"""


RECIPES = (".yaml", ".yml")
"""Suffixes by which a recipe is told from a model."""

KEYS = {
    "strategy": "strategy",
    "model_arg": "model.KEY",
    "option": "strategy.KEY",
    "eps": "threat.eps",
    "norm": "threat.norm",
    "objective": "objective",
    "objective_option": "objective.KEY",
    "attack_steps": "objective.steps",
    "finetune": "finetune",
    "finetune_option": "finetune.KEY",
    "teacher": "teacher",
    "training_option": "training.KEY",
    "pretrained_weights": "pretrained=true --set weights",
    "latency_table": "latency_table",
    "data": "data.source",
    "attacks": "evaluate.attacks",
    "test_images": "evaluate.images",
    **{key: key for key in ("epochs", "round_to", "seed")},
    **{key: f"training.{key}" for key in ("lr", "batch_size", "awp", "awp_warmup")},
    **{key: f"data.{key}" for key in ("root", "image_size", "train_limit", "test_limit", "extra", "extra_ratio")},
    "pseudo_label": "data.pseudo_label",
    **{field.name: f"budget.{field.name}" for field in fields(Budget)},
}
"""Where a recipe says what a flag says."""


class _Unsaid:
    """A default: told apart from the same value when that is given."""


class _UnsaidWhole(_Unsaid, int):
    pass


class _UnsaidNumber(_Unsaid, float):
    pass


class _UnsaidText(_Unsaid, str):
    pass


_UNSAID: dict[type, type] = {int: _UnsaidWhole, float: _UnsaidNumber, str: _UnsaidText}
_SAID = {unsaid: said for said, unsaid in _UNSAID.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    _add_arguments(parser)
    group = parser.add_argument_group("recipes", "where MODEL is a recipe")
    group.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="change a key of the recipe; dots lead inside, as in training.lr=0.05",
    )
    group.add_argument("--check", action="store_true", help="only check the recipe and its data, and show it in full")
    for action in parser._actions:
        if (kind := _UNSAID.get(type(action.default))) and action.default != argparse.SUPPRESS:
            action.default = kind(action.default)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--strategy", default="grape", help="`robustcompress list strategies` (default: %(default)s)")
    parser.add_argument(
        "--option", type=assignment, action="append", default=[], metavar="K=V", help="an option of the strategy"
    )
    add_keeping_arguments(parser)
    add_run_arguments(parser)
    budget = parser.add_argument_group("budget", "every limit given must hold; half the multiply-adds where none is")
    budget.add_argument("--macs", type=float, metavar="F", help="multiply-adds, as a fraction of the reference")
    budget.add_argument("--params", type=float, metavar="F", help="parameters, as a fraction of the reference")
    budget.add_argument("--max-macs", type=float, metavar="N", help="multiply-adds for one image")
    budget.add_argument("--max-params", type=float, metavar="N", help="parameters")
    budget.add_argument(
        "--latency", type=float, metavar="F", help="onnxruntime's time for one image, as a fraction of the reference"
    )
    budget.add_argument("--max-latency-ms", type=float, metavar="MS", help="onnxruntime's time for one image, here")
    budget.add_argument(
        "--latency-table",
        type=Path,
        metavar="FILE",
        help="times.json of another device (`robustcompress latency`): the latency is about that device then",
    )
    budget.add_argument(
        "--density", type=float, metavar="F", help="share of the weights that stay, for granularity=weight"
    )
    budget.add_argument(
        "--min-robust",
        type=float,
        metavar="F",
        help="look for the smallest model whose accuracy under attack stays at least this, as the lower end of its "
        "95%% interval; takes several compressions",
    )
    defaults = MinRobust(0.5)
    budget.add_argument("--smallest-by", choices=get_args(Axis), help="what smallest means (default: macs, or density)")
    budget.add_argument("--robust-attack", metavar="A", help=f"attack of --min-robust (default: {defaults.attack})")
    budget.add_argument(
        "--robust-images",
        type=count_or_all,
        default=defaults.images,
        metavar="N",
        help="choose on N validation images, or all (default: %(default)s)",
    )
    budget.add_argument(
        "--trials", type=int, metavar="N", help=f"compress N times at most (default: {defaults.trials})"
    )
    budget.add_argument("--round-to", type=int, metavar="N", help="widths become multiples of N (default: by size)")
    add_training_arguments(parser)
    add_teaching_arguments(parser)
    add_data_arguments(parser, default="the embedded handwritten digits")
    add_extra_arguments(parser)
    report = parser.add_argument_group("report")
    report.add_argument(
        "--attacks",
        type=names,
        default=("clean", "fgsm", "pgd-20"),
        metavar="A,B",
        help="what the report measures; add autoattack for robust accuracy proper (default: clean,fgsm,pgd-20)",
    )
    report.add_argument(
        "--test-images",
        type=count_or_all,
        default=1000,
        metavar="N",
        help="attack N test images, or all (default: 1000)",
    )


def run(arguments: argparse.Namespace) -> Output:
    """Check everything, compress, save; or carry a recipe out."""
    if arguments.model.lower().endswith(RECIPES):
        return _recipe(arguments)
    if arguments.settings or arguments.check:
        raise InputError(f"--set and --check are about recipes, and {arguments.model!r} is a model: give flags instead")
    for name, value in vars(arguments).items():
        if isinstance(value, _Unsaid):
            setattr(arguments, name, _SAID[type(value)](value))
    world = start()
    with held(arguments.out, checkpoint_of(arguments), world=world):
        return _compressed(arguments, world)


def _compressed(arguments: argparse.Namespace, world: World) -> Output:
    checkpoint, there = checkpoint_of(arguments), world.broadcast(is_result(arguments.out))
    request = world.together(lambda: _request(arguments, checkpoint, there=there))
    places: list[Path] = []
    if not is_finished(request, arguments.out):
        result = carry_out(request, progress=not arguments.quiet, on_saved=places.append)
    elif not world.first:
        return NOTHING
    else:
        result = load(arguments.out, model=request.model)
        places.append(arguments.out)
        say(f"{arguments.out} holds the finished result of this very command")
        discard(checkpoint)
    saved = "nothing was saved: pass --out DIR to keep the model"
    if places:
        saved = f"saved to {places[0]}; next: robustcompress export --onnx {places[0]}"
    document = result.to_json() | {
        "meets_budget": result.meets_budget,
        "out": str(places[0]) if places else None,
    }
    if request.budget.demand is not None:
        document["tried"] = [trial.to_json() for trial in trials_of(result.history)]
    return Output(document=document, parts=(str(result), "", saved))


def _request(arguments: argparse.Namespace, checkpoint: Path | None, *, there: bool) -> Request:
    """What is asked for; all that cannot work is listed.

    Args:
        arguments: Of the command.
        checkpoint: Where the run is recorded.
        there: Whether a result lies in the place of `--out` already.
    """
    problems = Problems("compress cannot start")
    strategy = problems.attempt(lambda: make_strategy(arguments.strategy, **dict(arguments.option)))
    threat = problems.attempt(lambda: ThreatModel(arguments.norm, arguments.eps))
    budget = problems.attempt(lambda: _budget(arguments, strategy))
    objective = problems.attempt(lambda: objective_from(arguments))
    finetune = problems.attempt(lambda: finetune_from(arguments))
    teacher = problems.attempt(lambda: teacher_from(arguments))
    recipe = problems.attempt(lambda: recipe_from(arguments))
    problems.attempt(lambda: resolve_device(arguments.device))
    for attack in arguments.attacks:
        problems.attempt(lambda attack=attack: attack_by_name(attack))  # type: ignore[misc]
    if arguments.out is not None and not there and current().first:
        problems.attempt(lambda: check_target(arguments.out))
    torch.manual_seed(arguments.seed)  # the reference's first weights belong to the seed
    built = problems.attempt(lambda: build_model(arguments.model, **dict(arguments.model_arg)))
    if built is not None and arguments.pretrained_weights is not None:
        problems.attempt(lambda: load_weights(built[0], arguments.pretrained_weights))
    data = problems.attempt(lambda: data_from(arguments, name=arguments.data, seed=arguments.seed))
    problems.raise_if_any()
    model, spec = built
    request = resolve(
        model=model,
        strategy=strategy,
        data=data,
        budget=budget,
        threat=threat,
        objective=objective,
        epochs=arguments.epochs,
        pretrained=arguments.pretrained_weights is not None,
        recipe=recipe,
        round_to=arguments.round_to,
        attacks=arguments.attacks,
        test_images=arguments.test_images,
        seed=arguments.seed,
        device=arguments.device,
        out=None if there else arguments.out,
        checkpoint=checkpoint,
        latency_table=arguments.latency_table,
        finetune=finetune,
        teacher=teacher,
    )
    return replace(request, spec=spec)  # a factory of the user's own is known here, though not from the model alone


def _recipe(arguments: argparse.Namespace) -> Output:
    """Carry the recipe out, unless there are flags of which it says its own."""
    own, shared = argparse.ArgumentParser(), argparse.ArgumentParser()
    _add_arguments(own)
    run_recipe.add_arguments(shared)
    common = {action.dest for action in shared._actions}
    problems = Problems(f"{arguments.model} is a recipe, which says what these flags say")
    for action in own._actions:
        given = getattr(arguments, action.dest, action.default)
        told = not isinstance(given, _Unsaid) if type(action.default) in _UNSAID else given != action.default
        if action.option_strings and action.dest not in common and told:
            flag = action.option_strings[-1]
            key = KEYS.get(action.dest)
            problems.add(f"{flag}: " + (f"write --set {key}=VALUE" if key else "leave it out, or change the recipe"))
    problems.raise_if_any()
    arguments.recipe = Path(arguments.model)
    return run_recipe.run(arguments)


def _budget(arguments: argparse.Namespace, strategy: Strategy | None) -> Budget:
    limits = {field.name: getattr(arguments, field.name) for field in fields(Budget)}
    told: dict[str, Any] = {
        "axis": arguments.smallest_by,
        "attack": arguments.robust_attack,
        "trials": arguments.trials,
    }
    told = {name: value for name, value in told.items() if value is not None}
    if limits["min_robust"] is not None:
        sparse = strategy is not None and strategy.granularity == "weight"
        axis = {"axis": "density"} if sparse else {}
        limits["min_robust"] = MinRobust(limits["min_robust"], **axis | told, images=arguments.robust_images)
    elif told or arguments.robust_images != MinRobust(0.5).images:
        raise InputError(
            "--smallest-by, --robust-attack, --robust-images and --trials go with --min-robust: give it too"
        )
    return Budget(**limits) if any(limit is not None for limit in limits.values()) else Budget(macs=0.5)
