"""`robustcompress run`: a run that a YAML recipe declares."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from robustcompress.certify import save_certificate
from robustcompress.commands.certify import shown as shown_certificate
from robustcompress.errors import InputError
from robustcompress.recipe import RunRecipe, merged, parse_yaml, read_yaml
from robustcompress.recipe_text import without_places
from robustcompress.resolve import epochs_for
from robustcompress.result import check_target
from robustcompress.terminal import Output, evaluation_bar, table
from robustcompress.train import resolve_device

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
    parser.add_argument("--out", type=Path, metavar="DIR", help="save the result here; must not exist")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="keep a checkpoint here; the same command then goes on from it"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--check", action="store_true", help="only check the recipe and its data, and show it in full")


def run(arguments: argparse.Namespace) -> Output:
    """Check, compress, judge, save."""
    value = read_yaml(arguments.recipe)
    for path, wanted in arguments.settings:
        value = merged(value, _nested(path, wanted))
    try:
        recipe = RunRecipe.from_mapping(value)
    except InputError as error:
        raise InputError(f"{arguments.recipe}: {error}") from error
    device = resolve_device(arguments.device)
    if arguments.out is not None:
        check_target(arguments.out)
    data = recipe.load_data()
    recipe = replace(recipe, epochs=recipe.epochs or epochs_for(data))
    if arguments.check:
        return _shown(recipe)
    result = recipe.run(
        data,
        device=device,
        progress=not arguments.quiet,
        out=arguments.out,
        checkpoint=arguments.checkpoint,
    )
    if arguments.quiet:
        report = recipe.judge(result, data, device=device)
    else:
        with evaluation_bar(recipe.strategy.name) as advance:
            report = recipe.judge(result, data, device=device, progress=advance)
    curve = recipe.security_curve(result, data, device=device)
    said = {"run": without_places(recipe.to_json()), **({"curve": curve} if curve else {})}
    result = replace(result, report=report, settings={**result.settings, **said})
    saved = "nothing was saved: pass --out DIR to keep the model"
    if arguments.out is not None:
        result.save(arguments.out, overwrite=True)  # now with the report; the network was saved before it was attacked
        saved = f"saved to {arguments.out}; next: robustcompress export --onnx {arguments.out}"
    # After the report is safe: a network that cannot be bounded is refused here.
    with contextlib.nullcontext() if arguments.quiet else evaluation_bar(recipe.strategy.name) as advance:
        certificate = recipe.certify(result, data, device=device, progress=advance)
    if certificate is not None and arguments.out is not None:
        save_certificate(arguments.out, certificate)
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
