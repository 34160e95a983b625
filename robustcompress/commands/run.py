"""`robustcompress run`: a run that a YAML recipe declares."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustcompress.api import carry_out
from robustcompress.certify import save_certificate
from robustcompress.commands.certify import CACHE
from robustcompress.commands.certify import shown as shown_certificate
from robustcompress.commands.keeping import (
    add_keeping_arguments,
    checkpoint_of,
    discard,
    if_stopped,
    is_finished,
    is_result,
    kept_in,
)
from robustcompress.data import DataSplits
from robustcompress.distributed import ALONE, World, current, start
from robustcompress.errors import DiskError, InputError
from robustcompress.interrupt import listen
from robustcompress.lock import held
from robustcompress.outcome import sweep
from robustcompress.recipe import RunRecipe, merged, parse_yaml, read_yaml
from robustcompress.recipe_text import without_places
from robustcompress.resolve import Request, epochs_for
from robustcompress.result import CompressResult, check_target, load
from robustcompress.series import AUTOATTACK
from robustcompress.terminal import NOTHING, Output, evaluation_bar, say, table
from robustcompress.train import resolve_device

__all__ = ["DESCRIPTION", "EXAMPLES", "NAME", "SUMMARY", "add_arguments", "if_stopped", "run"]

NAME = "run"
SUMMARY = "carry out a recipe: one YAML file that says everything about a run"
DESCRIPTION = """\
Carry out a recipe: compress as it says, attack the result as it says, and save it. Recipes that we stand behind are in
the project's `recipes/`; unknown keys are errors. A recipe names no code, so one from a stranger can be read safely."""
EXAMPLES = """\
examples:
  robustcompress run recipes/digits.yaml --out runs/digits
  robustcompress run recipes/digits.yaml --set seed=1 --set strategy=hydra --set budget.macs=0.25
  robustcompress run recipes/cifar10-small.yaml --set data.source=/data/cifar10 --check"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("recipe", type=Path, metavar="FILE", help="a YAML recipe")
    parser.add_argument(
        "--set",
        type=setting,
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="change a key of the recipe; dots lead inside, as in training.lr=0.05",
    )
    add_keeping_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--check", action="store_true", help="only check the recipe and its data, and show it in full")


def run(arguments: argparse.Namespace) -> Output:
    """Check, compress, judge, save."""
    world = start()
    recipe = world.together(lambda: _recipe(arguments))
    with held(arguments.out, checkpoint_of(arguments), world=world):
        return _carried_out(recipe, arguments, world)


def _recipe(arguments: argparse.Namespace) -> RunRecipe:
    value = read_yaml(arguments.recipe)
    for path, wanted in arguments.settings:
        value = merged(value, _nested(path, wanted))
    try:
        return RunRecipe.from_mapping(value)
    except InputError as error:
        raise InputError(f"{arguments.recipe}: {error}") from error


def _carried_out(recipe: RunRecipe, arguments: argparse.Namespace, world: World) -> Output:
    checkpoint, there = checkpoint_of(arguments), world.broadcast(is_result(arguments.out))
    recipe, data, request = world.together(lambda: _request(recipe, arguments, checkpoint, there=there))
    if request is None:
        return _shown(recipe)
    said = {"run": without_places(recipe.to_json())}
    if not is_finished(request, arguments.out, **said):
        trained = carry_out(request, progress=not arguments.quiet, keep=True)
        result = _judged(recipe, trained, data, arguments, checkpoint, said)
    elif world.first:
        result = load(arguments.out, model=request.model)
        say(f"{arguments.out} holds the finished result of this very command")
    if not world.first:
        return NOTHING
    curve = list(result.settings.get("curve", ()))
    saved = "nothing was saved: pass --out DIR to keep the model"
    if arguments.out is not None:
        saved = f"saved to {arguments.out}; next: robustcompress export --onnx {arguments.out}"
    # After the report is safe: a network that cannot be bounded is refused here.
    listen(ALONE)  # the other processes have gone home
    place = None if checkpoint is None else checkpoint / AUTOATTACK
    if arguments.out is not None and recipe.evaluate.certify is not None:
        place = kept_in(arguments.out, CACHE, "images")
    with contextlib.nullcontext() if arguments.quiet else evaluation_bar(recipe.strategy.name) as advance:
        certificate = recipe.certify(result, data, device=request.device, progress=advance, resume_dir=place)
    if certificate is not None and arguments.out is not None:
        save_certificate(arguments.out, certificate)
    discard(checkpoint)
    parts: list[Any] = [str(result), ""]
    if curve:
        rows = [[f"{point['eps']:.4g}", f"{100 * point['accuracy']:.1f}", f"{point['n']:.0f}"] for point in curve]
        parts += [table("security curve (PGD-20)", ["eps", "accuracy %", "images"], rows), ""]
    if certificate is not None:
        parts += [*shown_certificate(recipe.strategy.name, certificate), ""]
    document = result.to_json() | {
        "meets_budget": result.meets_budget,
        "recipe": recipe.to_json(),
        "curve": curve,
        "certificate": None if certificate is None else certificate.to_json(),
        "out": str(arguments.out) if arguments.out is not None else None,
    }
    return Output(document=document, parts=(*parts, saved))


def _request(
    recipe: RunRecipe, arguments: argparse.Namespace, checkpoint: Path | None, *, there: bool
) -> tuple[RunRecipe, DataSplits, Request | None]:
    """The recipe in full, its data, and what it asks for; None where it is only to be checked.

    Args:
        recipe: What is declared.
        arguments: Of the command.
        checkpoint: Where the run is recorded.
        there: Whether a result lies in the place of `--out` already.
    """
    device = resolve_device(arguments.device)
    if arguments.out is not None and not there and current().first:
        check_target(arguments.out)
    data = recipe.load_data()
    recipe = replace(recipe, epochs=recipe.epochs or epochs_for(data))
    if arguments.check:
        return recipe, data, None
    # With a checkpoint the network is saved once it has been attacked: until then the checkpoint holds it.
    first = None if there or checkpoint is not None else arguments.out
    return recipe, data, recipe.request(data, device=device, out=first, checkpoint=checkpoint)


def _judged(
    recipe: RunRecipe,
    result: CompressResult,
    data: DataSplits,
    arguments: argparse.Namespace,
    checkpoint: Path | None,
    said: dict[str, Any],
) -> CompressResult:
    """Attack the network as the recipe says, and save it with what came of that."""
    device = resolve_device(arguments.device)
    chunks = None if checkpoint is None else checkpoint / AUTOATTACK
    world = current()
    silent = arguments.quiet or not world.first
    with contextlib.nullcontext() if silent else evaluation_bar(recipe.strategy.name) as advance:
        report = recipe.judge(result, data, device=device, progress=advance, resume_dir=chunks, world=world)
    if curve := recipe.security_curve(result, data, device=device, world=world):
        said = said | {"curve": curve}
    result = replace(result, report=report, settings={**result.settings, **said})
    if arguments.out is not None:
        world.only_first(lambda: _save(result, arguments.out, checkpoint))
    return result


def _save(result: CompressResult, out: Path, checkpoint: Path | None) -> None:
    sweep(out)
    try:
        result.save(out, overwrite=checkpoint is None)
    except DiskError as error:
        kept = "" if checkpoint is None else f"; the checkpoint in {checkpoint} is kept: repeat the command then"
        raise DiskError(f"{error}{kept}") from error


def setting(text: str) -> tuple[tuple[str, ...], Any]:
    """An argparse type: read `a.b=value`; the value is YAML.

    Raises:
        argparse.ArgumentTypeError: It is no such thing.
    """
    path, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in path.split(".")):
        raise argparse.ArgumentTypeError(f"{text!r}: write key=value, such as epochs=5 or training.lr=0.05")
    try:
        return tuple(path.split(".")), parse_yaml(value)
    except ValueError:
        return tuple(path.split(".")), value


def _nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def _shown(recipe: RunRecipe) -> Output:
    import yaml

    document = recipe.to_json()
    text = yaml.safe_dump(document, sort_keys=False, width=100, default_flow_style=None, allow_unicode=True)
    return Output(document=document, parts=(text,))
