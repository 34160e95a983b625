"""`robustcompress inspect`: the channel groups of a model and what each costs; the searches of results, compared."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.budget import CostModel, human, measure
from robustcompress.commands.arguments import assignment
from robustcompress.errors import Problems
from robustcompress.models import build_model
from robustcompress.result import RESULT, CompressResult, load
from robustcompress.search_plot import plot_search, search_records
from robustcompress.stability import stability
from robustcompress.structure import Bypass, ChannelGroup, StructuralEditor
from robustcompress.terminal import Output, table

NAME = "inspect"
SUMMARY = "show the channel groups of a model, or compare what searches kept"
DESCRIPTION = """\
Show which channels of a model can only change together, how wide each group is, and what one channel of it costs.

MODEL is what `robustcompress compress` takes, or the directory of a saved result.

For several results: how far their masks are apart, as normalised Hamming distances. Between results that were not cut
out of one pretrained network, expect the distance of chance. --plot draws the searches of results that learnt scores;
more is recorded for it where the strategy was given the option diagnose=True."""
EXAMPLES = """\
examples:
  robustcompress inspect resnet20
  robustcompress inspect torchvision:squeezenet1_1 --image-size 64
  robustcompress inspect resnet8 --model-arg width=0.5 --json
  robustcompress inspect runs/digits
  robustcompress inspect runs/hydra runs/s2ap --plot search.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL|DIR", help="a model's name, or directories of saved results"
    )
    parser.add_argument(
        "--model-arg", type=assignment, action="append", default=[], metavar="K=V", help="an argument of its factory"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="pixels a side (default: 32, or those of the saved result)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the searches of saved results: .png, .pdf, .svg"
    )


def run(arguments: argparse.Namespace) -> Output:
    """Trace the model and list its groups; or compare results."""
    results = _results(arguments)
    if len(arguments.models) > 1:
        output = _compared(results)
    else:
        output = _groups(arguments, arguments.models[0], next(iter(results.values()), None))
    if arguments.plot is None:
        return output
    names = _short(results)
    path = plot_search({names[name]: result for name, result in results.items()}, arguments.plot)
    document = {**output.document, "plot": str(path)}
    return Output(document=document, parts=(*output.parts, f"the searches are drawn in {path}"))


def _results(arguments: argparse.Namespace) -> dict[str, CompressResult]:
    """By directory, the results that are named; all that are named must be some where several are, or a plot is."""
    several = len(arguments.models) > 1
    problems = Problems("inspect cannot start")
    if several and (arguments.model_arg or arguments.image_size is not None):
        problems.add("--model-arg and --image-size say what one model looks like: leave them out for several results")
    elif arguments.model_arg and (Path(arguments.models[0]) / RESULT).is_file():
        problems.add("--model-arg is for a model: a result knows its own")
    if arguments.image_size is not None and arguments.image_size < 1:
        problems.add(f"--image-size {arguments.image_size}: must be positive")
    for name in arguments.models:
        if (several or arguments.plot is not None) and not (Path(name) / RESULT).is_file():
            problems.add(f"{name} holds no {RESULT}: name the directories of saved results")
        if sum(Path(other).resolve() == Path(name).resolve() for other in arguments.models) > 1:
            problems.add(f"{name} is named twice: name each result once")
    problems.raise_if_any()
    return {name: load(name) for name in arguments.models if (Path(name) / RESULT).is_file()}


def _compared(results: Mapping[str, CompressResult]) -> Output:
    found = stability(results)
    names = _short(results)
    rows = [
        (
            names[name],
            *("-" if name == other else f"{value:.4f}" for other, value in zip(found.names, row, strict=True)),
        )
        for name, row in zip(found.names, found.matrix, strict=True)
    ]
    title = "Normalised Hamming distances between masks"
    summary = f"mean {found.mean:.4f}; masks of these sizes drawn at random would be {found.chance:.4f} apart"
    parts = [table(title, ("result", *names.values()), rows, left=("result",)), summary]
    searches = {name: records for name, result in results.items() if (records := search_records(result))}
    if searches:
        parts.append(_searches({names[name]: records for name, records in searches.items()}))
    return Output(document={"hamming": found.to_json(), "searches": searches}, parts=tuple(parts))


