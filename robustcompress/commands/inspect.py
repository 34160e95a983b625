"""`robustcompress inspect`: the channel groups of a model, and what each costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustcompress.budget import CostModel, human, measure
from robustcompress.commands.arguments import assignment
from robustcompress.errors import InputError
from robustcompress.models import build_model
from robustcompress.result import RESULT, load
from robustcompress.structure import ChannelGroup, StructuralEditor
from robustcompress.terminal import Output, table

NAME = "inspect"
SUMMARY = "show the channel groups of a model"
DESCRIPTION = """\
Show which channels of a model can only change together, how wide each group is, and what one channel of it costs.

MODEL is what `robustcompress compress` takes, or the directory of a saved result."""
EXAMPLES = """\
examples:
  robustcompress inspect resnet20
  robustcompress inspect torchvision:squeezenet1_1 --image-size 64
  robustcompress inspect resnet8 --model-arg width=0.5 --json
  robustcompress inspect runs/digits"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("model", metavar="MODEL|DIR", help="a model's name, or the directory of a saved result")
    parser.add_argument(
        "--model-arg", type=assignment, action="append", default=[], metavar="K=V", help="an argument of its factory"
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="pixels a side (default: 32, or those of the saved result)"
    )


def run(arguments: argparse.Namespace) -> Output:
    """Trace the model and list its groups."""
    model, shape = _model(arguments)
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
    title = f"{arguments.model}, images 3x{shape[1]}x{shape[2]}"
    columns = ("group", "kind", "width", "MACs/channel", "params/channel", "editable")
    editable = sum(group["editable"] for group in groups)
    totals = (
        f"{human(cost.macs)} MACs, {human(cost.params)} parameters, {human(cost.size)}B; "
        f"{editable} of {len(groups)} groups can be edited"
    )
    document = {
        "model": arguments.model,
        "image_shape": list(shape),
        "cost": cost.to_json(),
        "groups": groups,
    }
    parts = (table(title, columns, rows, left=("group", "kind", "editable")), totals, *filter(None, [cost.note]))
    return Output(document=document, parts=parts)


def _model(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[int, int, int]]:
    size = arguments.image_size
    if size is not None and size < 1:
        raise InputError(f"--image-size {size}: must be positive")
    directory = Path(arguments.model)
    if (directory / RESULT).is_file():
        result = load(directory)
        _, height, width = result.image_shape
        return result.model, (3, size or height, size or width)
    model, _ = build_model(arguments.model, **dict(arguments.model_arg))
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