def _short(results: Mapping[str, CompressResult]) -> dict[str, str]:
    """The last part of each directory where that tells them apart."""
    short = {name: Path(name).resolve().name for name in results}
    return short if len(set(short.values())) == len(short) else {name: name for name in results}


MEASURES = {
    "hamming": ("bits changed", ".4f"),
    "top_eigenvalue": ("top eigenvalue", ".4g"),
    "sharpness": ("sharpness", ".4f"),
    "mask_clean": ("mask clean", ".3f"),
    "mask_robust": ("mask PGD-10", ".3f"),
}
"""What is shown of the last epoch of a search, and how."""


def _searches(searches: Mapping[str, list[Mapping[str, Any]]]) -> Any:
    """The last epoch of each search: a table of what was recorded of any."""
    last = {name: records[-1] for name, records in searches.items()}
    shown = {key: look for key, look in MEASURES.items() if any(key in record for record in last.values())}
    rows = [
        (name, *(format(record[key], digits) if key in record else "-" for key, (_, digits) in shown.items()))
        for name, record in last.items()
    ]
    return table("Last epoch of the search", ("result", *(head for head, _ in shown.values())), rows, left=("result",))


def _groups(arguments: argparse.Namespace, name: str, result: CompressResult | None) -> Output:
    model, shape = _model(arguments, name, result)
    example = torch.zeros(2, *shape)
    editor = StructuralEditor(model, example)
    cost, model_of_cost = measure(model, example), CostModel(editor, example)
    now = model_of_cost.predict(editor.widths)
    groups = [_describe(group, model_of_cost, editor.widths, now) for group in editor.groups.values()]
    rows = [
        (
            group["name"],
            group["kind"],
            str(group["width"]),
            human(group["macs_per_channel"]),
            human(group["params_per_channel"]),
            "yes" if group["editable"] else f"no: {group['reason']}",
        )
        for group in groups
    ]
    title = f"{name}, images 3x{shape[1]}x{shape[2]}"
    columns = ("group", "kind", "width", "MACs/channel", "params/channel", "editable")
    editable = sum(group["editable"] for group in groups)
    totals = (
        f"{human(cost.macs)} MACs, {human(cost.params)} parameters, {human(cost.size)}B; "
        f"{editable} of {len(groups)} groups can be edited"
    )
    document = {
        "model": name,
        "image_shape": list(shape),
        "cost": cost.to_json(),
        "groups": groups,
        "bypassable": list(editor.bypassable),
    }
    blocks = f"blocks that can be bypassed: {', '.join(editor.bypassable) or 'none'}"
    parts = [table(title, columns, rows, left=("group", "kind", "editable")), totals, blocks]
    parts += filter(None, [cost.note])
    if result is not None and (gone := [edit.module for edit in result.edits if isinstance(edit, Bypass)]):
        document["bypassed"] = gone
        parts.append(f"blocks that have left: {', '.join(gone)}")
    if result is not None and (records := search_records(result)):
        document["search"] = records
        parts.append(_searches({name: records}))
    return Output(document=document, parts=tuple(parts))


def _model(
    arguments: argparse.Namespace, name: str, result: CompressResult | None
) -> tuple[nn.Module, tuple[int, int, int]]:
    size = arguments.image_size
    if result is not None:
        _, height, width = result.image_shape
        return result.model, (3, size or height, size or width)
    model, _ = build_model(name, **dict(arguments.model_arg))
    return model, (3, size or 32, size or 32)


def _describe(
    group: ChannelGroup, costs: CostModel, widths: dict[str, int], now: tuple[float, float]
) -> dict[str, Any]:
    fewer = costs.predict({**widths, group.name: group.width - 1})
    return {
        "name": group.name,
        "kind": group.kind,
        "width": group.width,
        "min_width": group.min_width,
        "macs_per_channel": round(now[0] - fewer[0]),
        "params_per_channel": round(now[1] - fewer[1]),
        "editable": group.editable,
        "reason": group.reason,
        "members": [f"{axis.module}:{axis.side}" for axis in group.members],
    }
